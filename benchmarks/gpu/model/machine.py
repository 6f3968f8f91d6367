"""One multiprocessor, cycle by cycle: four schedulers, their pipes, shared memory, copies, barriers.

The compiler's decisions (stalls, scoreboards) are followed exactly; those of the hardware are rates and
latencies in rates.json. Each scheduler stays with a warp while it can, then takes the oldest that is ready.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .asynchronous import NEVER, Gate, Gates, Product, Products, Rates, Warpgroup
from .sass import NO_SCOREBOARD, Instruction

SCHEDULERS = 4
SCOREBOARDS = 6
WARP_COPY_BYTES = 512
QUEUE = 12
"""Cycles of work that the shared-memory queue holds before a scheduler must wait."""


@dataclass(frozen=True)
class Signal:
    """The phase of an mbarrier that an instruction, or a copy of a box, refers to; of a prefetch, none."""

    gate: Gate
    port: float = 0
    memory: float = 0
    """The copy time of a box: cycles of this multiprocessor's share of the L2 rate and of the memory rate."""


NO_GATE = ("", 0)


@dataclass(eq=False)
class Trace:
    """Instructions in the form that the model executes."""

    instructions: Sequence[Instruction]
    code: list[tuple[str, int, int, int, int, float, Any]] = field(init=False)
    signals: Sequence[Signal | None] = ()
    """The signals of the instructions that have one, in order; None: the instruction is not executed."""

    def __post_init__(self) -> None:
        self.code = [
            (
                each.kind,
                max(1, each.stall),
                each.waits,
                each.sets,
                each.frees,
                _weight(each),
                _detail(each),
            )
            for each in self.instructions
        ]

    def __len__(self) -> int:
        return len(self.code)

    def signalling(self, signals: Sequence[Signal | None]) -> Trace:
        """The same instructions with other signals."""
        other = copy.copy(self)
        other.signals = signals
        return other

    def prefetched(self) -> Trace:
        """The same instructions, where what is loaded is in the L2 cache and every lane has an element."""
        other, renamed = copy.copy(self), {"load": "load from l2", "store": "store"}
        other.code = [
            (renamed[kind], *schedule, max(1, weight), detail)
            if kind in renamed
            else (kind, *schedule, weight, detail)
            for kind, *schedule, weight, detail in self.code
        ]
        return other


def _weight(each: Instruction) -> float:
    """The work of an instruction in units of its kind."""
    if each.kind == "ldsm":
        return 4 if ".4" in each.opcode else 2 if ".2" in each.opcode else 1
    if each.kind == "fma" and each.name == "IMAD" and "MOV" not in each.opcode:
        return 2
    if each.kind in ("shared", "load", "store"):
        # Of single elements in memory, one lane of four has one: a number for each row of a fragment.
        single = 1 if each.kind == "shared" else 0.25
        return 4 if ".128" in each.opcode else 2 if ".64" in each.opcode else single
    return 1


def _detail(each: Instruction) -> Any:
    """The kind of a product; for a wait for copies or products, how many groups may still be in flight."""
    if each.kind == "wgmma":
        found = re.match(r"HGMMA\.64x(\d+)x16\.\S+ R\d+, (gdesc|R\d+)", each.text)
        if found is None:
            raise ValueError(f"not a product of 16-bit matrices: {each.text}")
        return Product(int(found[1]), found[2] == "gdesc", "gsb0" in each.text)
    if each.kind not in ("wait_groups", "wait_products") or "," not in each.text:
        return 0
    return int(each.text.split(",")[1].split()[0], 16)


NO_GROUP = Warpgroup(0)


class Warp:
    __slots__ = (
        "block",
        "closed",
        "group",
        "groups",
        "last",
        "place",
        "products",
        "ready",
        "release",
        "segment",
        "segments",
        "signal",
        "trace",
    )

    def __init__(self, segments: Sequence[Trace], block: Block, ready: float):
        self.segments, self.block, self.ready = segments, block, ready
        self.segment, self.place, self.trace, self.signal = 0, 0, segments[0].code, 0
        self.release = [0.0] * SCOREBOARDS
        self.groups: list[float] = []
        self.last = 0.0
        self.products = self.closed = 0
        self.group = NO_GROUP


