"""Tolerances against the float64 result for the same (rounded) inputs: one table for `pmf check`, tests and
benchmarks.

Errors are relative Frobenius norms. The unit roundoff u of a 16-bit type bounds one store from above; storing
random values costs 0.42 u. The rest allows for one more rounding inside (the probabilities).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

ZERO = 1e-13
TF32 = "tf32"
"""Stands for float32 inputs and outputs with products whose operands are rounded to TF32."""

UNIT_ROUNDOFF: dict[torch.dtype | str, float] = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
    TF32: 2.0**-11,
}

# In units of u. 16-bit types: one store, preceded for attention by one rounding of the probabilities;
# gradients add one of the score gradients. 32 and 64 bits: sums of a few hundred terms, and the exponential.
# TF32: the same internal roundings, of probabilities and score gradients, but no store in 16 bits, for inputs
# that are TF32 numbers. Determined by applying just these roundings in float64.
_BF16, _F16, _F32, _F64, _TF32 = UNIT_ROUNDOFF
FACTORS: dict[str, dict[torch.dtype | str, float]] = {
    "elementwise": {_BF16: 0.5, _F16: 0.5, _F32: 8, _F64: 64},
    "gemm": {_BF16: 1.5, _F16: 1.5, _F32: 32, _F64: 64},
    "attention": {_BF16: 0.665, _F16: 0.665, _F32: 160, _F64: 1000, _TF32: 0.45},
    "attention gradient": {_BF16: 0.819, _F16: 0.819, _F32: 160, _F64: 1000, _TF32: 0.8},
}


def tolerance(kind: str, dtype: torch.dtype | str) -> float:
    """Largest relative Frobenius error for an op of this kind that computes in `dtype` (or TF32)."""
    return FACTORS[kind][dtype] * UNIT_ROUNDOFF[dtype]


def spread(x: Tensor) -> float:
    """1 + the relative standard deviation of a root mean square over as many errors as x has elements."""
    return 1 + (2 * max(1, x.numel())) ** -0.5


NEWTON_SCHULZ: dict[torch.dtype, float] = {
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 3e-2,
    torch.float64: 1e-4 * 2.0**-29,
}
"""Largest relative Frobenius error of five steps of newton_schulz in a compute dtype."""


def relative_error(result: Tensor | Iterable[Tensor], exact: Tensor | Iterable[Tensor]) -> float:
    """Largest relative Frobenius error over the tensors of a result; NaN or another shape counts as infinite.

    If the exact value is zero, up to float64's rounding of numbers around 1, the error is absolute.
    """
    worst = 0.0
    for one, truth in zip(tensors(result), tensors(exact), strict=True):
        if one.shape != truth.shape:  # which the difference below might broadcast
            return float("inf")
        size, root = truth.norm().item(), max(1, truth.numel()) ** 0.5
        error = (one.double() - truth).norm().item() / (size if size > ZERO * root else root)
        worst = max(worst, error if error == error else float("inf"))
    return worst


def tensors(result: Any) -> tuple[Tensor, ...]:
    """A tensor, or several, as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
