"""The project's targets on an H100, whether a run met them, and fractions of the device's limits.

A target is evaluated within one case, on interleaved rows. The numbers were set before anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
Verdict = tuple[str, bool | None]
"""The measured value, and whether it meets the target; None if there was nothing to compare with."""

MATH_JVP = "torch.func.jvp of torch math"
FLOOR_FACTOR, MATRIX_SHARE = 1.4, 0.6
SHORT = 276
"""Attention is memory-bound at this length, and bound by the tensor cores from 1024 on."""
NOTHING = "nothing to compare with", None


class Target(NamedTuple):
    """text: for readers. find: (our row, the others' timed rows) -> verdict."""

    text: str
    find: Callable[[Row, Sequence[Row]], Verdict]


class Rates:
    """Measured ceilings: copy in GB/s (bytes read and written), products in GFLOP/s per dtype."""

    def __init__(self) -> None:
        self.copy: float | None = None
        self.products: dict[str, float] = {}

    def learn(self, row: Row) -> None:
        if row.get("op") == "copy" and "gbyte_per_s" in row:
            self.copy = row["gbyte_per_s"]
        if row.get("op") == "gemm" and "gflop_per_s" in row:
            self.products[row["dtype"]] = row["gflop_per_s"]

    def as_dict(self) -> dict[str, Any]:
        return {"copy_gbyte_per_s": self.copy, "matrix_gflop_per_s": self.products}


def add_shares(row: Row, rates: Rates) -> None:
    """Add fractions of the measured rates, and the time for only moving the bytes."""
    if "gbyte_per_s" in row and rates.copy:
        row["share_of_copy_rate"] = row["gbyte_per_s"] / rates.copy
        row["memory_floor_ms"] = row["bytes"] / rates.copy / 1e6
    if "gflop_per_s" in row and row.get("dtype") in rates.products:
        row["share_of_matrix_rate"] = row["gflop_per_s"] / rates.products[row["dtype"]]


def judge(rows: Sequence[Row]) -> list[Row]:
    """Evaluate the targets of the case that these rows belong to: target, value, whether met."""
    ours = next((row for row in rows if row.get("ours")), None)
    if ours is None or "median_ms" not in ours:
        return []
    others = [row for row in rows if "median_ms" in row and not row["contestant"].startswith("pmf")]
    verdicts = ((target, target.find(ours, others)) for target in targets_of(ours))
    return [{"target": t.text, "found": found, "met": met} for t, (found, met) in verdicts]


def targets_of(facts: Mapping[str, Any]) -> tuple[Target, ...]:
    """The targets of a case, by its op, shape and dtype."""
    op = facts.get("op", "")
    if not op.startswith("attention"):
        return OF_OP.get(op, ())
    if facts["dtype"] != "bfloat16":
        return ()
    is_short = facts["shape"][2] == SHORT
    if op == "attention forward + JVP":
        return (NEAR_MEMORY if is_short else NEAR_PRODUCTS, TWICE_BEST, FIVE_TIMES_MATH)
    return (NOT_SLOWER,) if is_short and op in ("attention forward", "attention backward") else ()


def _faster(ours: Row, peers: Sequence[Row], factor: float) -> Verdict:
    """At least `factor` times as fast as the fastest of `peers`."""
    if not peers:
        return NOTHING
    best = min(peers, key=lambda row: row["median_ms"])
    ratio = best["median_ms"] / ours["median_ms"]
    return f"{ratio:.2f}x {best['contestant']}", ratio >= factor


def _faster_than(factor: float, start: str) -> Callable[[Row, Sequence[Row]], Verdict]:
    """Faster than the peers whose name starts with `start`, correct or not."""
    return lambda ours, others: _faster(
        ours, [row for row in others if row["contestant"].startswith(start)], factor
    )


def _faster_than_right(factor: float) -> Callable[[Row, Sequence[Row]], Verdict]:
    """Faster than the best peer with a correct result, except func.jvp of math."""
    return lambda ours, others: _faster(
        ours,
        [row for row in others if row.get("right", True) and row["contestant"] != MATH_JVP],
        factor,
    )


def _near_memory(ours: Row, others: Sequence[Row]) -> Verdict:
    if "memory_floor_ms" not in ours:
        return NOTHING
    ratio = ours["median_ms"] / ours["memory_floor_ms"]
    return f"{ratio:.2f}x", ratio <= FLOOR_FACTOR


def _near_products(ours: Row, others: Sequence[Row]) -> Verdict:
    share = ours.get("share_of_matrix_rate")
    return NOTHING if share is None else (f"{share:.0%}", share >= MATRIX_SHARE)


NEAR_MEMORY = Target(f"at most {FLOOR_FACTOR:g}x the memory floor", _near_memory)
NEAR_PRODUCTS = Target(f"at least {MATRIX_SHARE:.0%} of the matrix rate", _near_products)
TWICE_BEST = Target("2x the best correct peer", _faster_than_right(2))
FIVE_TIMES_MATH = Target("5x torch.func.jvp through math attention", _faster_than(5, MATH_JVP))
NOT_SLOWER = Target("as fast as torch's best correct backend", _faster_than_right(1))
OF_OP = {
    "training step": (Target("2x the plain port", _faster_than(2, "plain port")),),
    "sampling": (Target("3x the plain sampler", _faster_than(3, "plain sampler")),),
    "muon": (Target("2x torch.optim.Muon", _faster_than(2, "torch.optim.Muon")),),
    "newton_schulz": (
        Target("faster than gram-newton-schulz, where installed", _faster_than(1, "gram-newton-schulz")),
    ),
}
