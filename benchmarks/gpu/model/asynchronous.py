"""What Hopper does beside its warps: barriers that count in shared memory, and products of warpgroups.

A barrier of shared memory passes through phases; here each phase of each barrier is a gate of its own, that
opens when so many arrivals have come: of warps, or of copied boxes.

A product (wgmma) is a warpgroup's, on all four tensor cores at once. It may begin when the group's four warps
have issued it; products begin in that order, and mma.sync goes between two of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

Rates = dict[str, float]
NEVER = float("inf")
Gate = tuple[str, int]
"""A barrier's name, and the number of its use."""


class Waiting(Protocol):
    """A warp."""

    ready: float


class Gates:
    def __init__(self, arrivals: Mapping[str, int], latency: float):
        self.arrivals, self.latency = arrivals, latency
        self.opens: dict[Gate, float] = {}
        self._arrived: dict[Gate, tuple[int, float]] = {}
        self._waiting: dict[Gate, list[Waiting]] = {}

    def arrive(self, gate: Gate, at: float) -> None:
        count, last = self._arrived.get(gate, (0, 0.0))
        count, last = count + 1, max(last, at)
        self._arrived[gate] = count, last
        if count == self.arrivals[gate[0]]:
            self.opens[gate] = last + self.latency
            for warp in self._waiting.pop(gate, ()):
                warp.ready = last + self.latency

    def wait(self, gate: Gate, warp: Waiting, now: float) -> bool:
        """Whether it is open; if not, the warp is ready when it opens."""
        opens = self.opens.get(gate)
        if opens is None:
            self._waiting.setdefault(gate, []).append(warp)
            warp.ready = NEVER
            return False
        warp.ready = max(now, opens)
        return opens <= now


@dataclass(frozen=True)
class Product:
    columns: int
    shared: bool
    """A lies in shared memory, not in registers."""
    closes: bool
    """The last one of its group."""

    def cycles(self, rates: Rates) -> float:
        """Of the tensor cores: as they compute, or as shared memory brings 16 rows of B and 64 of A."""
        size = 2 * 16 * (self.columns + (64 if self.shared else 0))
        computed = max(self.columns * rates["wgmma_column_cycles"], rates["wgmma_least_cycles"])
        return max(computed, size / 128 * rates["shared_row_cycles"])


class Warpgroup:
    """Its products, in order: how many each warp has issued, how many have begun, when groups end."""

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.issues: list[int] = []
        self.begun = 0
        self.ends: list[float] = []
        self.waiting: list[Waiting] = []


class Products:
    def __init__(self, rates: Rates, pipes: list[dict[str, float]]):
        self.rates, self.pipes = rates, pipes
        self.between: set[int] = set()
        """Schedulers whose mma.sync waits for its tensor core."""
        self._ready: deque[tuple[Warpgroup, Product]] = deque()

    def advance(self, now: float) -> float:
        """Begins what can begin by now; says when the next one might."""
        while self._ready and not self.between:
            begin = max(pipe["hmma"] for pipe in self.pipes)
            if begin > now:
                return begin
            group, product = self._ready.popleft()
            end = max(begin, now) + product.cycles(self.rates)
            for pipe in self.pipes:
                pipe["hmma"] = end
            group.begun += 1
            if product.closes:
                group.ends.append(end + self.rates["wgmma_latency"])
            for warp in group.waiting:
                warp.ready = now
            group.waiting.clear()
        return NEVER

    def issue(self, group: Warpgroup, index: int, product: Product, warp: Waiting, now: float) -> bool:
        """The warp's index-th product; False: its queue is full, the warp tries again later."""
        if index >= group.begun + self.rates["wgmma_queue"]:
            group.waiting.append(warp)
            warp.ready = NEVER
            return False
        if index == len(group.issues):
            group.issues.append(0)
        group.issues[index] += 1
        if group.issues[index] == group.warps:
            self._ready.append((group, product))
        return True

    def wait(self, group: Warpgroup, closed: int, warp: Waiting, now: float) -> bool:
        """Whether the first `closed` groups have ended; if not, the warp tries again later."""
        if closed > len(group.ends):
            group.waiting.append(warp)
            warp.ready = NEVER
            return False
        if closed and group.ends[closed - 1] > now:
            warp.ready = group.ends[closed - 1]
            return False
        return True
