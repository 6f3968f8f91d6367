"""Distributions of the training times (t, r)."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pmf.arguments import check_fields, require_number
from pmf.defaults import normal, uniform

__all__ = ["LineTimes", "PlaneTimes", "TimeSampling"]


@runtime_checkable
class TimeSampling(Protocol):
    """Draws times t >= r, each [batch] on the CPU in float32; r = t makes a flow-matching sample."""

    def draw(self, batch: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class PlaneTimes:
    """Logit-normal t and r, sigmoid(std n + mean), over 0 <= r <= t <= 1; the first samples have r = t.

    A fraction uniform_fraction of the pairs is uniform on the unit square instead (the authors' tr_uniform,
    0.1 for H models). data_proportion is the fraction of flow-matching samples.
    """

    mean: float = 0.8
    std: float = 0.8
    data_proportion: float = 0.5
    uniform_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_fields("times", self)
        require_number("times: std", self.std, at_least=0)
        require_number("times: data_proportion", self.data_proportion, at_least=0, at_most=1)
        require_number("times: uniform_fraction", self.uniform_fraction, at_least=0, at_most=1)

    def draw(self, batch: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        pairs = torch.sigmoid(self.std * normal(2, batch, generator=generator) + self.mean)
        if self.uniform_fraction > 0:
            square = uniform(2, batch, generator=generator)
            pairs = torch.where(uniform(batch, generator=generator) < self.uniform_fraction, square, pairs)
        t, r = pairs
        flow_matching = torch.arange(batch, device="cpu") < int(batch * self.data_proportion)
        r = torch.where(flow_matching, t, r)
        return torch.maximum(t, r), torch.minimum(t, r)


@dataclass(frozen=True)
class LineTimes:
    """t as in the plane, and r on one edge only: "r=t" (flow matching) or "r=0" (one step to x)."""

    plane: PlaneTimes = field(default_factory=PlaneTimes)
    line: str = "r=t"

    def __post_init__(self) -> None:
        check_fields("times", self)
        if self.line not in ("r=t", "r=0"):
            raise ValueError(f"times: line must be 'r=t' or 'r=0', got {self.line!r}")

    def draw(self, batch: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        t, _ = self.plane.draw(batch, generator)
        return t, t.clone() if self.line == "r=t" else torch.zeros_like(t)
