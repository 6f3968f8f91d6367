"""Newton-Schulz orthogonalisation (Jordan et al., "Muon", 2024), batched, in plain PyTorch.

For a wide X [m, n] (tall matrices are transposed first), five times:

    A = X X^T        X <- a X + (b A + c A^2) X

which applies p(s) = a s + b s^3 + c s^5 to every singular value and preserves the singular vectors.
"""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from pmf import _library
from pmf.arguments import is_whole

__all__ = ["newton_schulz", "normalise", "step_coefficients"]

Coefficients = tuple[float, float, float]

COEFFICIENTS: dict[str, Coefficients] = {
    # Steepest at 0 among those that keep s in [0, 1] near 1; five steps give [0.68, 1.21] for s >= 1.5e-3.
    "quintic": (3.4445, -4.7750, 2.0315),
    # Taylor's: slower, but converges to exactly 1.
    "taylor": (15 / 8, -10 / 8, 3 / 8),
}
SAFETY = 1.01
"""Polar Express polynomials except the last are p(s / SAFETY), so that rounding stays in their range."""
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Amsel et al., "The Polar Express" (2025), for singular values from 1e-3 to 1; the last is repeated."""


def newton_schulz(
    matrices: Tensor,
    steps: int = 5,
    coefficients: str | Coefficients | Sequence[Coefficients] = "quintic",
    method: str = "direct",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Orthogonalise each matrix of [..., m, n]; the result has the dtype of `matrices`.

    "direct" is the iteration above. "gram" iterates on R = X X^T, accumulating the polynomials in Q, and
    restarts where the compiled op does, because R squares the condition number; so does "auto" for wide and
    tall matrices.
    """
    factors = step_coefficients(steps, coefficients)
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    m, n = x.shape[-2:]
    precise = _precise(matrices.dtype, compute_dtype)
    x = normalise(x.to(precise)).to(compute_dtype or precise)
    if method == "direct":
        x = _direct(x, factors)
    else:
        for segment in _segments(m, n, factors, method, x.dtype):
            x = _on_gram(x, segment) if len(segment) > 1 else _direct(x, segment)
    return (x.mT if tall else x).to(matrices.dtype)


def normalise(x: Tensor) -> Tensor:
    """x / |x|_F without overflow or underflow: first scaled by an exact power of two, then by the norm.

    Zero stays exactly zero; NaN and infinity become NaN.
    """
    largest = x.detach().abs().amax((-2, -1), keepdim=True) if x.shape[-1] and x.shape[-2] else x.new_ones(())
    exponent = torch.frexp(largest).exponent - 1
    exponent = torch.where(largest.isfinite() & (largest > 0), exponent, torch.zeros_like(exponent))
    half = -exponent // 2  # 2^-exponent itself may overflow
    one = torch.ones_like(largest)
    x = x * torch.ldexp(one, half) * torch.ldexp(one, -exponent - half)
    square = x.square().sum((-2, -1), keepdim=True)
    return x / torch.where(square == 0, 1, square).sqrt()


def step_coefficients(
    steps: int, coefficients: str | Coefficients | Sequence[Coefficients]
) -> list[Coefficients]:
    """(a, b, c) for every step: from a name, one triple for all, or a list of `steps` triples."""
    if not is_whole(steps) or steps < 0:
        raise ValueError(f"newton_schulz: steps must be a whole number and not negative, got {steps!r}")
    if isinstance(coefficients, str):
        if coefficients == "polar-express":
            safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
            return [(safe + [POLAR_EXPRESS[-1]])[min(i, len(safe))] for i in range(steps)]
        if coefficients not in COEFFICIENTS:
            known = ", ".join(COEFFICIENTS) + " or polar-express"
            raise ValueError(f"newton_schulz: coefficients must be {known} or numbers, got {coefficients!r}")
        return [COEFFICIENTS[coefficients]] * steps
    try:
        rows = torch.tensor(coefficients, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # not numbers, or lists of several lengths
        rows = torch.empty(0, device="cpu")
    rows = rows.expand(steps, 3) if rows.shape == (3,) else rows.reshape(-1, 3) if steps == 0 else rows
    if rows.shape != (steps, 3) or not rows.isfinite().all():
        raise ValueError(
            f"newton_schulz: coefficients must be three finite numbers (a, b, c), or {steps} such triples"
        )
    return [(a, b, c) for a, b, c in rows.tolist()]


def _direct(x: Tensor, factors: Sequence[Coefficients]) -> Tensor:
    for a, b, c in factors:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _segments(
    m: int, n: int, factors: Sequence[Coefficients], method: str, dtype: torch.dtype
) -> list[list[Coefficients]]:
    """Steps per segment between restarts, as in the compiled op (csrc/include/pmf/newton_schulz.h)."""
    _library.require()
    numbers = [number for triple in factors for number in triple]
    lengths = torch.ops.pmf.newton_schulz_segments(m, n, numbers, method, dtype)
    steps = iter(factors)
    return [list(islice(steps, length)) for length in lengths]


def _on_gram(x: Tensor, factors: Sequence[Coefficients]) -> Tensor:
    gram = x @ x.mT
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    q = identity
    for a, b, c in factors:
        p = a * identity + b * gram + c * gram @ gram
        q = p @ q
        gram = p @ gram @ p
    return q @ x


def _precise(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype for normalising: float32, or float64 for float64."""
    wide = torch.float64 in (dtype if compute_dtype is None else compute_dtype,)
    return torch.float64 if wide else torch.float32
