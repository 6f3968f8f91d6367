"""Attention: forward, forward with tangents, backward, and backward through both outputs.

FLOPs count the tile products the mathematics needs: 2, 6, 5 and 15 of 2 Nq Nk D each for every head. Peers:
torch's CPU flash kernel, torch.func.jvp through torch's math attention (the only one of torch's that has a
tangent), the written-out reference; and a large GEMM of the same dtype, whose rate is the ceiling.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pmf import ops, reference
from pmf.bench.harness import Case, relative_error

SHAPES = ((4, 12, 276, 64), (4, 16, 276, 80), (1, 12, 1024, 64))
DTYPES = (torch.float32, torch.bfloat16)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3.2e-3}
GEMM = 2048


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield gemm(dtype)
        for shape in SHAPES:
            inputs = draw(shape, dtype)
            yield forward(shape, dtype, *inputs)
            yield forward_jvp(shape, dtype, *inputs)
            yield backward(shape, dtype, *inputs)
            yield backward_of_both(shape, dtype, *inputs)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """query, key, value, their tangents, and gradients of both outputs."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(8)]


def label(what: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{what} {tuple(shape)} {str(dtype).removeprefix('torch.')}"


def products(count: int, shape: tuple[int, ...]) -> float:
    """FLOPs of ``count`` products over every head's score tile."""
    batch, heads, tokens, width = shape
    return count * 2.0 * batch * heads * tokens * tokens * width


def gemm(dtype: torch.dtype) -> Case:
    a, b = torch.randn(2, GEMM, GEMM).to(dtype)
    return Case(
        label("torch GEMM", (GEMM, GEMM, GEMM), dtype), {"torch.mm": lambda: a @ b}, flops=2.0 * GEMM**3
    )


def forward(shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor) -> Case:
    q, k, v = inputs[:3]
    runs = {
        "pmf.ops.attention": lambda: ops.attention(q, k, v),
        "torch flash": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    exact = reference.attention(q.double(), k.double(), v.double())
    errors = {name: relative_error(run(), exact) for name, run in runs.items()}
    return Case(label("forward", shape, dtype), runs, errors, LIMITS[dtype], products(2, shape))


def forward_jvp(shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor) -> Case:
    primals: Any = inputs[:3]
    tangents: Any = inputs[3:6]

    def torch_math() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(F.scaled_dot_product_attention, primals, tangents)

    runs = {
        "pmf.ops.attention_jvp": lambda: ops.attention_jvp(*primals, *tangents),
        "torch.func.jvp of torch math": torch_math,
        "written out in torch": lambda: reference.attention_jvp(*primals, *tangents),
    }
    doubles: Any = [x.double() for x in inputs[:6]]
    exact = reference.attention_jvp(*doubles)
    errors = {name: relative_error(run(), exact) for name, run in runs.items()}
    return Case(label("forward + JVP", shape, dtype), runs, errors, LIMITS[dtype], products(6, shape))


def backward(shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor) -> Case:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    grad = inputs[6]
    ours, theirs = ops.attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    runs = {
        "pmf.ops.attention": lambda: torch.autograd.grad(ours, (q, k, v), grad, retain_graph=True),
        "torch flash": lambda: torch.autograd.grad(theirs, (q, k, v), grad, retain_graph=True),
    }
    exact_inputs: Any = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(reference.attention(*exact_inputs), exact_inputs, grad.double())
    errors = {name: relative_error(run(), exact) for name, run in runs.items()}
    return Case(label("backward", shape, dtype), runs, errors, LIMITS[dtype], products(5, shape))


def backward_of_both(shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor) -> Case:
    leaves: Any = [x.detach().requires_grad_() for x in inputs[:6]]
    grads = inputs[6:8]
    ours, theirs = ops.attention_jvp(*leaves), reference.attention_jvp(*leaves)
    runs = {
        "pmf.ops.attention_jvp": lambda: torch.autograd.grad(ours, leaves, grads, retain_graph=True),
        "autograd of written out": lambda: torch.autograd.grad(theirs, leaves, grads, retain_graph=True),
    }
    exact_leaves: Any = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(
        reference.attention_jvp(*exact_leaves), exact_leaves, [x.double() for x in grads]
    )
    errors = {name: relative_error(run(), exact) for name, run in runs.items()}
    return Case(
        label("backward through both", shape, dtype), runs, errors, LIMITS[dtype], products(15, shape)
    )
