"""The attention branch of a block: norm, self-attention with normalised, rotated q and k, gated sum."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pmf import reference
from pmf._library import allow_tf32
from pmf.ops._autograd import Gradients, JvpFunction, KernelFunction, named
from pmf.ops._dispatch import call, register
from pmf.ops._plain import in_float32
from pmf.ops._raw import raw
from pmf.ops._subclasses import require_plain

from .branch import (
    add_branch,
    branch_gradients,
    cast_for_products,
    project,
    project_gradients,
    scale_rows,
)
from .norm import RMSNorm

__all__ = ["AttentionBranch"]


class AttentionBranch(nn.Module):
    """y = x + gate out_proj(softmax(q k^T / sqrt(d)) v), with q, k and v from RMSNorm(x); x [B, N, D].

    q and k are RMS-normalised per head and rotated for the last tokens. For backward it keeps x, q, k, v and
    the attention output, 5 D numbers per token, and one float32 per token and head; everything else is
    recomputed (see `pmf.nn.branch`).
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        gate: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        x_t: Tensor | None = None,
        keep: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D], x_t [n, N, D] or None -> y [B, N, D], its tangent; only for the last `keep` tokens.

        gate [D]; cos, sin [P, D / H / 2] rotate the last P tokens. y has x's dtype; the products use the
        dtype of the matrices, or autocast's.
        """
        layers = self.q_proj, self.k_proj, self.v_proj, self.out_proj
        query, key, value, out = cast_for_products(x, *(layer.weight for layer in layers))
        inputs = _Inputs(
            x,
            norm.weight.to(x.dtype),
            query,
            key,
            value,
            self.q_norm.weight.to(out.dtype),
            self.k_norm.weight.to(out.dtype),
            out,
            gate,
            cos,
            sin,
            self.num_heads,
            x.shape[1] if keep is None else keep,
            norm.eps,
            self.q_norm.eps,
        )
        require_plain("AttentionBranch", **inputs._asdict(), x_t=x_t)
        if x_t is None:
            return call("attention_branch", *inputs)[0], None
        return call("attention_branch_jvp", *inputs, x_t)[:2]


UNPACKED = (None,) * 4
"""Neither a window nor offsets."""


class _Inputs(NamedTuple):
    x: Tensor  # [B, N, D]
    norm: Tensor  # [D]
    query: Tensor  # [D, D], as the next two and `out`
    key: Tensor
    value: Tensor
    query_norm: Tensor  # [D / H], as the next
    key_norm: Tensor
    out: Tensor
    gate: Tensor | None  # [D]; None means one, without a gradient
    cos: Tensor
    sin: Tensor
    num_heads: int
    keep: int
    eps: float
    head_eps: float

    @property
    def norms(self) -> tuple[Any, ...]:
        """The arguments of rotary_qk_norm after queries and keys."""
        return self.query_norm, self.key_norm, self.cos, self.sin

    @property
    def scale(self) -> float:
        return self.query_norm.shape[0] ** -0.5

    def heads(self, y: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of y [B, N, D]: views [B, H, N, D / H]."""
        return tuple(_split(p, self.num_heads) for p in project(y, self.query, self.key, self.value))

    def last(self, x: Tensor, dim: int = 1) -> Tensor:
        """The last `keep` tokens, a view."""
        return x.narrow(dim, x.shape[dim] - self.keep, self.keep)


class _AttentionBranch(KernelFunction):
    """Returns y and, for backward, queries, keys, values, the attention output and its lse."""

    outputs = ("y", "q", "k", "v", "o", "lse")
    constants = ("q", "k", "v", "o", "lse")
    residuals = ("q", "k", "v", "o", "lse")
    samples = ("x",)
    by_reference = ("cos", "sin")
    Arguments = _Inputs

    @classmethod
    def forward(cls, *args: Any) -> tuple[Tensor, ...]:
        w = _Inputs(*args)
        q, k, v = w.heads(raw.rms_norm(w.x, w.norm, w.eps))
        turned_q, turned_k = raw.rotary_qk_norm(q, k, *w.norms, w.head_eps)
        o, lse = raw.attention_forward(
            w.last(turned_q, 2), turned_k, v, None, False, w.scale, *UNPACKED, allow_tf32()
        )
        y = add_branch(w.last(w.x), scale_rows(w.gate, w.out), _join(o))
        return y, q, k, v, o, lse

    @staticmethod
    @in_float32
    def reference(*args: Any) -> tuple[Tensor, ...]:
        w = _Inputs(*args)
        y = reference.rms_norm(w.x, w.norm, w.eps)
        q, k, v = (_split(y @ matrix.t(), w.num_heads) for matrix in (w.query, w.key, w.value))
        q, k = reference.rotary_qk_norm(q, k, w.query_norm, w.key_norm, w.cos, w.sin, w.head_eps)
        o = reference.attention(w.last(q, 2), k, v, scale=w.scale)
        return (w.last(w.x) + _join(o) @ scale_rows(w.gate, w.out).t(),)

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> Any:
        return _AttentionBranchBackward.by_name(grads.y, *residuals, *args)


