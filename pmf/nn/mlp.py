"""The MLP branch of a block: norm, SwiGLU, gated sum."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pmf import reference
from pmf.ops._autograd import Gradients, JvpFunction, KernelFunction, named
from pmf.ops._dispatch import call, register
from pmf.ops._plain import in_float32
from pmf.ops._raw import raw
from pmf.ops._subclasses import require_plain

from .branch import add_branch, branch_gradients, cast_for_products, project, project_gradients, scale_rows
from .norm import RMSNorm

__all__ = ["MlpBranch", "swiglu_width"]


def swiglu_width(hidden_size: int) -> int:
    """int(8/3 hidden), rounded up to a multiple of 8 if hidden > 1024: B 2048, L 2730, H 3416."""
    width = int(hidden_size * 8 / 3)
    return -(-width // 8) * 8 if hidden_size > 1024 else width


class MlpBranch(nn.Module):
    """y = x + gate w2(silu(w1 n) * w3 n), n = RMSNorm(x), no biases; x [B, N, D] (Shazeer, 2020).

    For backward it keeps x, w1 n and w3 n, D + 2 W numbers per token with inner width W; everything else is
    recomputed (see `pmf.nn.branch`).
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, width, bias=False)

    def forward(
        self, x: Tensor, norm: RMSNorm, gate: Tensor | None, x_t: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D], x_t [n, N, D] or None -> y [B, N, D], its tangent; gate [D].

        y has x's dtype; the products use the dtype of the matrices, or autocast's.
        """
        w1, w3, w2 = cast_for_products(x, self.w1.weight, self.w3.weight, self.w2.weight)
        inputs = _Inputs(x, norm.weight.to(x.dtype), w1, w3, w2, gate, norm.eps)
        require_plain("MlpBranch", **inputs._asdict(), x_t=x_t)
        if x_t is None:
            return call("mlp_branch", *inputs)[0], None
        return call("mlp_branch_jvp", *inputs, x_t)[:2]


class _Inputs(NamedTuple):
    x: Tensor  # [B, N, D]
    norm: Tensor  # [D]
    w1: Tensor  # [W, D], as the next
    w3: Tensor
    w2: Tensor  # [D, W]
    gate: Tensor | None  # [D]; None means one, without a gradient
    eps: float


class _MlpBranch(KernelFunction):
    """Returns y and, for backward, a = w1 n and b = w3 n."""

    outputs = ("y", "a", "b")
    constants = ("a", "b")
    residuals = ("a", "b")
    samples = ("x",)
    Arguments = _Inputs

    @classmethod
    def forward(cls, *args: Any) -> tuple[Tensor, ...]:
        w = _Inputs(*args)
        a, b = project(raw.rms_norm(w.x, w.norm, w.eps), w.w1, w.w3)
        return add_branch(w.x, scale_rows(w.gate, w.w2), raw.swiglu(a, b)), a, b

    @staticmethod
    @in_float32
    def reference(*args: Any) -> tuple[Tensor, ...]:
        w = _Inputs(*args)
        y = reference.rms_norm(w.x, w.norm, w.eps)
        y = reference.swiglu(y @ w.w1.t(), y @ w.w3.t())
        return (w.x + y @ scale_rows(w.gate, w.w2).t(),)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return _MlpBranchBackward.by_name(grads.y, *residuals, *args)


class _MlpBranchBackward(Gradients):
    of = _MlpBranch
    outputs = ("x", "norm", "w1", "w3", "w2", "gate")

    @classmethod
    def forward(cls, grad: Tensor, a: Tensor, b: Tensor, *args: Any) -> tuple[Tensor, ...]:
        w = _Inputs(*args)
        grad_gate, grad_w2, grad_s = branch_gradients(grad, w.gate, w.w2, raw.swiglu(a, b))
        grads = raw.swiglu_backward(grad_s, a, b)
        grad_y, (grad_w1, grad_w3) = project_gradients(grads, raw.rms_norm(w.x, w.norm, w.eps), w.w1, w.w3)
        grad_x, grad_norm = raw.rms_norm_backward(grad_y, w.x, w.norm, w.eps)
        return grad_x.add_(grad), grad_norm, grad_w1, grad_w3, grad_w2, grad_gate


class _MlpBranchJvp(JvpFunction):
    value = _MlpBranch
    detaches = True
    outputs = ("y", "y_t", "a", "b")
    constants = ("a", "b")
    samples = ("x", "x_t")
    Arguments = named(*_Inputs._fields, "x_t")

    @classmethod
    def forward(cls, *args: Any) -> tuple[Tensor, ...]:
        *inputs, x_t = args
        w = _Inputs(*inputs)
        y, y_t = raw.rms_norm_jvp(w.x, w.norm, x_t, None, w.eps)
        (a, b), (a_t, b_t) = project(y, w.w1, w.w3), project(y_t, w.w1, w.w3)
        s, s_t = raw.swiglu_jvp(a, b, a_t, b_t)
        scaled = scale_rows(w.gate, w.w2)
        return add_branch(w.x, scaled, s), add_branch(x_t, scaled, s_t), a, b

    @staticmethod
    def reference(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *inputs, x_t = rest
        return torch.func.jvp(lambda x: _MlpBranch.reference(x, *inputs)[0], (x,), (x_t,))


register("mlp_branch", _MlpBranch)
register("mlp_branch_jvp", _MlpBranchJvp)
