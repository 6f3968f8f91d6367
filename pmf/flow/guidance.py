"""Classifier-free guidance as part of the training target."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pmf.arguments import are_numbers, check_fields, require_number
from pmf.defaults import uniform

__all__ = ["ClassifierFreeGuidance", "Guidance", "IntervalGuidance", "NoGuidance", "check_interval"]

_LARGEST = math.log(torch.finfo(torch.float32).max)


def check_interval(what: str, interval: Any) -> None:
    """Raise ValueError unless this is (t_min, t_max) with 0 <= t_min <= t_max <= 1."""
    if not are_numbers(interval) or len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"{what}: interval must be two numbers 0 <= t_min <= t_max <= 1, got {interval!r}")


@runtime_checkable
class Guidance(Protocol):
    """Draws each sample's guidance and gives its strength at a time. Tensors are [B], on the host."""

    def draw(self, flow_matching: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Draw omega, t_min, t_max."""
        ...

    def effective_omega(
        self, t: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor, flow_matching: Tensor
    ) -> Tensor:
        """w' in the target v_t + (1 - 1/w') (v_c(w') - v_u)."""
        ...


@dataclass(frozen=True)
class IntervalGuidance:
    """Scale omega in [1, max_omega] with density ~ omega^-beta, active only for t_min <= t <= t_max.

    t_min ~ U(0, 1/2), t_max ~ U(1/2, 1); flow-matching samples have the interval [0, 1] and are always
    active.
    """

    max_omega: float = 8.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_fields("guidance", self)
        require_number("guidance: max_omega", self.max_omega, at_least=1)
        if math.log(self.max_omega) * (1 - self.beta) > _LARGEST:
            raise ValueError(
                f"guidance: beta {self.beta:g} is too low: max_omega^(1 - beta) overflows float32; "
                "1 is the authors' choice, 0 is uniform"
            )

    def draw(self, flow_matching: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        batch = len(flow_matching)
        quantile, low, high = uniform(3, batch, generator=generator)
        t_min = torch.where(flow_matching, 0.0, 0.5 * low)
        t_max = torch.where(flow_matching, 1.0, 0.5 + 0.5 * high)
        return self._omega(quantile), t_min, t_max

    def _omega(self, quantile: Tensor) -> Tensor:
        """Inverse cumulative distribution function of omega^-beta on [1, max_omega]."""
        power = 1.0 - self.beta
        if abs(power) < 1e-6:
            return torch.exp(quantile * math.log(self.max_omega))
        return (1 + quantile * (self.max_omega**power - 1)) ** (1 / power)

    def effective_omega(
        self, t: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor, flow_matching: Tensor
    ) -> Tensor:
        inside = (t_min <= t) & (t <= t_max)
        return torch.where(inside | flow_matching, omega, 1.0)


class NoGuidance:
    """omega = 1 on the interval [0, 1] for every sample: the target is v_t, and v_u needs no pass."""

    def draw(self, flow_matching: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones(len(flow_matching), dtype=torch.float32, device="cpu")
        return one, torch.zeros_like(one), one.clone()

    def effective_omega(
        self, t: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor, flow_matching: Tensor
    ) -> Tensor:
        return torch.ones_like(omega)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """MeanFlow's guidance: one scale for all samples, which is not an input of the network.

        v_g = omega v_t + kappa u(z, t, t | c) + (1 - omega - kappa) u(z, t, t | null),  t in the interval

    Outside the interval v_g = v_t. The learned field is guided by omega / (1 - kappa). Source: Geng et al.,
    "Mean Flows for One-step Generative Modeling" (2025), section 4.2 and appendix B.1.
    """

    omega: float = 2.0
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        require_number("guidance: omega", self.omega, at_least=0)
        require_number("guidance: kappa", self.kappa, at_least=0, below=1)
        check_interval("guidance", self.interval)

    def draw(self, flow_matching: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones(len(flow_matching), dtype=torch.float32, device="cpu")
        return self.omega * one, self.interval[0] * one, self.interval[1] * one

    def effective_omega(
        self, t: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor, flow_matching: Tensor
    ) -> Tensor:
        return torch.where((t_min <= t) & (t <= t_max), omega, 1.0)

    def effective_kappa(self, t: Tensor, t_min: Tensor, t_max: Tensor) -> Tensor:
        return torch.where((t_min <= t) & (t <= t_max), self.kappa, 0.0)