class _AttentionBranchBackward(Gradients):
    of = _AttentionBranch
    outputs = ("x", "norm", "query", "key", "value", "query_norm", "key_norm", "out", "gate")

    @classmethod
    def forward(
        cls, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *args: Any
    ) -> tuple[Tensor, ...]:
        w = _Inputs(*args)
        grad_gate, grad_out, grad_o = branch_gradients(grad, w.gate, w.out, _join(o))
        turned_q, turned_k = raw.rotary_qk_norm(q, k, *w.norms, w.head_eps)
        grad_q, grad_k, grad_v = raw.attention_backward(
            _split(grad_o, w.num_heads),
            w.last(turned_q, 2),
            turned_k,
            v,
            lse,
            None,
            False,
            w.scale,
            *UNPACKED,
            None,
            allow_tf32(),
        )
        grad_q, grad_k, grad_query_norm, grad_key_norm = raw.rotary_qk_norm_backward(
            _behind_zeros(grad_q, q), grad_k, q, k, *w.norms, w.head_eps
        )
        y = raw.rms_norm(w.x, w.norm, w.eps)
        grad_heads = _join(grad_q), _join(grad_k), _join(grad_v)
        grad_y, grad_matrices = project_gradients(grad_heads, y, w.query, w.key, w.value)
        grad_x, grad_norm = raw.rms_norm_backward(grad_y, w.x, w.norm, w.eps)
        w.last(grad_x).add_(grad)
        return grad_x, grad_norm, *grad_matrices, grad_query_norm, grad_key_norm, grad_out, grad_gate


class _AttentionBranchJvp(JvpFunction):
    value = _AttentionBranch
    detaches = True
    outputs = ("y", "y_t", *_AttentionBranch.residuals)
    constants = _AttentionBranch.residuals
    samples = ("x", "x_t")
    Arguments = named(*_Inputs._fields, "x_t")

    @classmethod
    def forward(cls, *args: Any) -> tuple[Tensor, ...]:
        *inputs, x_t = args
        w = _Inputs(*inputs)
        y, y_t = raw.rms_norm_jvp(w.x, w.norm, x_t, None, w.eps)
        (q, k, v), (q_t, k_t, v_t) = w.heads(y), w.heads(y_t)
        turned_q, turned_k, turned_q_t, turned_k_t = raw.rotary_qk_norm_jvp(
            q, k, *w.norms, q_t, k_t, None, None, w.head_eps
        )
        last = w.last(turned_q, 2), turned_k, v, w.last(turned_q_t, 2), turned_k_t, v_t
        o, lse, o_t, _ = raw.attention_jvp_forward(*last, None, False, w.scale, *UNPACKED, allow_tf32())
        scaled = scale_rows(w.gate, w.out)
        y, y_t = (add_branch(w.last(x), scaled, _join(branch)) for x, branch in ((w.x, o), (x_t, o_t)))
        return y, y_t, q, k, v, o, lse

    @staticmethod
    def reference(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *inputs, x_t = rest
        return torch.func.jvp(lambda x: _AttentionBranch.reference(x, *inputs)[0], (x,), (x_t,))


def _split(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, D] -> [B, H, N, D / H], a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    """[B, H, N, D / H] -> [B, N, D], a view if the kernels preserved the projections' layout."""
    return x.transpose(1, 2).flatten(2)


def _behind_zeros(grad: Tensor, q: Tensor) -> Tensor:
    """The gradient of all queries, given that of the last ones."""
    if grad.shape == q.shape:
        return grad
    whole = torch.zeros_like(q)
    whole[:, :, q.shape[2] - grad.shape[2] :] = grad
    return whole


register("attention_branch", _AttentionBranch)
register("attention_branch_jvp", _AttentionBranchJvp)
