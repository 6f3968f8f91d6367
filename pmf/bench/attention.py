"""Attention: forward, forward with tangents, backward, and backward through both outputs.

FLOPs count the necessary tile products: 2, 6, 5 and 15 of 2 Nq Nk D each per head; bytes count the tensors
[B, H, N, D] that must move: 4, 8, 8 and 16. Peers: torch's attention backends (on the CPU the flash kernel),
torch.func.jvp through torch's math attention (the only torch backend with a tangent), and the written-out
reference; also a large GEMM of the same dtype, whose rate is the ceiling.

Errors are computed on evenly spaced heads, as many as have SCORES scores in float64.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pmf import ops, reference
from pmf.bench.device import Run
from pmf.bench.harness import Case, Planned, Setting, against
from pmf.check.tolerance import dtype_name, tolerance

Shape = tuple[int, int, int, int]
Jvp = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_B16, _H16 = (256, 12, 276, 64), (256, 16, 276, 80)
PROBLEMS: dict[str, list[tuple[torch.dtype, list[Shape]]]] = {
    "tiny": [(dtype, [(1, 2, 17, 8)]) for dtype in (_F32, _BF16)],
    "cpu": [(dtype, [(4, 12, 276, 64), (4, 16, 276, 80), (1, 12, 1024, 64)]) for dtype in (_F32, _BF16)],
    "quick": [(_BF16, [_B16, (16, 12, 1024, 64)])],
    "full": [
        (_BF16, [_B16, _H16, (64, 12, 1024, 64), (64, 12, 1024, 128), (2, 12, 4096, 64)]),
        (_F16, [_B16]),
        (_F32, [(64, 12, 276, 64)]),
    ],
}
GEMM = {"tiny": 64, "cpu": 2048, "quick": 8192, "full": 8192}
SCORES = 1 << 25
BACKENDS = {
    "cpu": {"torch flash": SDPBackend.FLASH_ATTENTION},
    "cuda": {
        "torch flash": SDPBackend.FLASH_ATTENTION,
        "torch mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "torch cudnn": SDPBackend.CUDNN_ATTENTION,
        "torch math": SDPBackend.MATH,
    },
}


def cases(setting: Setting, jvp_peers: Mapping[str, Jvp] | None = None) -> Iterator[Planned]:
    """jvp_peers: additional contestants for forward + JVP, functions of (primals, tangents)."""
    makers: tuple[tuple[str, int, Callable[..., Case]], ...] = (
        ("forward", 2, forward),
        ("forward + JVP", 6, functools.partial(forward_jvp, peers=jvp_peers or {})),
        ("backward", 5, backward),
        ("backward through both", 15, backward_of_both),
    )
    for dtype, shapes in PROBLEMS[setting.scale]:
        yield gemm(setting, dtype)
        for shape in shapes:
            for what, products, make in makers:
                build = functools.partial(_build, setting, shape, dtype, make)
                yield _planned(what, products, shape, dtype, build)


def gemm(setting: Setting, dtype: torch.dtype) -> Planned:
    """The ceiling for matrix work."""
    n = GEMM[setting.scale]

    def build() -> Case:
        a, b = setting.normal((n, n), (n, n), dtype=dtype)
        return Case({"torch.mm": lambda: a @ b}, flops=2.0 * n**3)

    facts = {"op": "gemm", "shape": [n, n, n], "dtype": dtype_name(dtype)}
    return Planned(f"torch GEMM {(n, n, n)} {dtype_name(dtype)}", build, facts)


def _build(setting: Setting, shape: Shape, dtype: torch.dtype, make: Callable[..., Case]) -> Case:
    """Build a case from query, key, value, their tangents, and gradients of both outputs."""
    return make(*setting.normal(*[shape] * 8, dtype=dtype))


def _planned(
    what: str, products: int, shape: Shape, dtype: torch.dtype, build: Callable[[], Case]
) -> Planned:
    facts = {
        "op": f"attention {what}",
        "shape": list(shape),
        "dtype": dtype_name(dtype),
        "products": products,
    }
    return Planned(f"{what} {shape} {dtype_name(dtype)}", build, facts)


def _flops(products: int, x: Tensor) -> float:
    batch, heads, tokens, width = x.shape
    return products * 2.0 * batch * heads * tokens * tokens * width


def _bytes(count: int, x: Tensor) -> float:
    return float(count * x.numel() * x.element_size())


def _heads(x: Tensor) -> Tensor:
    """Evenly spaced heads [heads, N, D] with SCORES scores in total."""
    every = x.detach().flatten(0, 1)
    count = min(len(every), max(1, SCORES // x.shape[2] ** 2))
    return every[torch.linspace(0, len(every) - 1, count).long().to(x.device)]


def _some_heads(result: Any) -> list[Tensor]:
    return [_heads(x) for x in ((result,) if isinstance(result, Tensor) else result)]


def _exactly(*inputs: Tensor) -> Any:
    """The checked heads in float64, each as a separate batch."""
    return [_heads(x).double()[:, None] for x in inputs]


def _truth(result: Any) -> list[Tensor]:
    return [x.detach().squeeze(1) for x in ((result,) if isinstance(result, Tensor) else result)]


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _backends(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    return {name: functools.partial(_sdpa, which) for name, which in BACKENDS[device.type].items()}


def forward(*inputs: Tensor) -> Case:
    q, k, v = inputs[:3]
    runs: dict[str, Run] = {"pmf.ops.attention": lambda: ops.attention(q, k, v)}
    runs |= {name: functools.partial(run, q, k, v) for name, run in _backends(q.device).items()}
    exact = _truth(reference.attention(*_exactly(q, k, v)))
    limit = tolerance("attention", q.dtype)
    return Case(runs, against(runs, exact, _some_heads), limit, _flops(2, q), _bytes(4, q))


def torch_math_jvp(primals: Any, tangents: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(F.scaled_dot_product_attention, tuple(primals), tuple(tangents))


def forward_jvp(*inputs: Tensor, peers: Mapping[str, Jvp]) -> Case:
    primals: Any = inputs[:3]
    tangents: Any = inputs[3:6]
    runs: dict[str, Run] = {
        "pmf.ops.attention_jvp": lambda: ops.attention_jvp(*primals, *tangents),
        "torch.func.jvp of torch math": lambda: torch_math_jvp(primals, tangents),
        "written out in torch": lambda: reference.attention_jvp(*primals, *tangents),
    }
    runs |= {name: functools.partial(run, primals, tangents) for name, run in peers.items()}
    exact = _truth(reference.attention_jvp(*_exactly(*inputs[:6])))
    q = primals[0]
    limit = tolerance("attention", q.dtype)
    return Case(runs, against(runs, exact, _some_heads), limit, _flops(6, q), _bytes(8, q))


def _backward_run(outputs: Callable[[], Any], leaves: Any, grads: Any) -> Run:
    """The backward pass only: the first call, outside the timing, computes the outputs."""
    made = functools.cache(outputs)
    return lambda: torch.autograd.grad(made(), leaves, grads, retain_graph=True)


def backward(*inputs: Tensor) -> Case:
    q, k, v = leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    grad = inputs[6]
    runs = {"pmf.ops.attention": _backward_run(lambda: ops.attention(q, k, v), leaves, grad)}
    for name, run in _backends(q.device).items():
        runs[name] = _backward_run(functools.partial(run, q, k, v), leaves, grad)
    exact_leaves = [x.requires_grad_() for x in _exactly(q, k, v)]
    exact = torch.autograd.grad(reference.attention(*exact_leaves), exact_leaves, *_exactly(grad))
    limit = tolerance("attention gradient", q.dtype)
    return Case(runs, against(runs, _truth(exact), _some_heads), limit, _flops(5, q), _bytes(8, q))


def backward_of_both(*inputs: Tensor) -> Case:
    leaves: Any = [x.detach().requires_grad_() for x in inputs[:6]]
    grads = inputs[6:8]
    runs = {
        "pmf.ops.attention_jvp": _backward_run(lambda: ops.attention_jvp(*leaves), leaves, grads),
        "autograd of written out": _backward_run(lambda: reference.attention_jvp(*leaves), leaves, grads),
    }
    exact_leaves = [x.requires_grad_() for x in _exactly(*leaves)]
    exact = torch.autograd.grad(reference.attention_jvp(*exact_leaves), exact_leaves, _exactly(*grads))
    q = leaves[0]
    limit = tolerance("attention gradient", q.dtype)
    return Case(runs, against(runs, _truth(exact), _some_heads), limit, _flops(15, q), _bytes(16, q))
