"""What the warps of attention's Hopper kernels do (csrc/cuda/attention/hopper_*.cuh): two or three warpgroups
compute, other warps copy rows and tiles for them, and barriers synchronise them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

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
    return re.search("hopper_(forward|backward|backward_heads|backward_tangents)_kernel", kernel) is not None


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
        sizes = re.search(r"Sizes<\w+, (\d+), (\d+), (\d+)(?:, (true|false))?\b", launch.kernel)
        if sizes is None:
            raise UnexpectedCodeError(f"{launch.kernel}: no sizes of tiles in its name")
        columns, slots, consumers = int(sizes[2]), int(sizes[3]), launch.warps // GROUP_WARPS - 1
        tiles, row_blocks = ceil(problem.tokens / columns), ceil(problem.tokens / ROWS)
        stays = tiles <= slots and problem.heads >= 2 * processors
        parts = 1 if stays else ceil(row_blocks / consumers)
        by_keys = problem.backward and sizes[4] == "true"
        return cls(consumers, columns, slots, by_keys, tiles, row_blocks, parts)

    def hidden(self, problem: Problem) -> int:
        """Groups of eight columns in the last tile that lie past the end; the last one may do so in part."""
        return (self.tiles * self.columns - problem.tokens + 7) // 8

    def shares(self, item: int) -> list[range]:
        """Row blocks of each consumer in a block's item. A head's last part is taken to be like others."""
        each = self.row_blocks if self.parts == 1 else self.consumers
        first = item % (self.row_blocks // each) * each if each <= self.row_blocks else 0
        own = range(first, min(first + each, self.row_blocks))
        return [own[(c + item) % self.consumers :: self.consumers] for c in range(self.consumers)]


class Parts:
    """Parts of a kernel, each as the path that a warp takes through it."""

    def __init__(self, kernel: Kernel, name: str):
        self.kernel, self.name = kernel, name

    def _nests(self, kind: str, which: Callable[[set[int]], bool] = lambda body: True) -> list[list[int]]:
        """The innermost loops with such instructions, each with the loops around it, from the inside out."""
        kernel = self.kernel
        able = {head: body for head, body in kernel.loops.items() if kernel.count(body, kind)}
        inner = [h for h in able if not any(o != h and o in able[h] for o in able)]
        nests = [sorted((h for h in able if i in able[h]), key=lambda h: len(able[h])) for i in inner]
        return [nest for nest in nests if which(able[nest[-1]])]

    def _nest(self, kind: str, which: Callable[[set[int]], bool] = lambda body: True) -> list[int]:
        nests = self._nests(kind, which)
        if len(nests) != 1:
            raise UnexpectedCodeError(f"{self.name}: {len(nests)} innermost loops with {kind}, not one")
        return nests[0]

    def _last_tile(self, tile: int, hidden: int) -> Trace:
        """A tile whose last columns lie past the end. Each group of eight has a basic block that hides it."""
        loops = self.kernel.loops
        hiding = [block for block in sorted(loops[tile]) if paths.hides(self.kernel.blocks[block])]
        return self._way(tile, {tile}, loops[tile] - set(hiding[hidden:]), hiding=True)

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


class RingParts(Parts):
    """Of a kernel whose tiles pass through a ring."""

    def __init__(self, kernel: Kernel, name: str, work: Work, problem: Problem):
        super().__init__(kernel, name)
        tile, row_block, item = self._nest("wgmma")
        loops = kernel.loops
        self.start = self._way(0, {item}, None)
        self.item = self._way(item, {row_block}, loops[item])
        self.first = self._way(row_block, {tile}, loops[row_block])
        self.tile = self._way(tile, {tile}, loops[tile])
        self.last_tile = self._last_tile(tile, work.hidden(problem))
        self.row_block_end = self._way(paths.exit_of(kernel, tile), {row_block}, loops[row_block])
        row_bytes = 2 * problem.width * sides(problem)
        self.tile_copy = self._copy(self._nest("box", self._announces(work.columns * row_bytes)))
        self.rows_copy = self._copy(self._nest("box", self._announces(ROWS * row_bytes)))
        if work.statistics:
            self.statistics_copy = self._copy(self._nest("copy"))


@dataclass(frozen=True)
class Pass:
    """The parts of one pass over row blocks, of queries or of keys."""

    begin: Trace
    tile: Trace
    last_tile: Trace
    end: Trace


class HeadParts(Parts):
    """Of a kernel that keeps whole heads in shared memory."""

    def __init__(self, kernel: Kernel, name: str, work: Work, problem: Problem):
        super().__init__(kernel, name)
        nests = sorted(self._nests("wgmma"), key=lambda nest: -kernel.count(kernel.loops[nest[0]], "hmma"))
        if len(nests) != 2:
            raise UnexpectedCodeError(f"{name}: {len(nests)} innermost loops with wgmma, not two")
        (_, queries, item), (_, keys, _) = nests
        loops = kernel.loops
        self.start = self._way(0, {item}, None)
        self.item = self._way(item, {queries}, loops[item])
        self.between = self._way(paths.exit_of(kernel, queries), {keys}, loops[item])
        self.passes = [
            Pass(
                self._way(row_block, {tile}, loops[row_block]),
                self._way(tile, {tile}, loops[tile]),
                self._last_tile(tile, hidden),
                self._way(paths.exit_of(kernel, tile), {row_block}, loops[row_block]),
            )
            for (tile, row_block, _), hidden in zip(nests, (work.hidden(problem), 0), strict=True)
        ]
        self.copy = self._copy(self._nests("box")[0])


def sides(problem: Problem) -> int:
    """Tensors in a copy: with their tangents, and queries with their gradients and keys with values."""
    return 2**problem.tangent * 2**problem.backward


def signalling(trace: Trace) -> str:
    """Its instructions with signals, in order: w waits, a arrives, b copies a box, p prefetches."""
    kinds = {"await": "w", "arrive": "a", "box": "b", "prefetch": "p"}
    return "".join(kinds[kind] for kind, *_ in trace.code if kind in kinds)


class Programs(ABC):
    """What each warp does."""

    streams: tuple[str, ...]
    """What is copied for each tile, in this order; released one after the other."""

    def __init__(self, work: Work, problem: Problem, rates: Rates, share: float):
        """`share`: of the memory rate."""
        self.work, self.problem = work, problem
        self.a_byte = rates["clock_hz"] / (rates["memory_bytes"] * share)
        self.a_byte_from_l2 = rates["clock_hz"] * rates["processors"] / rates["l2_bytes"]

    @abstractmethod
    def arrivals(self) -> dict[str, int]:
        """Per phase of each barrier."""

    @abstractmethod
    def warps(self) -> list[list[Trace]]:
        """What each warp does."""

    def _copied(
        self, gate: Gate, before: int, first: int, rows: int, boxes: int, waits_for: str = ""
    ) -> list[Signal | None]:
        """Of a copying warp: it waits for the empty slot, announces the boxes and issues them. Data that one
        of several readers has read is in the L2 cache for the others. `waits_for`: by default the same."""
        readers = 1 if gate[0].startswith("rows") else self.work.parts
        size = max(0, min(rows, self.problem.tokens - first)) * self.problem.width * 2 * sides(self.problem)
        box = Signal(gate, size / boxes * self.a_byte_from_l2, size / boxes * self.a_byte / readers)
        return [self._emptied(waits_for or gate[0], before), None, *[box] * boxes]

    def _emptied(self, name: str, before: int) -> Signal | None:
        return Signal((f"{name} read", before)) if before >= 0 else None


class Ring(Programs):
    """Tiles pass through a ring."""

    def __init__(self, parts: RingParts, work: Work, problem: Problem, rates: Rates, share: float):
        super().__init__(work, problem, rates, share)
        self.parts = parts
        each = signalling(parts.tile_copy[-1]).split("wa")[1:]
        self.tile_boxes = dict(zip(self.streams, map(len, each), strict=True))
        self.row_boxes = signalling(parts.rows_copy[-1]).count("b")

    def arrivals(self) -> dict[str, int]:
        arrivals = {}
        for name in self.streams:
            arrivals[name] = self.tile_boxes[name] + self.work.statistics
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
                        (name, number),
                        number - work.slots,
                        j * work.columns,
                        work.columns,
                        self.tile_boxes[name],
                    )
                expected = "".join("wa" + "b" * boxes for boxes in self.tile_boxes.values())
                yield self.parts.about(copy, expected, signals)

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

    @abstractmethod
    def row_block(self, tiles: range, rows: Signal, rows_read: Signal, last: bool) -> Iterator[Trace]:
        """`last`: whether the tiles are not needed again."""


def full(name: str, tile: int) -> Signal:
    return Signal((name, tile))


def read(name: str, tile: int, last: bool) -> Signal | None:
    return Signal((f"{name} read", tile)) if last else None


class Forward(Ring):
    streams = "keys", "values"

    def consume(self, c: int) -> Iterator[Trace]:
        """Results are stored after the next row block's first products have been queued; after the last row
        block, products that nobody reads. The softmax that follows them here is not there."""
        self.values_read: Signal | None = None
        yield from super().consume(c)
        yield from self.first(None, None, None, None)

    def first(
        self, rows: Signal | None, rows_read: Signal | None, keys: Signal | None, keys_read: Signal | None
    ) -> Iterator[Trace]:
        if self.loads_rows:
            signals = [rows, rows_read, keys, self.values_read, keys_read]
            yield self.parts.about(self.parts.first, "wawaa", signals)
        else:
            yield self.parts.about(self.parts.first, "wwaa", [rows, keys, self.values_read, keys_read])

    @property
    def loads_rows(self) -> bool:
        """Whether queries are loaded into registers, which releases them at once."""
        return signalling(self.parts.first).startswith("wa")

    def row_block(self, tiles: range, rows: Signal, rows_read: Signal, last: bool) -> Iterator[Trace]:
        parts, first, end = self.parts, tiles[0], tiles[-1]
        yield from self.first(rows, rows_read, full("keys", first), read("keys", first, last))
        for j in tiles[1:]:
            signals = [full("keys", j), full("values", j - 1), read("keys", j, last)]
            if j == end and not self.loads_rows:
                signals.append(rows_read)
            signals.append(read("values", j - 1, last))
            trace = parts.tile if j < end else parts.last_tile
            yield parts.about(trace, "ww" + "a" * (len(signals) - 2), signals)
        yield parts.about(parts.row_block_end, "w", [full("values", end)])
        self.values_read = read("values", end, last)


class Backward(Ring):
    streams = ("tiles",)

    def row_block(self, tiles: range, rows: Signal, rows_read: Signal, last: bool) -> Iterator[Trace]:
        parts, first, end = self.parts, tiles[0], tiles[-1]
        yield parts.about(parts.first, "wwa", [rows, full("tiles", first), None])
        for j in tiles[1:]:
            signals = [full("tiles", j), rows_read if j == end else None, read("tiles", j - 1, last)]
            yield parts.about(parts.tile if j < end else parts.last_tile, "waa", signals)
        yield parts.about(parts.row_block_end, "a", [read("tiles", end, last)])


class BackwardTangents(Ring):
    streams = ("tiles",)

    def row_block(self, tiles: range, rows: Signal, rows_read: Signal, last: bool) -> Iterator[Trace]:
        parts, end = self.parts, tiles[-1]
        yield parts.about(parts.first, "w", [rows])
        for j in tiles:
            signals = [full("tiles", j), rows_read if j == end else None, read("tiles", j, last)]
            yield parts.about(parts.tile if j < end else parts.last_tile, "waa", signals)
        yield parts.row_block_end


class BackwardHeads(Programs):
    """Queries and keys of a whole head stay in shared memory, for row blocks of queries, then of keys."""

    streams = "keys", "queries"

    def __init__(self, parts: HeadParts, work: Work, problem: Problem, rates: Rates, share: float):
        super().__init__(work, problem, rates, share)
        self.parts = parts

    def arrivals(self) -> dict[str, int]:
        arrivals: dict[str, int] = {}
        for name in self.streams:
            arrivals |= {name: sides(self.problem), f"{name} read": self.work.consumers * GROUP_WARPS}
        for j in range(self.work.tiles):
            blocks = sum(j in self.tiles_of(r) for r in range(self.work.row_blocks))
            arrivals[f"stored {j}"] = blocks * GROUP_WARPS
        return arrivals

    def warps(self) -> list[list[Trace]]:
        warps = [list(self.copy_heads())]
        for c in range(self.work.consumers):
            warps += [list(self.consume(c))] * GROUP_WARPS
        return warps

    def tiles_of(self, row_block: int) -> range:
        """The tiles that a row block's rows belong to."""
        first = row_block * ROWS // self.work.columns
        return range(first, min(((row_block + 1) * ROWS - 1) // self.work.columns + 1, self.work.tiles))

    def copy_heads(self) -> Iterator[Trace]:
        (start, item_start, copy), boxes, work = self.parts.copy, sides(self.problem), self.work
        # Keys replace the queries of two heads before, queries the keys of the head before.
        replaced = {"keys": ("queries", 2), "queries": ("keys", 1)}
        yield start
        for item in range(ITEMS):
            yield item_start
            for name, (old, heads) in replaced.items():
                for j in range(work.tiles):
                    signals = self._copied(
                        (name, item * work.tiles + j),
                        (item - heads) * work.tiles + j,
                        j * work.columns,
                        work.columns,
                        boxes,
                        old,
                    )
                    yield self.parts.about(copy, "wa" + "b" * boxes, signals)

    def consume(self, c: int) -> Iterator[Trace]:
        parts = self.parts
        # The item, whether the pass is that over keys, the row block, whether it is the pass's last.
        blocks = [
            (item, by_keys, r, r == share[-1])
            for item in range(ITEMS)
            for by_keys in (False, True)
            for share in [self.work.shares(by_keys)[c]]
            for r in share
        ]
        yield parts.about(parts.start, "www", self.begin(*blocks[0][:3]))
        before = None
        for block, following in zip(blocks, [*blocks[1:], blocks[-1]], strict=True):
            if before != block[:2]:
                yield parts.between if block[1] else parts.item
                before = block[:2]
            yield from self.row_block(*block, self.begin(*following[:3]))

    def begin(self, item: int, by_keys: bool, r: int) -> list[Signal | None]:
        """Waits for a row block and its first tile."""
        own, other = self.streams if by_keys else self.streams[::-1]
        first, tiles = min(r * ROWS, self.work.tiles * self.work.columns - ROWS), item * self.work.tiles
        ends = first // self.work.columns, (first + ROWS - 1) // self.work.columns
        return [*(full(own, tiles + end) for end in ends), full(other, tiles)]

    def row_block(
        self, item: int, by_keys: bool, r: int, last: bool, following: list[Signal | None]
    ) -> Iterator[Trace]:
        """`last`: whether it is the consumer's last one of this pass; `following`: waits for the next one."""
        mine, about, tiles = self.parts.passes[by_keys], self.parts.about, self.work.tiles
        stream, released, begin = "queries" if by_keys else "keys", last and by_keys, item * tiles
        stored: list[Signal | None] = [Signal((f"stored {j}", item)) for j in range(tiles)]
        signals: list[Signal | None]
        yield about(mine.begin, "w" * by_keys, stored[:by_keys])
        for j in range(1, tiles):
            signals = [full(stream, begin + j)]
            if by_keys:
                signals += [stored[j], read(stream, begin + j - 1, released)]
            yield about(mine.last_tile if j == tiles - 1 else mine.tile, "wwa" if by_keys else "w", signals)
        signals = []
        for j in range(tiles):
            end = (j + 1) * self.work.columns
            if by_keys:  # rows before those of the next row block are free
                before, after = (r * ROWS if r > 1 else 0), (r + 2) * ROWS
                signals.append(read("keys", begin + j, before < end and (last or end <= after)))
            else:
                signals.append(stored[j] if j in self.tiles_of(r) else None)
        # Arrivals for tiles that a slot has room for, but a head does not need.
        signals += [None] * (signalling(mine.end).index("w") - tiles) + following
        if by_keys:
            signals.append(read(stream, begin + tiles - 1, released))
        yield about(mine.end, "a" * signalling(mine.end).index("w") + "www" + "a" * by_keys, signals)


def predict(kernel: Kernel, launch: Launch, problem: Problem, rates: Rates) -> float:
    """Seconds of one launch: those of the block with the most items."""
    processors = int(rates["processors"])
    work = Work.of(launch, problem, processors)
    rounds, rest = divmod(problem.heads * work.parts, processors)
    parts: Any
    kind: Any = Forward if not problem.backward else BackwardTangents if problem.tangent else Backward
    if "heads" in launch.kernel:
        kind = BackwardHeads
    parts = (HeadParts if kind is BackwardHeads else RingParts)(kernel, launch.kernel, work, problem)
    # The fraction of the stored rows that exist.
    stored = problem.tokens / (work.row_blocks * ROWS)

    def times(blocks: int) -> tuple[float, float]:
        """Cycles to the end of the simulated items, and per item, if so many blocks share the memory rate."""
        programs = kind(parts, work, problem, rates, 1 / blocks)
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
