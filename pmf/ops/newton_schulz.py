"""Newton-Schulz orthogonalisation of matrices of any shapes, as Muon applies it to its momentum."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pmf import _library, checked, kernels
from pmf.reference.newton_schulz import Coefficients, step_coefficients
from pmf.reference.newton_schulz import newton_schulz as plain

from ._dispatch import register_fake
from ._subclasses import operation

__all__ = ["newton_schulz"]

LAYOUTS = {"matrices": "... _ _"}

METHODS = ("auto", "direct", "gram")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def newton_schulz(
    matrices: Tensor,
    steps: int = 5,
    coefficients: str | Coefficients | Sequence[Coefficients] = "quintic",
    method: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Tensor: ...


@overload
def newton_schulz(
    matrices: Sequence[Tensor],
    steps: int = 5,
    coefficients: str | Coefficients | Sequence[Coefficients] = "quintic",
    method: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]: ...


@operation(LAYOUTS, "... _ _")
def newton_schulz(
    matrices: Tensor | Sequence[Tensor],
    steps: int = 5,
    coefficients: str | Coefficients | Sequence[Coefficients] = "quintic",
    method: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Tensor | list[Tensor]:
    """Orthogonalise matrices approximately: make each singular value about 1, preserve the singular vectors.

        X = G / |G|_F;  `steps` times:  A = X X^T,  X <- a X + (b A + c A^2) X

    Args:
        matrices: [..., m, n], or a list of matrices of any shapes; float32, bfloat16, float16 or float64, any
            strides. Not modified.
        steps: number of iterations.
        coefficients: "quintic" (3.4445, -4.7750, 2.0315), "taylor" (15/8, -5/4, 3/8), "polar-express"
            (different for each step, with a safety factor of 1.01), a triple (a, b, c), or one triple per
            step.
        method: "direct"; "gram", which iterates on X X^T for two steps, or the last three, between restarts
            (fewer FLOPs for wide and tall matrices), and takes a direct step if rounding errors could grow
            too much before the next restart; or "auto": "gram" if the long side is at least 1.5 times the
            short one.
        compute_dtype: dtype of the products and of the values stored between them. Default: float64 for
            float64 matrices; otherwise float32 on the CPU and float16 on CUDA. float16 on the CPU rounds each
            stored product to float16 and multiplies in float32.

    Returns the same shapes in the dtype of each matrix. The norm is computed in float32 (float64 for float64)
    after exact scaling by a power of two, so the scale does not matter: f(2^k G) = f(G) bitwise. Zero gives
    exactly zero; a matrix with NaN or infinity gives NaN without affecting others. On the CPU a matrix gives
    the same bits alone, in a batch, in a list, and with any number of threads; on CUDA alone, in a batch and
    in a list.

    On the CPU the work is PyTorch's GEMM, with half of each symmetric product computed and matrices spread
    over threads. On CUDA one launch computes a product for all matrices that fit 2 GB of workspace, whatever
    their shapes: 16-bit operands, float32 sums; float32 operands are rounded to TF32 unless
    `torch.set_float32_matmul_precision` is "highest", and then split into two TF32 numbers, for float32
    accuracy. float64 on CUDA, and all cases in which autograd or a functional transform needs a derivative,
    use the plain iteration of `pmf.reference`.

    Raises ValueError for a wrong rank, dtype, method, number of steps or coefficients.

    Source: Jordan et al., "Muon" (2024), https://kellerjordan.github.io/posts/muon/; the Gram form follows
    Dao-AILab's gram-newton-schulz.
    """
    factors = step_coefficients(steps, coefficients)
    if method not in METHODS:
        raise ValueError(
            f"newton_schulz: method must be {', '.join(METHODS[:-1])} or {METHODS[-1]}, got {method!r}"
        )
    if compute_dtype is not None and compute_dtype not in DTYPES:
        raise ValueError(
            f"newton_schulz: compute_dtype must be one of {_names(DTYPES)}, got {_names([compute_dtype])}"
        )
    batches = [matrices] if isinstance(matrices, Tensor) else list(matrices)
    for matrix in batches:
        if matrix.dim() < 2 or (matrix.dim() > 2 and not isinstance(matrices, Tensor)):
            raise ValueError(
                "newton_schulz: matrices must be a tensor [..., m, n] or a list of [m, n], "
                f"got a shape of {list(matrix.shape)}"
            )
        if matrix.dtype not in DTYPES:
            raise ValueError(
                f"newton_schulz: matrices must be one of {_names(DTYPES)}, got {_names([matrix.dtype])}"
            )
    if _needs_derivative(batches):
        results = [_plain(matrix, factors, method, _dtype(matrix, compute_dtype)) for matrix in batches]
    elif isinstance(matrices, Tensor) and matrices.dim() > 2:
        done = _in_groups(list(matrices.flatten(0, -3)), factors, method, compute_dtype)
        results = [torch.stack(done).view(matrices.shape) if done else torch.empty_like(matrices)]
    else:
        results = _in_groups(batches, factors, method, compute_dtype)
    return results[0] if isinstance(matrices, Tensor) else results


def _in_groups(
    matrices: list[Tensor], factors: list[Coefficients], method: str, compute_dtype: torch.dtype | None
) -> list[Tensor]:
    """One call for a device and compute dtype; in plain PyTorch, one call per shape."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    by_reference = kernels.uses_reference("newton_schulz")
    for i, matrix in enumerate(matrices):
        dtype = _dtype(matrix, compute_dtype)
        if matrix.is_meta:  # only shapes
            compiled = True
        elif by_reference:  # which rounds once, like every reference that replaces a kernel
            compiled, dtype = False, torch.promote_types(dtype, torch.float32)
        elif _library.takes_cuda_kernel(matrix):
            compiled = bool(factors) and kernels_take(matrix, dtype)
        else:
            compiled = matrix.device.type == "cpu"
        groups[dtype, matrix.device, None if compiled else (matrix.dtype, matrix.shape)].append(i)
    results: dict[int, Tensor] = {}
    for (dtype, _, alike), members in groups.items():
        group = [matrices[i] for i in members]
        if alike is None:
            _library.require()
            numbers = list(chain.from_iterable(factors))
            checked.remind(group[0])
            with _outside_inference_mode(), torch.no_grad():
                done = torch.ops.pmf.newton_schulz(group, numbers, method, dtype, _library.allow_tf32())
        else:
            done = _plain(torch.stack(group), factors, method, dtype).unbind()
        results.update(zip(members, done, strict=True))
    return [results[i] for i in range(len(matrices))]


