"""Which samples need which network passes, decided on the host before anything runs."""

from typing import NamedTuple

import torch
from torch import Tensor

from .draws import Draws
from .guidance import Guidance

__all__ = ["Plan", "make_plan"]


class Plan(NamedTuple):
    """Work for one batch. All rows but `order` count in the internal order: MeanFlow samples first.

    Three facts save work and change no number. Where r = t the factor (t - r) is 0, so only MeanFlow samples
    need du/dt and its direction v_c. A flow-matching sample's guidance input (h = 0, its omega, the interval
    [0, 1], its label) is its training input, so v_c is there already. Where the weight 1 - 1/w' is 0, or the
    label was dropped, v_u has no effect.

    Rows may be rounded up to a multiple, so that the network meets few different shapes. Which rows fill up
    changes no number either: guidance passes repeat a row whose result nobody reads, and a flow-matching
    sample's tangent meets the factor (t - r) = 0.
    """

    order: Tensor
    """Internal order -> given order, int64 [B]."""
    num_meanflow: int
    """The first that many samples have r < t."""
    num_tangents: int
    """The first that many samples carry a tangent: num_meanflow, rounded up to at most B."""
    conditional: Tensor
    """Rows whose v_c comes from a pass of its own: the MeanFlow samples, then rare others."""
    guided: Tensor
    """Rows whose target has a guidance term: they need v_u."""
    repeated: Tensor
    """Rows that fill up the guidance pass, behind conditional and guided."""
    scalars: dict[str, Tensor]
    """Per sample, on the host: t, r, omega, t_min, t_max, effective_omega, weight (1 - 1/w'), drop."""


def make_plan(
    draws: Draws,
    guidance: Guidance,
    dtype: torch.dtype,
    row_multiple: int = 1,
    even_passes: bool = False,
) -> Plan:
    """The plan for these draws; scalars are converted to dtype after all decisions are made.

    even_passes: a guidance pass that no row needs is made with the first, for nobody.
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
    names = ("t", "r", "omega", "t_min", "t_max", "effective_omega")
    values = (t, r, omega, t_min, t_max, effective)
    scalars = {name: value[order].to(dtype) for name, value in zip(names, values, strict=True)}
    scalars["weight"] = 1 - 1 / scalars["effective_omega"]
    scalars["drop"] = drop[order]

    is_guided = (scalars["weight"] != 0) & ~scalars["drop"]
    whole_interval = (scalars["t_min"] == 0) & (scalars["t_max"] == 1)
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
    """What count lacks to the next multiple; nothing where it is 0."""
    return -count % multiple
