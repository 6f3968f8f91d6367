"""What the warps of the Hopper kernels do (csrc/cuda/attention/hopper_forward.cuh): two warpgroups compute,
three warps copy for them, and barriers synchronise them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

from . import paths
from .machine import Multiprocessor, Rates, Signal, Trace
from .problems import Launch, Problem, UnexpectedCodeError
from .sass import Kernel

ROWS, CONSUMERS, GROUP_WARPS = 64, 2, 4
"""Queries of a row block, warpgroups that compute, warps of each."""
SEEDS = 2
ITEMS = 8
"""Work items to simulate; the first two are not counted. The consumers' shares alternate between items."""


def takes(kernel: str) -> bool:
    return "hopper_forward_kernel" in kernel


@dataclass(frozen=True)
class Work:
    """How a launch divides the problem, as hopper_forward.cu does."""

    keys: int
    slots: int
    tiles: int
    row_blocks: int
    rounds: int
    """Row blocks of each consumer in an item."""
    parts: int
    """Items per head."""

    @classmethod
    def of(cls, launch: Launch, problem: Problem, processors: int) -> Work:
        sizes = re.search(r"HopperSizes<\w+, (\d+), (\d+), (\d+), ", launch.kernel)
        if sizes is None:
            raise UnexpectedCodeError(f"{launch.kernel}: no sizes of tiles in its name")
        keys, slots = int(sizes[2]), int(sizes[3])
        tiles, row_blocks = ceil(problem.tokens / keys), ceil(problem.tokens / ROWS)
        stays = tiles <= slots and problem.heads >= 2 * processors
        rounds = ceil(row_blocks / CONSUMERS) if stays else 1
        return cls(keys, slots, tiles, row_blocks, rounds, ceil(row_blocks / (CONSUMERS * rounds)))

    def shares(self, item: int) -> list[int]:
        """Row blocks of each consumer in a block's item."""
        left = self.row_blocks - (item % self.parts) * CONSUMERS * self.rounds
        counts = [(left - (c + item) % CONSUMERS + 1) // CONSUMERS for c in range(CONSUMERS)]
        return [min(count, self.rounds) for count in counts]


class Parts:
    """The kernel's parts, each as the path that a warp takes through it."""

    def __init__(self, kernel: Kernel, name: str):
        self.kernel, self.name = kernel, name
        tile, row_block, item = self._nest("wgmma")
        keys, keys_item = self._nest("box", lambda body: kernel.count(body, "arrive") == 2)
        queries, queries_item = self._nest("box", lambda body: kernel.count(body, "arrive") == 1)
        loops = kernel.loops
        self.start = self._way(0, {item}, None)
        self.item = self._way(item, {row_block}, loops[item])
        self.first = self._way(row_block, {tile}, loops[row_block])
        self.tile = self._way(tile, {tile}, loops[tile])
        self.last_tile = self._way(tile, {tile}, loops[tile], hiding=True)
        self.row_block_end = self._way(paths.exit_of(kernel, tile), {row_block}, loops[row_block])
        self.keys_start = self._way(0, {keys_item}, None)
        self.keys_item = self._way(keys_item, {keys}, loops[keys_item])
        self.keys_tile = self._way(keys, {keys}, loops[keys])
        self.queries_start = self._way(0, {queries_item}, None)
        self.queries_item = self._way(queries_item, {queries}, loops[queries_item])
        self.queries_row_block = self._way(queries, {queries}, loops[queries])

    def _nest(self, kind: str, which: Callable[[set[int]], bool] = lambda body: True) -> list[int]:
        """The innermost loop with such instructions and the loops around it, from the inside out."""
        kernel = self.kernel
        able = {head: body for head, body in kernel.loops.items() if kernel.count(body, kind)}
        inner = [h for h in able if not any(o != h and o in able[h] for o in able) and which(able[h])]
        if len(inner) != 1:
            raise UnexpectedCodeError(f"{self.name}: {len(inner)} innermost loops with {kind}, not one")
        return sorted((h for h in able if inner[0] in able[h]), key=lambda h: len(able[h]))

    def _way(self, start: int, ends: set[int], within: set[int] | None, hiding: bool = False) -> Trace:
        inside = range(len(self.kernel.blocks)) if within is None else within
        path = paths.hottest(self.kernel, start, ends, inside, True, hiding)
        return Trace([each for block in path for each in self.kernel.blocks[block]])

    def about(self, trace: Trace, expected: str, signals: list[Signal | None]) -> Trace:
        """The trace with its signals; `expected`: the instructions that they belong to, in order."""
        kinds = {"await": "w", "arrive": "a", "box": "b"}
        found = "".join(kinds[kind] for kind, *_ in trace.code if kind in kinds)
        if found != expected:
            raise UnexpectedCodeError(f"{self.name}: barriers and copies are {found!r}, not {expected!r}")
        return trace.signalling(signals)


def boxes(trace: Trace) -> int:
    return sum(kind == "box" for kind, *_ in trace.code)


def programs(
    parts: Parts, work: Work, problem: Problem, rates: Rates, share: float
) -> tuple[list[list[Trace]], dict[str, int]]:
    """What each warp does, and the arrivals per phase of each barrier. `share`: of the memory rate."""
    a_byte = rates["clock_hz"] / (rates["memory_bytes"] * share)
    from_l2 = rates["clock_hz"] * rates["processors"] / rates["l2_bytes"]
    sides = 2 if problem.tangent else 1

    def row_cycles(first: int, rows: int, readers: int, instructions: int) -> float:
        """Cycles of a box. Data that one of several readers has read is in the L2 cache for the others."""
        size = max(0, min(rows, problem.tokens - first)) * problem.width * 2 * sides / instructions
        return size * max(a_byte / readers, from_l2)

    per_tile, per_row_block = boxes(parts.keys_tile) // 2, boxes(parts.queries_row_block)
    arrivals = {"keys": per_tile, "values": per_tile}
    arrivals |= {f"{name} read": CONSUMERS * GROUP_WARPS for name in ("keys", "values")}
    for c in range(CONSUMERS):
        arrivals |= {f"queries {c}": per_row_block, f"queries {c} read": GROUP_WARPS}

    def copy_keys() -> Iterator[Trace]:
        yield parts.keys_start
        for item in range(ITEMS):
            yield parts.keys_item
            for j in range(work.tiles):
                number = item * work.tiles + j
                cycles = row_cycles(j * work.keys, work.keys, work.parts, per_tile)
                signals: list[Signal | None] = []
                for name in ("keys", "values"):
                    before = number - work.slots
                    signals += [Signal((f"{name} read", before)) if before >= 0 else None, None]
                    signals += [Signal((name, number), cycles)] * per_tile
                yield parts.about(parts.keys_tile, ("wa" + "b" * per_tile) * 2, signals)

    def copy_queries(c: int) -> Iterator[Trace]:
        yield parts.queries_start
        number = 0
        for item in range(ITEMS):
            yield parts.queries_item
            for r in range(work.shares(item)[c]):
                row_block = (item % work.parts * work.rounds + r) * CONSUMERS + (c + item) % CONSUMERS
                empty = Signal((f"queries {c} read", number - 1)) if number else None
                box = Signal((f"queries {c}", number), row_cycles(row_block * ROWS, ROWS, 1, per_row_block))
                signals = [empty, None, *[box] * per_row_block]
                yield parts.about(parts.queries_row_block, "wa" + "b" * per_row_block, signals)
                number += 1

    def consume(c: int) -> Iterator[Trace]:
        yield parts.start
        number = 0
        for item in range(ITEMS):
            yield parts.item
            share = work.shares(item)[c]
            if share == 0:
                raise UnexpectedCodeError(f"{parts.name}: consumers without work are not modelled")
            first, end = item * work.tiles, (item + 1) * work.tiles
            for r in range(share):
                last = r + 1 == share

                def read(name: str, tile: int, last: bool = last) -> Signal | None:
                    return Signal((f"{name} read", tile)) if last else None

                queries, queries_read = (Signal((f"queries {c}{what}", number)) for what in ("", " read"))
                yield parts.about(parts.first, "wwa", [queries, Signal(("keys", first)), read("keys", first)])
                for j in range(first + 1, end):
                    signals = [Signal(("keys", j)), Signal(("values", j - 1))]
                    signals_read = [read("keys", j), read("values", j - 1)]
                    trace = parts.last_tile if j + 1 == end else parts.tile
                    yield parts.about(trace, "wwaa", [*signals, *signals_read])
                signals = [queries_read, Signal(("values", end - 1))]
                yield parts.about(parts.row_block_end, "awa", [*signals, read("values", end - 1)])
                number += 1

    warps = [list(copy_keys()), *(list(copy_queries(c)) for c in range(CONSUMERS)), []]
    for c in range(CONSUMERS):
        warps += [list(consume(c))] * GROUP_WARPS
    return warps, arrivals


def predict(kernel: Kernel, launch: Launch, problem: Problem, rates: Rates) -> float:
    """Seconds of one launch: those of the block with the most items."""
    processors = int(rates["processors"])
    work, parts = Work.of(launch, problem, processors), Parts(kernel, launch.kernel)
    rounds, rest = divmod(problem.heads * work.parts, processors)

    def times(share: float) -> tuple[float, float]:
        """Cycles to the end of the simulated items, and per item."""
        traces, arrivals = programs(parts, work, problem, rates, share)
        stored = problem.tokens / (work.row_blocks * ROWS)  # the fraction of the stored rows that exist
        to_memory = rates["memory_bytes"] * share / rates["clock_hz"] / stored
        end = each = 0.0
        for seed in range(SEEDS):
            machine = Multiprocessor(traces, 1, 1, rates, to_memory, arrivals)
            end += machine.ends(seed)[-1] / SEEDS
            begin, last = (machine.gates.opens["values read", n * work.tiles - 1] for n in (2, ITEMS))
            each += (last - begin) / (ITEMS - 2) / SEEDS
        return end, each

    end, each = times(1 / processors)
    cycles = end + (rounds - ITEMS) * each
    if rest:  # fewer blocks share the memory rate in the last items
        cycles += times(1 / rest)[1]
    return cycles / rates["clock_hz"]
