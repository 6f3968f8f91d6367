"""Preconditioning: scalings of the network's input and output."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from pmf.models import PRECONDITIONERS, ModelConfig

from .path import over_pixels

__all__ = [
    "EDMPreconditioner",
    "NoPreconditioner",
    "Preconditioner",
    "SCMPreconditioner",
    "preconditioner_of",
]


@runtime_checkable
class Preconditioner(Protocol):
    """input(z, t) is what the network receives; output(z, raw, t) is the prediction made from its output.

    z and raw are [B, C, H, W], t [B]. The *_tangent methods differentiate along tangents of all arguments.
    """

    def input(self, z: Tensor, t: Tensor) -> Tensor: ...

    def input_tangent(self, z: Tensor, t: Tensor, z_t: Tensor, t_t: Tensor) -> Tensor: ...

    def output(self, z: Tensor, raw: Tensor, t: Tensor) -> Tensor: ...

    def output_tangent(
        self, z: Tensor, raw: Tensor, t: Tensor, z_t: Tensor, raw_t: Tensor, t_t: Tensor
    ) -> Tensor: ...


class NoPreconditioner:
    """The network receives z, and its output is the prediction."""

    def input(self, z: Tensor, t: Tensor) -> Tensor:
        return z

    def input_tangent(self, z: Tensor, t: Tensor, z_t: Tensor, t_t: Tensor) -> Tensor:
        return z_t

    def output(self, z: Tensor, raw: Tensor, t: Tensor) -> Tensor:
        return raw

    def output_tangent(
        self, z: Tensor, raw: Tensor, t: Tensor, z_t: Tensor, raw_t: Tensor, t_t: Tensor
    ) -> Tensor:
        return raw_t


class _Coefficients(NamedTuple):
    """c_in, c_skip and c_out [B, 1, 1, 1] at times t."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor


@dataclass(frozen=True)
class EDMPreconditioner:
    """x = c_skip z + c_out net(c_in z) with EDM's three requirements, solved for z = (1 - t) x + t e.

    Let x have mean 0 and standard deviation a = sigma_data and e have b = noise_scale, independent, so that

        V(t) = Var z = a^2 (1 - t)^2 + b^2 t^2,     Cov(x, z) = a^2 (1 - t).

    1. The network's input has variance 1:           c_in   = V^(-1/2)
    2. So does its target (x - c_skip z) / c_out:    c_out^2 = Var(x - c_skip z)
    3. Its errors are amplified least (min c_out):   c_skip = Cov(x, z) / V = a^2 (1 - t) / V,
       and hence c_out^2 = a^2 - Cov(x, z)^2 / V = a^2 b^2 t^2 / V:  c_out = a b t V^(-1/2)

    At t = 0 the image is z itself, at t = 1 it is the network's output only. Source: Karras et al.,
    "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), appendix B.6.
    """

    sigma_data: float = 0.5
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sigma_data", "noise_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"preconditioner: {name} must be positive, got {getattr(self, name)}")

    def input(self, z: Tensor, t: Tensor) -> Tensor:
        return self._coefficients(t).c_in * z

    def input_tangent(self, z: Tensor, t: Tensor, z_t: Tensor, t_t: Tensor) -> Tensor:
        return self._coefficients(t).c_in * z_t + self._derivatives(t).c_in * over_pixels(t_t) * z

    def output(self, z: Tensor, raw: Tensor, t: Tensor) -> Tensor:
        c = self._coefficients(t)
        return c.c_skip * z + c.c_out * raw

    def output_tangent(
        self, z: Tensor, raw: Tensor, t: Tensor, z_t: Tensor, raw_t: Tensor, t_t: Tensor
    ) -> Tensor:
        c, d = self._coefficients(t), self._derivatives(t)
        return c.c_skip * z_t + c.c_out * raw_t + over_pixels(t_t) * (d.c_skip * z + d.c_out * raw)

    def _deviations(self) -> tuple[float, float]:
        """a and b; b < 0 flips the sign of c_out."""
        return self.sigma_data, self.noise_scale

    def _coefficients(self, t: Tensor) -> _Coefficients:
        a, b = self._deviations()
        t = over_pixels(t)
        variance = (a * (1 - t)).square() + (b * t).square()
        c_in = variance.rsqrt()
        return _Coefficients(c_in, a * a * (1 - t) / variance, a * b * t * c_in)

    def _derivatives(self, t: Tensor) -> _Coefficients:
        """Derivatives in t; V' = 2 (b^2 t - a^2 (1 - t)) and (V^(-1/2))' = -V' V^(-3/2) / 2."""
        a, b = self._deviations()
        c = self._coefficients(t)
        t = over_pixels(t)
        half_slope = (b * b * t - a * a * (1 - t)) * c.c_in.square()  # V' / (2 V)
        return _Coefficients(
            -c.c_in * half_slope,
            -((a * c.c_in).square()) - 2 * c.c_skip * half_slope,
            a * b * c.c_in - c.c_out * half_slope,
        )


@dataclass(frozen=True)
class SCMPreconditioner(EDMPreconditioner):
    """x = c_skip z + c_out net(c_in z), where the network predicts the velocity of sCM's rotation.

    Divided by its length n = ((1 - t)^2 + t^2)^(1/2), the path z = (1 - t) x + t e is a rotation from x to e,

        z / n = cos(w) x + sin(w) e,    cos(w) = (1 - t) / n,  sin(w) = t / n,

    with velocity y = d(z / n)/dw = -sin(w) x + cos(w) e. Solved for the image, for any x and e: x = cos(w) z
    / n - sin(w) y. sCM's network receives z / n and predicts y, both in units of a = sigma_data, y = a net(z
    / (n a)):

        c_in = 1 / (a n),    c_skip = (1 - t) / n^2,    c_out = -a t / n.

    These equal EDM's for noise with the data's standard deviation, b = a, except for the sign of c_out;
    noise_scale does not enter, as in sCM, whose noise has the data's scale. Source: Lu and Song,
    "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models" (2024), section 3.
    """

    def _deviations(self) -> tuple[float, float]:
        return self.sigma_data, -self.sigma_data


def preconditioner_of(config: ModelConfig, given: Preconditioner | str | None = None) -> Preconditioner:
    """The preconditioner given, an object or its name; by default the one in a model's configuration.

    By name it has the configuration's sigma_data and noise_scale.
    """
    found = config.preconditioner if given is None else given
    if found == "none":
        return NoPreconditioner()
    if isinstance(found, str) and (kind := _SCALED.get(found)) is not None:
        return kind(config.sigma_data, config.noise_scale)
    if isinstance(found, (str, type)) or not isinstance(found, Preconditioner):
        known = ", ".join(PRECONDITIONERS)
        raise ValueError(f"preconditioner must be one of {known}, or a Preconditioner, got {given!r}")
    return found


_SCALED = {"edm": EDMPreconditioner, "scm": SCMPreconditioner}
