"""What the warps of the Hopper kernels do (csrc/cuda/attention/hopper_{forward,backward}.cuh): two or three
warpgroups compute, other warps copy rows and tiles for them, and barriers synchronise them.
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
"""Rows of a row block; warps of a warpgroup."""
SEEDS = 2
ITEMS = 9
"""Work items to simulate; the first three are not counted. Consumers' shares repeat after two or three."""


def takes(kernel: str) -> bool:
    return re.search("hopper_(forward|backward)_kernel", kernel) is not None


@dataclass(frozen=True)
class Work:
    """How a launch divides the problem, as hopper_launch.cuh does."""

    consumers: int
    """Warpgroups that compute."""
    columns: int
    """Of a tile: keys, or the queries that a backward's keys meet."""
    slots: int
    statistics: bool
    """Whether the tiles are queries, which come with their row statistics."""
    tiles: int
    row_blocks: int
    parts: int
    """Items per head; 1 if a head is an item of its own."""

    @classmethod
    def of(cls, launch: Launch, problem: Problem, processors: int) -> Work:
        sizes = re.search(r"Sizes<\w+, (\d+), (\d+), (\d+), (true|false)", launch.kernel)
        if sizes is None:
            raise UnexpectedCodeError(f"{launch.kernel}: no sizes of tiles in its name")
        columns, slots, consumers = int(sizes[2]), int(sizes[3]), launch.warps // GROUP_WARPS - 1
        tiles, row_blocks = ceil(problem.tokens / columns), ceil(problem.tokens / ROWS)
        stays = tiles <= slots and problem.heads >= 2 * processors
        parts = 1 if stays else ceil(row_blocks / consumers)
        by_keys = problem.backward and sizes[4] == "true"
        return cls(consumers, columns, slots, by_keys, tiles, row_blocks, parts)

    def shares(self, item: int) -> list[range]:
        """Row blocks of each consumer in a block's item. A head's last part is taken to be like others."""
        each = self.row_blocks if self.parts == 1 else self.consumers
        first = item % (self.row_blocks // each) * each if each <= self.row_blocks else 0
        own = range(first, min(first + each, self.row_blocks))
        return [own[(c + item) % self.consumers :: self.consumers] for c in range(self.consumers)]


class Parts:
    """The kernel's parts, each as the path that a warp takes through it."""

    def __init__(self, kernel: Kernel, name: str, work: Work, problem: Problem):
        self.kernel, self.name = kernel, name
        tile, row_block, item = self._nest("wgmma")
        loops = kernel.loops
        self.start = self._way(0, {item}, None)
        self.item = self._way(item, {row_block}, loops[item])
        self.first = self._way(row_block, {tile}, loops[row_block])
        self.tile = self._way(tile, {tile}, loops[tile])
        # Groups of eight keys in the last tile that lie past the end: each has a basic block.
        hidden = (work.tiles * work.columns - problem.tokens + 7) // 8
        hiding = [block for block in sorted(loops[tile]) if paths.hides(kernel.blocks[block])]
        shown = loops[tile] - set(hiding[hidden:])
        self.last_tile = self._way(tile, {tile}, shown, hiding=True)
        self.row_block_end = self._way(paths.exit_of(kernel, tile), {row_block}, loops[row_block])
        row_bytes = 2 * problem.width * sides(problem)
        self.tile_copy = self._copy(self._nest("box", self._announces(work.columns * row_bytes)))
        self.rows_copy = self._copy(self._nest("box", self._announces(ROWS * row_bytes)))
        if work.statistics:
            self.statistics_copy = self._copy(self._nest("copy"))

    def _nest(self, kind: str, which: Callable[[set[int]], bool] = lambda body: True) -> list[int]:
        """The innermost loop with such instructions and the loops around it, from the inside out."""
        kernel = self.kernel
        able = {head: body for head, body in kernel.loops.items() if kernel.count(body, kind)}
        inner = [h for h in able if not any(o != h and o in able[h] for o in able)]
        nests = [sorted((h for h in able if i in able[h]), key=lambda h: len(able[h])) for i in inner]
        nests = [nest for nest in nests if which(able[nest[-1]])]
        if len(nests) != 1:
            raise UnexpectedCodeError(f"{self.name}: {len(nests)} innermost loops with {kind}, not one")
        return nests[0]

    def _announces(self, size: int) -> Callable[[set[int]], bool]:
        """Whether the constant is there that announces so many bytes to an mbarrier."""
        constant = re.compile(rf"MOV\S* R\d+, (RZ, RZ, )?{size:#x}$")
        return lambda body: any(constant.search(each.text) for b in body for each in self.kernel.blocks[b])

    def _copy(self, nest: list[int]) -> tuple[Trace, Trace, Trace]:
        """Of a copying warp: before all items, of an item before its copies, of a copy."""
        copy, item = nest
        loops = self.kernel.loops
        return (
            self._way(0, {item}, None),
            self._way(item, {copy}, loops[item]),
            self._way(copy, {copy}, loops[copy], copying=True),
        )

    def _way(
        self,
        start: int,
        ends: set[int],
        within: set[int] | None,
        copying: bool = False,
        hiding: bool = False,
    ) -> Trace:
        inside = range(len(self.kernel.blocks)) if within is None else within
        path = paths.hottest(self.kernel, start, ends, inside, copying, hiding, elements=True)
        return Trace([each for block in path for each in self.kernel.blocks[block]])

    def about(self, trace: Trace, expected: str, signals: list[Signal | None]) -> Trace:
        """The trace with its signals; `expected`: the instructions that they belong to, in order."""
        if (found := signalling(trace)) != expected:
            raise UnexpectedCodeError(f"{self.name}: barriers and copies are {found!r}, not {expected!r}")
        return trace.signalling(signals)


def sides(problem: Problem) -> int:
    """Tensors in a copy: with their tangents, or queries with their gradients and keys with values."""
    return 2 if problem.tangent or problem.backward else 1


def signalling(trace: Trace) -> str:
    """Its instructions with signals, in order: w waits, a arrives, b copies a box."""
    kinds = {"await": "w", "arrive": "a", "box": "b"}
    return "".join(kinds[kind] for kind, *_ in trace.code if kind in kinds)


class Programs:
    """What each warp does."""

    streams: tuple[str, ...]
    """What is copied for each tile, in this order; released one after the other."""

    def __init__(self, parts: Parts, work: Work, problem: Problem, rates: Rates, share: float):
        """`share`: of the memory rate."""
        self.parts, self.work, self.problem = parts, work, problem
        self.a_byte = rates["clock_hz"] / (rates["memory_bytes"] * share)
        self.a_byte_from_l2 = rates["clock_hz"] * rates["processors"] / rates["l2_bytes"]
        self.tile_boxes = signalling(parts.tile_copy[-1]).count("b") // len(self.streams)
        self.row_boxes = signalling(parts.rows_copy[-1]).count("b")

    def arrivals(self) -> dict[str, int]:
        """Per phase of each barrier."""
        arrivals = {}
        for name in self.streams:
            arrivals[name] = self.tile_boxes + self.work.statistics
            arrivals[f"{name} read"] = self.work.consumers * GROUP_WARPS
        for c in range(self.work.consumers):
            arrivals |= {f"rows {c}": self.row_boxes, f"rows {c} read": GROUP_WARPS}
        return arrivals

    def warps(self) -> list[list[Trace]]:
        consumers = range(self.work.consumers)
        copying = [self.copy_tiles(), *(self.copy_rows(c) for c in consumers)]
        if self.work.statistics:
            copying.append(self.copy_statistics())
        warps = list(map(list, copying))
        for c in consumers:
            warps += [list(self.consume(c))] * GROUP_WARPS
        return warps

    def _copied(self, gate: Gate, before: int, first: int, rows: int, boxes: int) -> list[Signal | None]:
        """Of a copying warp: it waits for the empty slot, announces the boxes and issues them. Data that one
        of several readers has read is in the L2 cache for the others."""
        readers = 1 if gate[0].startswith("rows") else self.work.parts
        size = max(0, min(rows, self.problem.tokens - first)) * self.problem.width * 2 * sides(self.problem)
        box = Signal(gate, size / boxes * self.a_byte_from_l2, size / boxes * self.a_byte / readers)
        return [self._emptied(gate[0], before), None, *[box] * boxes]

    def _emptied(self, name: str, before: int) -> Signal | None:
        return Signal((f"{name} read", before)) if before >= 0 else None

    def copy_tiles(self) -> Iterator[Trace]:
        work, (start, item_start, copy) = self.work, self.parts.tile_copy
        yield start
        for item in range(ITEMS):
            yield item_start
            for j in range(work.tiles):
                number = item * work.tiles + j
                signals: list[Signal | None] = []
                for name in self.streams:
                    signals += self._copied(
                        (name, number), number - work.slots, j * work.columns, work.columns, self.tile_boxes
                    )
                yield self.parts.about(copy, ("wa" + "b" * self.tile_boxes) * len(self.streams), signals)

    def copy_statistics(self) -> Iterator[Trace]:
        work, (start, item_start, copy) = self.work, self.parts.statistics_copy
        (name,) = self.streams
        yield start
        for item in range(ITEMS):
            yield item_start
            for number in range(item * work.tiles, (item + 1) * work.tiles):
                signals = [self._emptied(name, number - work.slots), Signal((name, number))]
                yield self.parts.about(copy, "wa", signals)

    def copy_rows(self, c: int) -> Iterator[Trace]:
        start, item_start, copy = self.parts.rows_copy
        yield start
        number = 0
        for item in range(ITEMS):
            yield item_start
            for row_block in self.work.shares(item)[c]:
                gate = f"rows {c}", number
                signals = self._copied(gate, number - 1, row_block * ROWS, ROWS, self.row_boxes)
                yield self.parts.about(copy, "wa" + "b" * self.row_boxes, signals)
                number += 1

    def consume(self, c: int) -> Iterator[Trace]:
        yield self.parts.start
        number = 0
        for item in range(ITEMS):
            yield self.parts.item
            share = self.work.shares(item)[c]
            if not share:
                raise UnexpectedCodeError(f"{self.parts.name}: consumers without work are not modelled")
            tiles = range(item * self.work.tiles, (item + 1) * self.work.tiles)
            for row_block in share:
                rows, rows_read = (Signal((f"rows {c}{what}", number)) for what in ("", " read"))
                yield from self.row_block(tiles, rows, rows_read, row_block == share[-1])
                number += 1

    def row_block(self, tiles: range, rows: Signal, rows_read: Signal, last: bool) -> Iterator[Trace]:
        """`last`: whether the tiles are not needed again."""
        raise NotImplementedError


def full(name: str, tile: int) -> Signal:
    return Signal((name, tile))


def read(name: str, tile: int, last: bool) -> Signal | None:
    return Signal((f"{name} read", tile)) if last else None


class Forward(Programs):
    streams = "keys", "values"

    def row_block(self, tiles: range, rows: Signal, rows_read: Signal, last: bool) -> Iterator[Trace]:
        parts, first, end = self.parts, tiles[0], tiles[-1]
        yield parts.about(parts.first, "wwa", [rows, full("keys", first), read("keys", first, last)])
        for j in tiles[1:]:
            before = [full("keys", j), full("values", j - 1), read("keys", j, last)]
            if j < end:
                yield parts.about(parts.tile, "wwaa", [*before, read("values", j - 1, last)])
            else:
                signals = [*before, rows_read, read("values", j - 1, last)]
                yield parts.about(parts.last_tile, "wwaaa", signals)
        yield parts.about(parts.row_block_end, "wa", [full("values", end), read("values", end, last)])


class Backward(Programs):
    streams = ("tiles",)

    def row_block(self, tiles: range, rows: Signal, rows_read: Signal, last: bool) -> Iterator[Trace]:
        parts, first, end = self.parts, tiles[0], tiles[-1]
        yield parts.about(parts.first, "wwa", [rows, full("tiles", first), None])
        for j in tiles[1:]:
            signals = [full("tiles", j), rows_read if j == end else None, read("tiles", j - 1, last)]
            yield parts.about(parts.tile if j < end else parts.last_tile, "waa", signals)
        yield parts.about(parts.row_block_end, "a", [read("tiles", end, last)])


def predict(kernel: Kernel, launch: Launch, problem: Problem, rates: Rates) -> float:
    """Seconds of one launch: those of the block with the most items."""
    processors = int(rates["processors"])
    work = Work.of(launch, problem, processors)
    rounds, rest = divmod(problem.heads * work.parts, processors)
    parts = Parts(kernel, launch.kernel, work, problem)
    # The fraction of the stored rows that exist.
    stored = problem.tokens / (work.row_blocks * ROWS)

    def times(blocks: int) -> tuple[float, float]:
        """Cycles to the end of the simulated items, and per item, if so many blocks share the memory rate."""
        programs = (Backward if problem.backward else Forward)(parts, work, problem, rates, 1 / blocks)
        memory = rates["memory_bytes"] / blocks / rates["clock_hz"]
        ahead = rates["ahead_bytes"] / memory
        released = f"{programs.streams[-1]} read"
        end = each = 0.0
        for seed in range(SEEDS):
            machine = Multiprocessor(
                programs.warps(), 1, 1, rates, memory / stored, programs.arrivals(), ahead
            )
            end += machine.ends(seed)[-1] / SEEDS
            begin, last = (machine.gates.opens[released, n * work.tiles - 1] for n in (3, ITEMS))
            each += (last - begin) / (ITEMS - 3) / SEEDS
        return end, each

    end, each = times(processors)
    cycles = end + (rounds - ITEMS) * each
    if rest:  # fewer blocks share the memory rate in the last items
        cycles += times(rest)[1]
    return cycles / rates["clock_hz"]
