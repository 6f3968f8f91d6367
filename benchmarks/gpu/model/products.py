"""What the warps of Newton-Schulz's Hopper kernels do (csrc/cuda/newton_schulz/hopper_*.cuh): one
copies operands, two warpgroups multiply a tile of 128 x 256, and either two warps store it or the warpgroups
update the parameters with it, which the copying warp prefetches. The other block of a cluster is taken to be
in step, all tiles to be stored in full, and parameters to be float32 and taller than wide, so that they have
the more rows to prefetch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from . import paths
from .hopper import signalling
from .machine import NO_GATE, Multiprocessor, Rates, Signal, Trace
from .problems import UnexpectedCodeError
from .sass import Kernel

SQUARE, ROWS, BOX = 256, 128, 64
BOX_BYTES = 2 * BOX * BOX
CLUSTER = SQUARE // ROWS
CONSUMERS, GROUP_WARPS, SLOTS = 2, 4, 3
TARGET_BYTES = 4
UPDATE_BYTES = 2 * TARGET_BYTES
"""Per element of a parameter: of itself, and read and written to update it."""
LEFT, RIGHT, SHARE = ROWS // BOX, SQUARE // BOX, SQUARE // BOX // CLUSTER
"""Boxes of each factor in a slot; those of the right one that a block copies itself."""
SEEDS = 2
TILES = 5
"""Tiles to simulate; the first two are not counted."""


def takes(kernel: str) -> bool:
    return re.search("hopper_(product|update)_kernel", kernel) is not None


@dataclass(frozen=True)
class Product:
    """One product for every matrix of a bucket, as the introspection module describes it."""

    m: int
    n: int
    k: int
    matrices: int
    symmetric: bool
    right_transposed: bool
    adds_left: bool
    squared: bool
    """Whether both factors are the same."""
    warpgroups: bool

    def flops(self) -> float:
        """Of a symmetric product, the half with whole diagonal tiles of 128 x 128."""
        share = (ceil(self.m / ROWS) + 1) / 2 / ceil(self.m / ROWS) if self.symmetric else 1
        return 2.0 * self.m * self.n * self.k * self.matrices * share

    def limit_seconds(self, rates: Rates, updates: bool) -> float:
        """The larger of the operations' time and the time to read both factors once, and to write the result
        or update a parameter with it."""
        factors = 2.0 * (self.m * self.k + (0 if self.squared else self.n * self.k))
        size = (factors + (UPDATE_BYTES if updates else 2) * self.m * self.n) * self.matrices
        return max(self.flops() / rates["matrix_flops"], size / rates["memory_bytes"])

    def tiles(self, updates: bool) -> Counter[Tile]:
        """The tiles of a block for one matrix."""
        down, across = ceil(self.m / SQUARE), ceil(self.n / SQUARE)
        kinds = Counter({(False, False): down * across})  # (mirrored, shares rows)
        if self.symmetric:
            kinds = Counter({(True, False): down * (down - 1) // 2, (False, self.squared): down})
        slots = self.k // BOX
        copied = sum(n * slots * (SHARE + LEFT * (not shares)) for (_, shares), n in kinds.items())
        read = 2 * self.k * (self.m + (0 if self.squared else self.n)) / CLUSTER
        return Counter(
            {
                Tile(
                    slots, self.right_transposed, self.adds_left, *kind, updates, read / (copied * BOX_BYTES)
                ): n
                for kind, n in kinds.items()
                if n
            }
        )


@dataclass(frozen=True)
class Tile:
    slots: int
    """Pieces of 64 of the depth."""
    right_transposed: bool
    adds_left: bool
    mirrored: bool
    shares_rows: bool
    updates: bool
    from_memory: float
    """The fraction of what is copied that is not in the L2 cache."""


class Parts:
    """The kernel's parts, each as the path that a warp takes through it."""

    def __init__(self, kernel: Kernel, name: str, tile: Tile):
        self.kernel, self.name = kernel, name
        multiplying = {
            self._text(head).count("tnspB") > 0: head for head in self._innermost("wgmma", "await")
        }
        if tile.right_transposed not in {not each for each in multiplying}:
            raise UnexpectedCodeError(f"{name}: no loop over slots for such products")
        slot = multiplying[not tile.right_transposed]
        others = set().union(*(kernel.loops[head] for head in multiplying.values() if head != slot))
        tiles = self._around(slot)
        inside = kernel.loops[tiles] - others
        self.start = self.way(0, {tiles})
        self.first = self.way(tiles, {slot}, inside)
        saving = sorted(b for b in kernel.loops[slot] if self._writes(b))
        self.slot = self.way(slot, {slot}, kernel.loops[slot] - set(saving))
        if tile.adds_left:
            self.to_saving = self.way(slot, set(saving[:1]), kernel.loops[slot])
            self.saving = self.way(saving[0], {slot}, kernel.loops[slot])
        after = paths.exit_of(kernel, slot)
        if not tile.updates:
            # Boxes with and without `left` are written by different code, where only one reads.
            inside -= {b for b in inside if self._writes(b) and self._reads(b) != tile.adds_left}
            self.finish = self.way(after, {tiles}, inside)
        else:
            (part,) = self._innermost("store")
            body = kernel.loops[part]
            self.finish = self.way(after, {part}, inside)
            # Of the writes of sums to shared memory, each time one is executed.
            write, *rest = sorted(b for b in body if self._writes(b))
            body = body - set(rest) - {b for b in body if self._rounds(b)}
            self.to_part = self.way(part, {write}, body)
            self.part = self.way(write, {part}, body, loading=True).prefetched()
            self.updated = self.way(paths.exit_of(kernel, part), {tiles}, inside)

        (copy,) = self._innermost("box")
        tiles = self._around(copy)
        self.copy_start = self.way(0, {tiles})
        self.copy_tile = self.way(tiles, {copy}, kernel.loops[tiles])
        self.copy = self.way(copy, {copy}, kernel.loops[copy])
        self.copied = self.way(paths.exit_of(kernel, copy), {tiles}, kernel.loops[tiles])
        if tile.updates:
            (row,) = self._innermost("prefetch")
            self.copy = self.way(copy, {row}, kernel.loops[copy])
            self.row = self.way(row, {row}, kernel.loops[row])
            self.copy_end = self.way(paths.exit_of(kernel, row), {copy}, kernel.loops[copy])
            return
        (mirror,) = self._innermost("ldsm")
        box = self._around(mirror)
        (rows,) = [h for h in self._innermost("store") if h != mirror and h in kernel.loops[box]]
        tiles = self._around(box)
        self.store_start = self.way(0, {tiles})
        self.store_tile = self.way(tiles, {box}, kernel.loops[tiles])
        self.box = self.way(box, {rows}, kernel.loops[box])
        self.rows = self.way(rows, {rows}, kernel.loops[rows])
        after = paths.exit_of(kernel, rows)
        self.to_mirror = self.way(after, {mirror}, kernel.loops[box])
        self.mirror = self.way(mirror, {mirror}, kernel.loops[mirror])
        self.box_end = self.way(paths.exit_of(kernel, mirror), {box}, kernel.loops[box])
        self.no_mirror = self.way(after, {box}, kernel.loops[box] - kernel.loops[mirror])
        self.stored = self.way(paths.exit_of(kernel, box), {tiles}, kernel.loops[tiles])

    def _innermost(self, *kinds: str) -> list[int]:
        """The innermost loops that contain instructions of all these kinds."""
        kernel = self.kernel
        able = [h for h, body in kernel.loops.items() if all(kernel.count(body, each) for each in kinds)]
        found = [h for h in able if not any(o != h and o in kernel.loops[h] for o in able)]
        if not found:
            raise UnexpectedCodeError(f"{self.name}: no loop with {' and '.join(kinds)}")
        return found

    def _around(self, head: int) -> int:
        """The smallest loop around a loop."""
        loops = self.kernel.loops
        around = [h for h in loops if h != head and head in loops[h]]
        if not around:
            raise UnexpectedCodeError(f"{self.name}: a loop that should be inside another one")
        return min(around, key=lambda h: len(loops[h]))

    def _text(self, head: int) -> str:
        return "\n".join(each.text for b in self.kernel.loops[head] for each in self.kernel.blocks[b])

    def _reads(self, block: int) -> bool:
        return any(each.name == "LDS" for each in self.kernel.blocks[block])

    def _writes(self, block: int) -> bool:
        return any(each.name == "STS" for each in self.kernel.blocks[block])

    def _rounds(self, block: int) -> bool:
        """Whether it has to do with 16-bit targets."""
        return any(re.search(r"U16|BF16|F16|HADD2", each.text) for each in self.kernel.blocks[block])

    def way(
        self, start: int, ends: set[int], within: Iterable[int] | None = None, loading: bool = False
    ) -> Trace:
        kernel = self.kernel
        inside = range(len(kernel.blocks)) if within is None else within
        path = paths.hottest(kernel, start, ends, inside, copying=False, elements=True, loading=loading)
        # Barriers of one warpgroup are not modelled.
        return Trace([i for block in path for i in kernel.blocks[block] if i.kind != "barrier"])

    def about(self, trace: Trace, expected: str, signals: list[Signal | None]) -> Trace:
        if (found := signalling(trace)) != expected:
            raise UnexpectedCodeError(f"{self.name}: barriers and copies are {found!r}, not {expected!r}")
        return trace.signalling(signals)


