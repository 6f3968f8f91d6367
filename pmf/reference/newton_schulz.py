"""Newton-Schulz orthogonalisation (Jordan et al., "Muon", 2024), batched, in plain PyTorch.

For a wide X [m, n] (a tall matrix is transposed first), five times:

    A = X X^T        X <- a X + (b A + c A^2) X

which applies p(s) = a s + b s^3 + c s^5 to every singular value and leaves the singular vectors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["newton_schulz", "normalise", "step_coefficients"]

Coefficients = tuple[float, float, float]

COEFFICIENTS: dict[str, Coefficients] = {
    # Steepest at 0 among those that keep s in [0, 1] near 1; five steps give [0.68, 1.21] for s >= 1.5e-3.
    "quintic": (3.4445, -4.7750, 2.0315),
    # Taylor's: slower, but converges to exactly 1.
    "taylor": (15 / 8, -10 / 8, 3 / 8),
}
RESTART = 2
GRAM_RATIO = 1.5


def newton_schulz(
    matrices: Tensor,
    steps: int = 5,
    coefficients: str | Coefficients | Sequence[Coefficients] = "quintic",
    method: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Orthogonalise each matrix of [..., m, n]; the result has the dtype of `matrices`.

    "direct" is the iteration above. "gram" iterates on R = X X^T, multiplying the polynomials up in Q, and
    restarts after step 2, because R squares the condition number. "auto" is "gram" where n >= 1.5 m.
    """
    factors = step_coefficients(steps, coefficients)
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    m, n = x.shape[-2:]
    precise = _precise(matrices.dtype, compute_dtype)
    x = normalise(x.to(precise)).to(compute_dtype or precise)
    if method == "gram" or (method == "auto" and n >= GRAM_RATIO * m):
        x = _on_gram(_on_gram(x, factors[:RESTART]), factors[RESTART:])
    else:
        x = _direct(x, factors)
    return (x.mT if tall else x).to(matrices.dtype)


def normalise(x: Tensor) -> Tensor:
    """x / |x|_F without overflow or underflow: first an exact power of two, then the norm.

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
    """(a, b, c) of every step: from a name, one triple for all, or a list of `steps` triples."""
    if steps < 0:
        raise ValueError(f"newton_schulz: steps must not be negative, got {steps}")
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            known = " or ".join(COEFFICIENTS)
            raise ValueError(f"newton_schulz: coefficients must be {known} or numbers, got {coefficients!r}")
        return [COEFFICIENTS[coefficients]] * steps
    rows = torch.tensor(coefficients, dtype=torch.float64, device="cpu")
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
    """The dtype to normalise in: float32, or float64 for float64."""
    wide = torch.float64 in (dtype if compute_dtype is None else compute_dtype,)
    return torch.float64 if wide else torch.float32
