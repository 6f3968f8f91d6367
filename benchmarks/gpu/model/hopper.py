"""What the warps of the Hopper kernels do (csrc/cuda/attention/hopper_forward.cuh): two or three warpgroups
compute, other warps copy keys, values and queries for them, and barriers synchronise them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

from . import paths
from .asynchronous import Gate
from .machine import Multiprocessor, Rates, Signal, Trace
from .problems import Launch, Problem, UnexpectedCodeError
from .sass import Kernel

ROWS, GROUP_WARPS = 64, 4
"""Queries of a row block; warps of a warpgroup."""
SEEDS = 2
ITEMS = 9
"""Work items to simulate; the first three are not counted. Consumers' shares repeat after two or three."""


def takes(kernel: str) -> bool:
    return "hopper_forward_kernel" in kernel


@dataclass(frozen=True)
class Work:
    """How a launch divides the problem, as hopper_forward.cu does."""

    consumers: int
    """Warpgroups that compute."""
    keys: int
    """Per tile."""
    slots: int
    tiles: int
    row_blocks: int
    parts: int
    """Items per head; 1 if a head is an item of its own."""

    @classmethod
    def of(cls, launch: Launch, problem: Problem, processors: int) -> Work:
        sizes = re.search(r"HopperSizes<\w+, (\d+), (\d+), (\d+), ", launch.kernel)
        if sizes is None:
            raise UnexpectedCodeError(f"{launch.kernel}: no sizes of tiles in its name")
        keys, slots, consumers = int(sizes[2]), int(sizes[3]), launch.warps // GROUP_WARPS - 1
        tiles, row_blocks = ceil(problem.tokens / keys), ceil(problem.tokens / ROWS)
        stays = tiles <= slots and problem.heads >= 2 * processors
        return cls(consumers, keys, slots, tiles, row_blocks, 1 if stays else ceil(row_blocks / consumers))

    def shares(self, item: int) -> list[range]:
        """Row blocks of each consumer in a block's item. A head's last part is taken to be like others."""
        each = self.row_blocks if self.parts == 1 else self.consumers
        first = item % (self.row_blocks // each) * each if each <= self.row_blocks else 0
        own = range(first, min(first + each, self.row_blocks))
        return [own[(c + item) % self.consumers :: self.consumers] for c in range(self.consumers)]


class Parts:
    """The kernel's parts, each as the path that a warp takes through it."""

    def __init__(self, kernel: Kernel, name: str, hidden: int = 0):
        """`hidden`: groups of eight keys in the last tile that lie past the end; each has a basic block."""
        self.kernel, self.name = kernel, name
        tile, row_block, item = self._nest("wgmma")
        keys, keys_item = self._nest("box", lambda body: kernel.count(body, "arrive") == 2)
        queries, queries_item = self._nest("box", lambda body: kernel.count(body, "arrive") == 1)
        loops = kernel.loops
        self.start = self._way(0, {item}, None)
        self.item = self._way(item, {row_block}, loops[item])
        self.first = self._way(row_block, {tile}, loops[row_block])
        self.tile = self._way(tile, {tile}, loops[tile])
        hiding = [block for block in sorted(loops[tile]) if paths.hides(kernel.blocks[block])]
        shown = loops[tile] - set(hiding[hidden:])
        self.last_tile = self._way(tile, {tile}, shown, hiding=True)
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
        if (found := signalling(trace)) != expected:
            raise UnexpectedCodeError(f"{self.name}: barriers and copies are {found!r}, not {expected!r}")
        return trace.signalling(signals)


def signalling(trace: Trace) -> str:
    """Its instructions with signals, in order: w waits, a arrives, b copies a box."""
    kinds = {"await": "w", "arrive": "a", "box": "b"}
    return "".join(kinds[kind] for kind, *_ in trace.code if kind in kinds)


def programs(
    parts: Parts, work: Work, problem: Problem, rates: Rates, share: float
) -> tuple[list[list[Trace]], dict[str, int]]:
    """What each warp does, and the arrivals per phase of each barrier. `share`: of the memory rate."""
    a_byte = rates["clock_hz"] / (rates["memory_bytes"] * share)
    a_byte_from_l2 = rates["clock_hz"] * rates["processors"] / rates["l2_bytes"]
    sides = 2 if problem.tangent else 1

    def box(gate: Gate, first: int, rows: int, readers: int) -> Signal:
        """Data that one of several readers has read is in the L2 cache for the others."""
        size = max(0, min(rows, problem.tokens - first)) * problem.width * 2 * sides / arrivals[gate[0]]
        return Signal(gate, size * a_byte_from_l2, size * a_byte / readers)

    def copied(gate: Gate, before: int, first: int, rows: int, readers: int) -> list[Signal | None]:
        """Of a copying warp: it waits for the empty slot, announces the copies and issues them."""
        empty = Signal((f"{gate[0]} read", before)) if before >= 0 else None
        return [empty, None, *[box(gate, first, rows, readers)] * arrivals[gate[0]]]

    per_tile, per_row_block = (
        signalling(trace).count("b") for trace in (parts.keys_tile, parts.queries_row_block)
    )
    per_tile //= 2
    arrivals = {"keys": per_tile, "values": per_tile}
    arrivals |= {f"{name} read": work.consumers * GROUP_WARPS for name in ("keys", "values")}
    for c in range(work.consumers):
        arrivals |= {f"queries {c}": per_row_block, f"queries {c} read": GROUP_WARPS}

    def copy_keys() -> Iterator[Trace]:
        yield parts.keys_start
        for item in range(ITEMS):
            yield parts.keys_item
            for j in range(work.tiles):
                number = item * work.tiles + j
                signals = [
                    signal
                    for name in ("keys", "values")
                    for signal in copied(
                        (name, number), number - work.slots, j * work.keys, work.keys, work.parts
                    )
                ]
                yield parts.about(parts.keys_tile, ("wa" + "b" * per_tile) * 2, signals)

    def copy_queries(c: int) -> Iterator[Trace]:
        yield parts.queries_start
        number = 0
        for item in range(ITEMS):
            yield parts.queries_item
            for row_block in work.shares(item)[c]:
                signals = copied((f"queries {c}", number), number - 1, row_block * ROWS, ROWS, 1)
                yield parts.about(parts.queries_row_block, "wa" + "b" * per_row_block, signals)
                number += 1

    def consume(c: int) -> Iterator[Trace]:
        yield parts.start
        number = 0
        for item in range(ITEMS):
            yield parts.item
            share = work.shares(item)[c]
            if not share:
                raise UnexpectedCodeError(f"{parts.name}: consumers without work are not modelled")
            first, end = item * work.tiles, (item + 1) * work.tiles
            for row_block in share:

                def read(name: str, tile: int, last: bool = row_block == share[-1]) -> Signal | None:
                    return Signal((f"{name} read", tile)) if last else None

                queries, queries_read = (Signal((f"queries {c}{what}", number)) for what in ("", " read"))
                signals = [queries, Signal(("keys", first)), read("keys", first)]
                yield parts.about(parts.first, "wwa", signals)
                for j in range(first + 1, end):
                    signals = [Signal(("keys", j)), Signal(("values", j - 1)), read("keys", j)]
                    if j + 1 < end:
                        yield parts.about(parts.tile, "wwaa", [*signals, read("values", j - 1)])
                    else:
                        signals += [queries_read, read("values", j - 1)]
                        yield parts.about(parts.last_tile, "wwaaa", signals)
                j = end - 1
                yield parts.about(parts.row_block_end, "wa", [Signal(("values", j)), read("values", j)])
                number += 1

    warps = [list(copy_keys()), *(list(copy_queries(c)) for c in range(work.consumers)), []]
    for c in range(work.consumers):
        warps += [list(consume(c))] * GROUP_WARPS
    return warps, arrivals


def predict(kernel: Kernel, launch: Launch, problem: Problem, rates: Rates) -> float:
    """Seconds of one launch: those of the block with the most items."""
    processors = int(rates["processors"])
    work = Work.of(launch, problem, processors)
    rounds, rest = divmod(problem.heads * work.parts, processors)
    parts = Parts(kernel, launch.kernel, (work.tiles * work.keys - problem.tokens + 7) // 8)
    # The fraction of the stored rows that exist.
    stored = problem.tokens / (work.row_blocks * ROWS)

    def times(blocks: int) -> tuple[float, float]:
        """Cycles to the end of the simulated items, and per item, if so many blocks share the memory rate."""
        traces, arrivals = programs(parts, work, problem, rates, 1 / blocks)
        memory = rates["memory_bytes"] / blocks / rates["clock_hz"]
        end = each = 0.0
        for seed in range(SEEDS):
            machine = Multiprocessor(
                traces, 1, 1, rates, memory / stored, arrivals, rates["ahead_bytes"] / memory
            )
            end += machine.ends(seed)[-1] / SEEDS
            begin, last = (machine.gates.opens["values read", n * work.tiles - 1] for n in (3, ITEMS))
            each += (last - begin) / (ITEMS - 3) / SEEDS
        return end, each

    end, each = times(processors)
    cycles = end + (rounds - ITEMS) * each
    if rest:  # fewer blocks share the memory rate in the last items
        cycles += times(rest)[1]
    return cycles / rates["clock_hz"]