ROW_TRIPS, MIRROR_TRIPS = BOX // 16, BOX // 8


class Programs:
    """What each warp does for some tiles of one kind."""

    def __init__(self, parts: Parts, tile: Tile, rates: Rates):
        self.parts, self.tile = parts, tile
        self.memory = BOX_BYTES * rates["clock_hz"] * rates["processors"] / rates["memory_bytes"]
        row = TARGET_BYTES * ROWS * rates["clock_hz"] * rates["processors"] / rates["memory_bytes"]
        self.row = Signal(NO_GATE, 0, row)
        self.l2 = BOX_BYTES * rates["clock_hz"] * rates["processors"] / rates["l2_bytes"]

    def arrivals(self) -> dict[str, int]:
        boxes = SHARE + (0 if self.tile.shares_rows else LEFT)
        arrivals = {"full": boxes, "empty": CONSUMERS * GROUP_WARPS}
        for c in range(CONSUMERS):
            arrivals |= {f"written {c}": GROUP_WARPS, f"stored {c}": 1}
        return arrivals

    def warps(self) -> list[list[Trace]]:
        consumers = range(CONSUMERS)
        warps = [list(self.copy())]
        if not self.tile.updates:
            warps += [list(self.store(c)) for c in consumers]
        for c in consumers:
            warps += [list(self.consume(c))] * GROUP_WARPS
        return warps

    def memory_cycles(self) -> float:
        """What a tile of the last wave copies from memory, prefetches and stores, at the memory's rate."""
        return (
            self.tile.slots * (LEFT + SHARE) * self.memory * self.tile.from_memory
            + 2 * SQUARE * self.row.memory
        )

    def copy(self) -> Iterator[Trace]:
        parts, tile = self.parts, self.tile
        yield parts.copy_start
        number = 0
        each = ceil(SQUARE / tile.slots)
        for _ in range(TILES):
            yield parts.copy_tile
            for slot in range(tile.slots):
                box = Signal(("full", number), self.l2, self.memory * tile.from_memory)
                left = [None if tile.shares_rows else box] * LEFT
                emptied = Signal(("empty", number - SLOTS)) if number >= SLOTS else None
                signals = [emptied, None, *left, *[box] * SHARE]
                yield parts.about(parts.copy, "wa" + "b" * (LEFT + SHARE), signals)
                number += 1
                if tile.updates:
                    rows = min(each, max(0, SQUARE - slot * each))
                    yield from [parts.about(parts.row, "p", [self.row])] * rows
                    yield parts.copy_end
            yield parts.copied

    def store(self, c: int) -> Iterator[Trace]:
        parts = self.parts
        yield parts.store_start
        for n in range(TILES):
            yield parts.about(parts.store_tile, "w", [Signal((f"written {c}", n))])
            for _ in range(RIGHT):
                yield parts.box
                yield from [parts.rows] * ROW_TRIPS
                if self.tile.mirrored:
                    yield parts.to_mirror
                    yield from [parts.mirror] * MIRROR_TRIPS
                    yield parts.box_end
                else:
                    yield parts.no_mirror
            yield parts.about(parts.stored, "a", [Signal((f"stored {c}", n))])

    def consume(self, c: int) -> Iterator[Trace]:
        parts, slots = self.parts, self.tile.slots
        yield parts.start
        for n in range(TILES):
            first, last = n * slots, (n + 1) * slots - 1
            yield parts.about(parts.first, "w", [Signal(("full", first))])
            stored = Signal((f"stored {c}", n - 1)) if n else None
            saved = RIGHT if self.tile.adds_left else 0
            for number in range(first + 1, last + 1):
                full, before = Signal(("full", number)), Signal(("empty", number - 1))
                if last + 1 - number > saved:
                    yield parts.about(parts.slot, "wa", [full, before])
                else:
                    yield parts.about(parts.to_saving, "w", [full])
                    yield parts.about(parts.saving, "a", [before])
            emptied = Signal(("empty", last))
            if self.tile.updates:
                yield parts.about(parts.finish, "a", [emptied])
                yield from [parts.to_part, parts.part] * RIGHT
                yield parts.updated
            else:
                written = Signal((f"written {c}", n))
                yield parts.about(parts.finish, "awa", [emptied, stored, written])


