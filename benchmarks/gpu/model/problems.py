"""What the blocks of a launch do: which parts of the kernel each warp runs, and how often."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil

from . import paths
from .machine import Multiprocessor, Rates, Trace
from .sass import Kernel

WARP = 32
ROWS = DEPTH = 16
"""The size of a matrix instruction on 16-bit factors; it has 8 columns."""
AHEAD = 2
"""Tiles in flight before the first is used: the ring has three."""
SEEDS = 2
GENERATIONS = 5
"""Successive blocks in each slot of a multiprocessor; the first and the last are not counted."""


@dataclass(frozen=True)
class Launch:
    """A launch as the launcher plans it."""

    kernel: str
    blocks: int
    threads: int
    tile: tuple[int, int]
    """Rows of a block; rows of a tile that streams past them."""
    blocks_per_processor: int

    @property
    def warps(self) -> int:
        return self.threads // WARP


@dataclass(frozen=True)
class Problem:
    """Attention in bfloat16: `heads` over all samples, each with `tokens` queries and keys."""

    name: str
    heads: int
    tokens: int
    width: int
    tangent: bool = False
    backward: bool = False

    def limit_seconds(self, rates: Rates) -> float:
        """The larger of the products' time and the bytes' time, if nothing else took any."""
        products = (15 if self.tangent else 5) if self.backward else (6 if self.tangent else 2)
        tensors = (16 if self.tangent else 8) if self.backward else (8 if self.tangent else 4)
        flops = 2.0 * products * self.heads * self.tokens**2 * self.width
        size = 2.0 * tensors * self.heads * self.tokens * self.width
        return max(flops / rates["matrix_flops"], size / rates["memory_bytes"])


class UnexpectedCodeError(Exception):
    """The machine code does not match what the tables here say about its kernel."""


def sweeps(kernel: str, unit: int, columns: int, width: int) -> list[int]:
    """The number of matrix instructions per warp and tile in each sweep, by the kernel's demangled name."""
    each = (unit // ROWS) * (columns // 8) * (width // DEPTH)
    sums = (unit // ROWS) * (columns // DEPTH)  # row sums, as products with ones
    tangent = re.findall("true|false", kernel)[0] == "true"  # the first flag of the forward and key kernels
    if "attention_forward" in kernel:
        return [6 * each + 2 * sums if tangent else 2 * each + sums]
    if "attention_backward_tangents" in kernel:
        return [6 * each, 11 * each + 2 * sums]
    if "attention_backward_queries" in kernel:
        return [4 * each + 2 * sums]
    return [12 * each if tangent else 4 * each]


def programs(kernel: Kernel, launch: Launch, problem: Problem) -> list[list[Trace]]:
    """What each warp of a block runs, from the kernel's first instruction to its last."""
    loops = paths.product_loops(kernel)
    unit, columns = launch.tile[0] // launch.warps, launch.tile[1]
    expected = sweeps(launch.kernel, unit, columns, problem.width)
    if len(loops) != len(expected):
        raise UnexpectedCodeError(f"{launch.kernel}: {len(loops)} loops over tiles, not {len(expected)}")
    every, tiles = range(len(kernel.blocks)), ceil(problem.tokens / columns)
    rows_at_once = launch.threads // (problem.width // 8)
    program, at = [], 0
    for index, (head, products) in enumerate(zip(loops, expected, strict=True)):
        before = paths.hottest(kernel, at, {head}, every, True)
        program.append(Trace(paths.expand(kernel, before, ceil(launch.tile[0] / rows_at_once))))
        at = paths.exit_of(kernel, head)
        ends = set(loops[index + 1 :][:1])
        after = paths.hottest(kernel, at, ends, every, False)
        # The last tile may have separate code after the loop.
        inside = tiles - (kernel.count(after, "hmma") > 0)
        for copying, count in ((True, max(0, tiles - AHEAD)), (False, inside - max(0, tiles - AHEAD))):
            path = paths.hottest(kernel, head, {head}, kernel.loops[head], copying)
            trace = paths.expand(kernel, path, ceil(columns / rows_at_once), products)
            found = sum(each.kind == "hmma" for each in trace)
            if found != products:
                raise UnexpectedCodeError(f"{launch.kernel}: {found} products a tile, not {products}")
            program += [Trace(trace)] * count
    program.append(Trace(paths.expand(kernel, after, 1, None if inside == tiles else products)))
    return [program] * launch.warps


def predict(kernel: Kernel, launch: Launch, problem: Problem, rates: Rates) -> float:
    """Seconds of one launch. All warps are assumed to work, even idle ones in a last block."""
    resident = max(1, launch.blocks_per_processor)
    a_cycle = 1 / rates["processors"] / rates["clock_hz"]
    # Data that one block of a head has read is in the L2 cache for the others.
    blocks_a_head = launch.blocks / problem.heads
    copies = min(rates["l2_bytes"], rates["memory_bytes"] * blocks_a_head) * a_cycle
    traces = programs(kernel, launch, problem)
    machine = Multiprocessor(traces, resident, GENERATIONS * resident, rates, copies)
    counted, block_cycles = (GENERATIONS - 2) * resident, 0.0
    for seed in range(SEEDS):
        ends = machine.ends(seed)
        block_cycles += (ends[-resident - 1] - ends[resident - 1]) / counted / SEEDS
    return ceil(launch.blocks / rates["processors"]) * block_cycles / rates["clock_hz"]