def _outside_inference_mode() -> AbstractContextManager[Any]:
    """PyTorch's worker threads are not in inference mode and may not write to inference tensors."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _plain(matrix: Tensor, factors: list[Coefficients], method: str, dtype: torch.dtype) -> Tensor:
    with torch.autocast(matrix.device.type, enabled=False):
        return plain(matrix, len(factors), factors, method, dtype)


def kernels_take(matrix: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether the CUDA kernels process this tensor with that compute dtype."""
    return _library.takes_cuda_kernel(matrix) and torch.float64 not in (matrix.dtype, compute_dtype)


def _dtype(matrix: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    if compute_dtype is not None:
        return compute_dtype
    if matrix.dtype == torch.float64:
        return torch.float64
    on_cpu = matrix.device.type == "cpu" and not _library.takes_cuda_kernel(matrix)
    return torch.float32 if on_cpu else torch.float16


def _needs_derivative(matrices: Sequence[Tensor]) -> bool:
    """Whether autograd or a functional transform is active, which the raw op would silently drop."""
    return (torch.is_grad_enabled() and any(matrix.requires_grad for matrix in matrices)) or _in_transform()


def _in_transform() -> bool:
    if not torch.compiler.is_compiling():
        return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None
    from . import _compiled  # imports torch._dynamo, which takes seconds

    return forward_ad._current_level >= 0 or _compiled.in_transform()


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _fake(
    matrices: list[Tensor],
    coefficients: list[float],
    method: str,
    dtype: torch.dtype,
    allow_tf32: bool = False,
) -> list[Tensor]:
    return [torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device) for matrix in matrices]


register_fake("newton_schulz", _fake)