def cycles(kernel: Kernel, name: str, tile: Tile, rates: Rates) -> tuple[float, float]:
    """Cycles of the first tile and of each further one."""
    programs = Programs(Parts(kernel, name, tile), tile, rates)
    memory = rates["memory_bytes"] / rates["processors"] / rates["clock_hz"]
    begin = each = 0.0
    for seed in range(SEEDS):
        machine = Multiprocessor(
            programs.warps(), 1, 1, rates, memory, programs.arrivals(), rates["ahead_bytes"] / memory
        )
        machine.ends(seed)
        ends = [machine.gates.opens["empty", (n + 1) * tile.slots - 1] for n in range(TILES)]
        each += (ends[-1] - ends[1]) / (TILES - 2) / SEEDS
        begin += ends[0] / SEEDS
    if tile.updates:  # prefetches and stores wait for nobody
        each = max(each, programs.memory_cycles())
    return begin, each


def waves(plan: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[Product]]]:
    """The launches of a planned call that compute products, each with its products. In a wave, those of large
    matrices come first.
    """
    products: dict[int, list[Product]] = {}
    for each in plan["products"]:
        fields = dict(each)
        products.setdefault(fields.pop("wave"), []).append(Product(**fields))
    launches = iter(each for each in plan["launches"] if each["tile"] != (0, 0))
    for wave in products.values():
        rest = wave
        while rest:
            launch = next(launches)
            large = [each for each in rest if each.warpgroups]
            own = large if launch["tile"] == (ROWS, SQUARE) else rest
            rest = [each for each in rest if each not in own]
            yield launch, own


def predict(
    kernel: Kernel, name: str, products: list[Product], rates: Rates, known: dict[Any, tuple[float, float]]
) -> list[float]:
    """Each product's share of the seconds of one launch. `known`: what has been simulated before."""
    squares, begin = 0, 0.0
    shares = []
    for product in products:
        shares.append(0.0)
        for tile, count in product.tiles("update" in name).items():
            if (name, tile) not in known:
                known[name, tile] = cycles(kernel, name, tile, rates)
            first, each = known[name, tile]
            squares += count * product.matrices
            shares[-1] += each * count * product.matrices
            begin = max(begin, first - each)
    clusters = min(squares, int(rates["processors"]) // CLUSTER)
    total = sum(shares)
    seconds = (begin + ceil(squares / clusters) * total / squares) / rates["clock_hz"]
    return [seconds * share / total for share in shares]
