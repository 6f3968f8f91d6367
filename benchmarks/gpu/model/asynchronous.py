"""What Hopper does asynchronously: barriers in shared memory (mbarrier), and products of warpgroups (wgmma).

An mbarrier passes through phases. Here each phase is a separate gate, which opens after a fixed number of
arrivals: of warps, or of copied boxes.

A product (wgmma) belongs to a warpgroup and uses all four tensor cores at once. It can begin when the group's
four warps have issued it; products begin in that order, and mma.sync can run between two of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

Rates = dict[str, float]
NEVER = float("inf")
Gate = tuple[str, int]
"""A barrier's name, and the index of the phase."""


class Waiting(Protocol):
    """The part of a warp that is used here."""

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
        """Whether the gate is open; if not, the warp is ready when it opens."""
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
    """Whether A is in shared memory rather than in registers."""
    closes: bool
    """Whether it is the last one of its group."""

    def cycles(self, rates: Rates) -> float:
        """Tensor-core cycles: for computing, or for reading 16 rows of B and 64 of A from shared memory."""
        size = 2 * 16 * (self.columns + (64 if self.shared else 0))
        computed = max(self.columns * rates["wgmma_column_cycles"], rates["wgmma_least_cycles"])
        return max(computed, size / 128 * rates["shared_row_cycles"])


class Warpgroup:
    """A warpgroup's products in order: by how many warps each is issued, how many began, when groups end."""

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
        """Begin the products that can begin now; returns when the next one might."""
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
        """Issue the warp's index-th product; False if its queue is full and the warp must try again later."""
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
        """Whether the first `closed` groups have ended; if not, the warp must try again later."""
        if closed > len(group.ends):
            group.waiting.append(warp)
            warp.ready = NEVER
            return False
        if closed and group.ends[closed - 1] > now:
            warp.ready = group.ends[closed - 1]
            return False
        return True
