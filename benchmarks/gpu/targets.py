"""What the project set out to reach on an H100, and whether a run did; the share of what the device can do.

A target is judged within one case: rows measured in turn. The numbers were set before anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]

MATH_JVP = "torch.func.jvp of torch math"
FLOOR_FACTOR, MATRIX_SHARE = 1.4, 0.6
SHORT = 276
"""At this length attention is bound by memory, from 1024 on by the matrix units."""


class Rates:
    """The measured ceilings: copy in GB/s (bytes read and written), products in GFLOP/s for each dtype."""

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
    """Shares of the measured rates, and the time that moving the bytes alone takes."""
    if "gbyte_per_s" in row and rates.copy:
        row["share_of_copy_rate"] = row["gbyte_per_s"] / rates.copy
        row["memory_floor_ms"] = row["bytes"] / rates.copy / 1e6
    if "gflop_per_s" in row and row.get("dtype") in rates.products:
        row["share_of_matrix_rate"] = row["gflop_per_s"] / rates.products[row["dtype"]]


def judge(rows: Sequence[Row]) -> list[Row]:
    """The targets of the case that these rows are of: what was asked, what was found, whether it was met.

    "met" is None where there is nothing to compare with.
    """
    ours = next((row for row in rows if row.get("ours")), None)
    if ours is None or "median_ms" not in ours:
        return []
    peers = [row for row in rows if not row.get("ours") and "median_ms" in row]
    find = TARGETS.get(ours.get("op", ""))
    return [] if find is None else list(find(ours, peers))


def _times_faster(ours: Row, peers: Sequence[Row], factor: float, whom: str) -> Row:
    """At least `factor` times as fast as the fastest of `peers`."""
    target = f"at least {factor:g}x {whom}"
    if not peers:
        return {"target": target, "found": "nothing to compare with", "met": None}
    best = min(peers, key=lambda row: row["median_ms"])
    ratio = best["median_ms"] / ours["median_ms"]
    return {"target": target, "found": f"{ratio:.2f}x {best['contestant']}", "met": ratio >= factor}


def _right(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("right", True)]


def _forward_jvp(ours: Row, peers: Sequence[Row]) -> Iterator[Row]:
    if ours["dtype"] != "bfloat16":
        return
    if ours["shape"][2] == SHORT:
        if "memory_floor_ms" in ours:
            ratio = ours["median_ms"] / ours["memory_floor_ms"]
            target = f"at most {FLOOR_FACTOR:g}x the memory floor"
            yield {"target": target, "found": f"{ratio:.2f}x", "met": ratio <= FLOOR_FACTOR}
    elif "share_of_matrix_rate" in ours:
        share = ours["share_of_matrix_rate"]
        target = f"at least {MATRIX_SHARE:.0%} of the matrix rate"
        yield {"target": target, "found": f"{share:.0%}", "met": share >= MATRIX_SHARE}
    math = [row for row in peers if row["contestant"] == MATH_JVP]
    others = [row for row in _right(peers) if row["contestant"] != MATH_JVP]
    yield _times_faster(ours, others, 2, "best right peer")
    yield _times_faster(ours, math, 5, MATH_JVP)


def _not_slower(ours: Row, peers: Sequence[Row]) -> Iterator[Row]:
    if ours["dtype"] == "bfloat16" and ours["shape"][2] == SHORT:
        yield _times_faster(ours, _right(peers), 1, "best torch backend")


def _factor(factor: float, whom: str) -> Callable[[Row, Sequence[Row]], Iterator[Row]]:
    def find(ours: Row, peers: Sequence[Row]) -> Iterator[Row]:
        others = [row for row in peers if not row["contestant"].startswith("pmf")]
        yield _times_faster(ours, others, factor, whom)

    return find


def _newton_schulz(ours: Row, peers: Sequence[Row]) -> Iterator[Row]:
    gram = [row for row in peers if row["contestant"] == "gram-newton-schulz"]
    if gram:
        yield _times_faster(ours, gram, 1, "gram-newton-schulz")


TARGETS: dict[str, Callable[[Row, Sequence[Row]], Iterator[Row]]] = {
    "attention forward": _not_slower,
    "attention backward": _not_slower,
    "attention forward + JVP": _forward_jvp,
    "training step": _factor(2, "plain port"),
    "sampling": _factor(3, "plain sampler"),
    "muon": _factor(2, "torch.optim.Muon"),
    "newton_schulz": _newton_schulz,
}