class Block:
    """Warps that meet at barriers."""

    def __init__(self, programs: Sequence[Sequence[Trace]], start: float):
        self.warps = [Warp(each, self, start) for each in programs if each]
        self.waiting: list[Warp] = []
        self.running = len(self.warps)
        self.schedulers: list[int] = []
        # Warps with products: four neighbours are a warpgroup.
        able = [
            warp for warp in self.warps if any(any(c[0] == "wgmma" for c in t.code) for t in warp.segments)
        ]
        for i in range(0, len(able), SCHEDULERS):
            group = Warpgroup(len(able[i : i + SCHEDULERS]))
            for warp in able[i : i + SCHEDULERS]:
                warp.group = group


class Multiprocessor:
    """`count` blocks of one kind, `resident` at a time; ends() returns the cycle in which each ends."""

    def __init__(
        self,
        programs: Sequence[Sequence[Trace]],
        resident: int,
        count: int,
        rates: Rates,
        copy_rate: float,
        arrivals: Mapping[str, int] | None = None,
        ahead: float = 0,
    ):
        """`arrivals`: the number of arrivals per phase, by mbarrier name. `ahead`: how many cycles copies may
        run ahead of this multiprocessor's share of the memory rate, as others do not all copy at once."""
        self.programs, self.resident, self.count = programs, resident, count
        self.rates, self.copy_rate, self.ahead = rates, copy_rate, ahead
        self.gates = Gates(arrivals or {}, rates["mbarrier_latency"])

    def ends(self, seed: int = 0) -> list[float]:
        rates, chance = self.rates, random.Random(seed)
        launch = rates["launch_cycles"]
        schedulers: list[list[Warp]] = [[] for _ in range(SCHEDULERS)]
        started = 0

        def start(at: float, places: Sequence[int]) -> None:
            nonlocal started
            block = Block(self.programs, at)
            block.schedulers = list(places)
            for warp, place in zip(block.warps, places, strict=True):
                warp.ready += launch + chance.randrange(40)
                schedulers[place].append(warp)
            started += 1

        for i in range(min(self.resident, self.count)):
            # Blocks that begin together drift apart.
            warps = sum(1 for each in self.programs if each)
            places = [(i * warps + warp) % SCHEDULERS for warp in range(warps)]
            start(i * rates["offset_cycles"] / self.resident, places)
        pipes = [{"hmma": 0.0, "fma": 0.0, "alu": 0.0, "mufu": 0.0} for _ in range(SCHEDULERS)]
        per_kind = {
            "hmma": ("hmma", rates["hmma_cycles"]),
            "fma": ("fma", rates["fma_cycles"]),
            "alu": ("alu", rates["alu_cycles"]),
            "mufu": ("mufu", rates["mufu_cycles"]),
        }
        latency = {name[:-8]: value for name, value in rates.items() if name.endswith("_latency")}
        usual = latency["usual"]
        a_line_from_l2 = 128 * rates["clock_hz"] * rates["processors"] / rates["l2_bytes"]
        memory = channel = port = 0.0
        now = 0.0
        products, gates = Products(rates, pipes), self.gates
        ended: list[float] = []
        while len(ended) < self.count:
            acted, wake = False, products.advance(now)
            for index in range(SCHEDULERS):
                mine, pipe = schedulers[index], pipes[index]
                for position, warp in enumerate(mine):
                    ready = warp.ready
                    if ready > now:
                        if ready < wake:
                            wake = ready
                        continue
                    kind, stall, waits, sets, frees, weight, detail = warp.trace[warp.place]
                    if waits:
                        release = warp.release
                        until = max(release[b] for b in range(SCOREBOARDS) if waits >> b & 1)
                        if until > now:
                            warp.ready = until
                            if until < wake:
                                wake = until
                            continue
                    through = per_kind.get(kind)
                    if through is not None:
                        if pipe[through[0]] >= now + 1:
                            if kind == "hmma":
                                products.between.add(index)
                            wake = min(wake, float(int(pipe[through[0]])))
                            continue
                        name, cycles = through
                        pipe[name] = max(pipe[name], now) + cycles * (weight if kind == "fma" else 1)
                        if kind == "hmma":
                            products.between.discard(index)
                        done = now + latency.get(kind, usual)
                    elif kind in ("ldsm", "shared", "shuffle"):
                        if memory > now + QUEUE:
                            if memory - QUEUE < wake:
                                wake = memory - QUEUE
                            continue
                        memory = max(memory, now) + weight * rates["shared_row_cycles"]
                        done = memory + latency[kind]
                    elif kind == "copy":
                        channel = max(channel, now - self.ahead) + WARP_COPY_BYTES / self.copy_rate
                        warp.last = max(channel, now + latency["global"])
                        done = now + latency["shared"]
                    elif kind in ("load", "store"):
                        channel = max(channel, now - self.ahead) + 128 * weight / self.copy_rate
                        done = now + latency["shared"]
                        if kind == "load":
                            done = max(channel, now + latency["global"])
                    elif kind == "load from l2":
                        port = max(port, now) + weight * a_line_from_l2
                        done = max(port, now + latency["l2"])
                    elif kind == "close_group":
                        warp.groups.append(warp.last)
                        done = now
                    elif kind == "wait_groups":
                        groups = warp.groups[: len(warp.groups) - detail] if detail else warp.groups
                        if groups and (until := max(groups)) > now:
                            warp.ready = until
                            if until < wake:
                                wake = until
                            continue
                        done = now
                    elif kind == "wgmma":
                        if not products.issue(warp.group, warp.products, detail, warp, now):
                            continue
                        warp.products += 1
                        warp.closed += detail.closes
                        done = now
                    elif kind == "wait_products":
                        if not products.wait(warp.group, warp.closed - detail, warp, now):
                            wake = min(wake, warp.ready)
                            continue
                        done = now
                    elif kind in ("await", "arrive", "box", "prefetch"):
                        signal = warp.segments[warp.segment].signals[warp.signal]
                        done = now + latency["shared"]
                        if signal is None:
                            pass
                        elif kind == "await":
                            if not gates.wait(signal.gate, warp, now):
                                wake = min(wake, warp.ready)
                                continue
                        elif kind == "arrive":
                            gates.arrive(signal.gate, now)
                        else:
                            channel = max(channel, now - self.ahead) + signal.memory
                        if signal is not None and kind == "box":
                            port = max(port, now) + signal.port
                            gates.arrive(signal.gate, max(channel, port, now + latency["box"]))
                        warp.signal += 1
                    else:
                        done = now + latency.get(kind, usual)
                    if sets != NO_SCOREBOARD and done > warp.release[sets]:
                        warp.release[sets] = done
                    if frees != NO_SCOREBOARD:
                        # Operands are read long before memory answers.
                        loads = kind in ("load", "load from l2")
                        freed = now + (latency["shared"] if loads else done - now) / 2
                        if freed > warp.release[frees]:
                            warp.release[frees] = freed
                    warp.ready = now + stall
                    acted = True
                    if kind == "barrier":
                        block = warp.block
                        block.waiting.append(warp)
                        warp.ready = NEVER
                        if len(block.waiting) == block.running:
                            for each in block.waiting:
                                each.ready = now + latency["barrier"]
                            block.waiting.clear()
                    warp.place += 1
                    if warp.place == len(warp.trace):
                        warp.segment += 1
                        if warp.segment < len(warp.segments):
                            warp.trace, warp.place = warp.segments[warp.segment].code, 0
                            warp.signal = 0
                        else:
                            block = warp.block
                            block.running -= 1
                            mine.remove(warp)
                            if block.waiting and len(block.waiting) == block.running:
                                for each in block.waiting:
                                    each.ready = now + latency["barrier"]
                                block.waiting.clear()
                            if block.running == 0:
                                ended.append(now)
                                if started < self.count:
                                    start(now, block.schedulers)
                            break
                    if position:
                        mine.insert(0, mine.pop(position))
                    break
            now = now + 1 if acted else max(now + 1, wake if wake != float("inf") else now + 1)
        return ended
