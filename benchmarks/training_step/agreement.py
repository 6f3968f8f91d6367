"""Check that both sides compute the same losses and gradients, on every case, before anything is timed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from plain_port import Sizes
from torch import Tensor

from .sides import OURS, PORT, SMALL, Batch, Side, draw_batch, make_model, make_side

FLOW_MATCHING = {"t": 0.6, "r": 0.6, "omega": 3.0, "t_min": 0.0, "t_max": 1.0, "drop": False}
MEANFLOW = {"t": 0.7, "r": 0.2, "omega": 4.0, "t_min": 0.3, "t_max": 0.9, "drop": False}
EARLY = {"t": 0.04, "r": 0.01, "t_min": 0.0}
DROPPED = {"drop": True}

Sample = dict[str, Any]
CASES: dict[str, list[Sample]] = {
    "all flow-matching": [FLOW_MATCHING, {**FLOW_MATCHING, "t": 0.9, "r": 0.9}, {**FLOW_MATCHING, **DROPPED}],
    "no flow-matching": [MEANFLOW, {**MEANFLOW, "t": 0.95}, {**MEANFLOW, "omega": 1.0}],
    "all dropped": [{**FLOW_MATCHING, **DROPPED}, {**MEANFLOW, **DROPPED}],
    "dropped MeanFlow samples": [
        FLOW_MATCHING,
        MEANFLOW,
        {**MEANFLOW, **DROPPED},
        {**MEANFLOW, "t": 0.95, **DROPPED},
    ],
    "t < 0.05": [{**FLOW_MATCHING, "t": 0.02, "r": 0.02}, {**MEANFLOW, **EARLY}, MEANFLOW],
    "batch of 1, flow-matching": [FLOW_MATCHING],
    "batch of 1, MeanFlow": [MEANFLOW],
    "everything": [
        MEANFLOW,
        FLOW_MATCHING,
        {**MEANFLOW, **DROPPED},
        {**FLOW_MATCHING, **DROPPED},
        {**MEANFLOW, **EARLY},
        {**FLOW_MATCHING, "omega": 1.0},
        {**MEANFLOW, "t": 1.0, "r": 0.0, "t_max": 1.0},
    ],
}

ROUNDINGS_A_BLOCK = 12
"""Successive results in a block that are rounded to bfloat16: two norms, projections, rotation, attention,
its projection, two MLP products, their gate, two branches, two sums."""


def limit(precision: str, depth: int) -> float:
    """Largest relative Frobenius error of a loss or gradient of one side against the other.

    float64 and float32: two orders of the same sums. bfloat16: on its way through `depth` blocks and back a
    value is rounded 2 depth ROUNDINGS_A_BLOCK times, each time independently by at most 2^-9 of itself, so
    errors add in quadrature; and both sides have errors.
    """
    if precision == "bf16":
        return 2 * (2 * depth * ROUNDINGS_A_BLOCK) ** 0.5 * 2.0**-9
    return {"fp32": 1e-4, "fp64": 1e-10}[precision]


def batches(precision: str) -> Iterator[tuple[str, Batch]]:
    """Every case of CASES on SMALL."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    for seed, (name, samples) in enumerate(CASES.items()):
        images, labels, draws = draw_batch(SMALL, len(samples), seed)
        given = {key: torch.tensor([sample[key] for sample in samples]) for key in FLOW_MATCHING}
        yield name, Batch(images, labels, draws._replace(**given)).to(dtype)


def evaluate(side: Side, batch: Batch) -> dict[str, Tensor]:
    """loss_u, loss_v, and the gradient of the loss for every weight, by name."""
    loss_u, loss_v = side.backward(batch)
    return {"loss_u": loss_u, "loss_v": loss_v, **side.gradients()}


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of everything that `evaluate` returns."""
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], truth) for name, truth in expected.items()}


def relative_error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|; infinite for NaN, and if something should be exactly zero but is not."""
    found, truth = found.double().flatten(), truth.double().flatten()
    difference = (found - truth).norm()
    if difference == 0:
        return 0.0
    error = (difference / truth.norm()).item()
    return error if error == error else float("inf")


def check(precisions: Sequence[str]) -> list[dict[str, Any]]:
    """A row per precision and case: the worst error, its name, the limit, and whether it holds."""
    rows = []
    for precision in precisions:
        model = make_model(SMALL)
        for name, batch in batches(precision):
            found, expected = (
                evaluate(make_side(side, model, SMALL, precision), batch) for side in (OURS, PORT)
            )
            rows.append(row(name, precision, SMALL, differences(found, expected)))
    return rows


def row(name: str, precision: str, sizes: Sizes, errors: dict[str, float]) -> dict[str, Any]:
    worst = max(errors, key=lambda key: errors[key])
    bound = limit(precision, sizes.depth)
    return {
        "case": name,
        "precision": precision,
        "worst": worst,
        "error": errors[worst],
        "loss_u": errors["loss_u"],
        "loss_v": errors["loss_v"],
        "limit": bound,
        "agrees": errors[worst] <= bound,
    }
