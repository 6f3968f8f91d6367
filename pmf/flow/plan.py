"""Decide on the host, before anything runs, which samples need which network passes."""

from typing import NamedTuple

import torch
from torch import Tensor

from .draws import Draws
from .guidance import Guidance

__all__ = ["Plan", "Scalars", "make_plan"]


class Scalars(NamedTuple):
    """Numbers per sample, [B] in the internal order."""

    t: Tensor
    r: Tensor
    omega: Tensor
    t_min: Tensor
    t_max: Tensor
    effective_omega: Tensor
    """omega inside the guidance interval, else 1."""
    weight: Tensor
    """1 - 1 / effective_omega."""
    drop: Tensor
    """Whether the label is dropped, bool."""

    def to(self, device: torch.device) -> "Scalars":
        return Scalars(*(x.to(device, non_blocking=True) for x in self))


class Plan(NamedTuple):
    """The work for one batch. All rows except `order` use the internal order: MeanFlow samples first.

    Three facts save work without changing the result. Where r = t the factor (t - r) is 0, so only MeanFlow
    samples need du/dt and its direction v_c. The guidance input of a flow-matching sample (h = 0, its omega,
    the interval [0, 1], its label) equals its training input, so v_c is already available. Where the weight 1
    - 1/w' is 0 or the label was dropped, v_u has no effect.

    Row counts may be rounded up to a multiple, so that the network sees few different shapes. The padding
    does not change the result: guidance passes repeat a row and discard its output, and the tangent of a
    flow-matching sample is multiplied by (t - r) = 0.
    """

    order: Tensor
    """Internal order -> given order, int64 [B]."""
    num_meanflow: int
    """The number of samples with r < t, which come first."""
    num_tangents: int
    """The number of samples with a tangent, which come first: num_meanflow, rounded up to at most B."""
    conditional: Tensor
    """Rows whose v_c needs a separate pass: the MeanFlow samples, then rare others."""
    guided: Tensor
    """Rows whose target has a guidance term, and so need v_u."""
    repeated: Tensor
    """Rows that pad the guidance pass, after conditional and guided."""
    scalars: Scalars
    """On the host."""


def make_plan(
    draws: Draws,
    guidance: Guidance,
    dtype: torch.dtype,
    row_multiple: int = 1,
    even_passes: bool = False,
) -> Plan:
    """Plan the work for these draws; scalars are converted to dtype after all decisions are made.

    even_passes: make a guidance pass with the first row even if no row needs one.
    """
    t, r, omega, t_min, t_max, drop = (
        x.detach().cpu() for x in (draws.t, draws.r, draws.omega, draws.t_min, draws.t_max, draws.drop)
    )
    if not ((0 <= r) & (r <= t) & (t <= 1) & (omega >= 1)).all():
        raise ValueError("objective: draws must have 0 <= r <= t <= 1 and omega >= 1")
    if drop.dtype != torch.bool:
        raise ValueError(f"objective: draws.drop must be boolean, got {drop.dtype}")
    flow_matching = r == t
    order = torch.argsort(flow_matching.to(torch.uint8), stable=True)
    num_meanflow = len(t) - int(flow_matching.sum())
    effective = guidance.effective_omega(t, omega, t_min, t_max, flow_matching)
    given = [x[order].to(dtype) for x in (t, r, omega, t_min, t_max, effective)]
    scalars = Scalars._make((*given, 1 - 1 / given[-1], drop[order]))

    is_guided = (scalars.weight != 0) & ~scalars.drop
    whole_interval = (scalars.t_min == 0) & (scalars.t_max == 1)
    needs_pass = is_guided & ~whole_interval
    needs_pass[:num_meanflow] = True  # the direction of du/dt, guided or not
    conditional, guided = needs_pass.nonzero().flatten(), is_guided.nonzero().flatten()
    rows = torch.cat((conditional, guided))
    repeated = rows[:1].expand(_missing(len(rows), row_multiple))
    if even_passes and len(rows) == 0:
        repeated = torch.zeros(row_multiple, dtype=torch.int64, device=rows.device)
    num_tangents = min(num_meanflow + _missing(num_meanflow, row_multiple), len(t))
    return Plan(order, num_meanflow, num_tangents, conditional, guided, repeated, scalars)


def _missing(count: int, multiple: int) -> int:
    """The padding from count to the next multiple; 0 if count is 0."""
    return -count % multiple
