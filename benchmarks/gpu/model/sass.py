"""Machine code as a graph: instructions with the compiler's schedule, basic blocks, loops.

Every instruction of sm_80 to sm_90 carries its schedule in its upper bits: cycles to wait after it, the
scoreboards that it sets and those that it waits for (Jia et al., "Dissecting the NVIDIA Volta GPU
Architecture via Microbenchmarking", 2018).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

SCHEDULE_BIT = 105
"""Where an instruction's schedule begins: 4 bits of stall, 1 of yield, then 3, 3 and 6 of scoreboards."""
NO_SCOREBOARD = 7

KINDS = {
    "hmma": "HMMA",
    "ldsm": "LDSM",
    "mufu": "MUFU F2F F2I I2F",
    "copy": "LDGSTS",
    "shared": "LDS STS",
    "shuffle": "SHFL",
    "load": "LDG LD",
    "store": "STG ST",
    "constant": "LDC ULDC",
    "fma": "FADD FMUL FFMA HFMA2 HADD2 HMUL2 IMAD",
    "barrier": "BAR",
    "close_group": "LDGDEPBAR",
    "wait_groups": "DEPBAR",
    "branch": "BRA EXIT RET CALL NOP BRX BSSY BSYNC WARPSYNC BREAK WARPGROUP",
    "special": "S2R S2UR CS2R R2UR VOTE VOTEU ELECT USETMAXREG FENCE SYNCS",
    "wgmma": "HGMMA",
    "wait_products": "WARPGROUP.DEPBAR",
    "await": "SYNCS.PHASECHK",
    "arrive": "SYNCS.ARRIVE",
    "box": "UTMALDG",
    "prefetch": "UBLKPF",
}
"""By kind, the names of instructions, some with their first modifier."""
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


@dataclass(frozen=True)
class Instruction:
    text: str
    stall: int
    sets: int
    """The scoreboard released when the result is available; NO_SCOREBOARD: none."""
    frees: int
    """The scoreboard released when the operands have been read."""
    waits: int
    """A bit for each scoreboard that must have been released."""

    @functools.cached_property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @functools.cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @functools.cached_property
    def kind(self) -> str:
        if self.text.startswith("@!PT"):  # never executed: only takes an issue slot
            return "branch"
        known = KIND_OF.get(".".join(self.opcode.split(".")[:2])) or KIND_OF.get(self.name)
        return known or ("uniform" if self.name.startswith("U") else "alu")

    @functools.cached_property
    def conditional(self) -> bool:
        return self.text.startswith("@") or re.search(r"BRA(\.\w+)*\s+!?U?P\d", self.text) is not None

    @functools.cached_property
    def target(self) -> str | None:
        found = re.search(r"\bBRA\b.*`\(([\w.$]+)\)", self.text)
        return found[1] if found else None


@dataclass
class Kernel:
    """Basic blocks in the order of the code, and the successors of each."""

    blocks: list[list[Instruction]] = field(default_factory=list)
    successors: list[list[int]] = field(default_factory=list)

    @functools.cached_property
    def predecessors(self) -> list[list[int]]:
        result: list[list[int]] = [[] for _ in self.blocks]
        for block, following in enumerate(self.successors):
            for each in following:
                result[each].append(block)
        return result

    @functools.cached_property
    def dominators(self) -> dict[int, set[int]]:
        """For every reachable block, the blocks on every path to it."""
        order, seen = [], {0}
        stack = [(0, iter(self.successors[0]))]
        while stack:
            block, following = stack[-1]
            each = next((each for each in following if each not in seen), None)
            if each is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(each)
                stack.append((each, iter(self.successors[each])))
        order.reverse()
        result = {block: set(order) for block in order} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                new = {block} | set.intersection(*(result[p] for p in self.predecessors[block] if p in seen))
                changed |= new != result[block]
                result[block] = new
        return result

    @functools.cached_property
    def loops(self) -> dict[int, set[int]]:
        """The blocks of each natural loop, by its first block."""
        result: dict[int, set[int]] = {}
        for block, over in self.dominators.items():
            for head in set(self.successors[block]) & over:
                body, stack = {head, block}, [block]
                while stack:
                    each = stack.pop()
                    if each == head:
                        continue
                    new = [p for p in self.predecessors[each] if p not in body and p in self.dominators]
                    body.update(new)
                    stack += new
                result.setdefault(head, set()).update(body)
        return result

    def count(self, blocks: Iterable[int], kind: str) -> int:
        return sum(each.kind == kind for block in blocks for each in self.blocks[block])


def parse(text: str) -> dict[str, Kernel]:
    """The kernels in a listing of ``nvdisasm -c -hex``, by mangled name."""
    sections = re.split(r"^\.text\.(\w+):\n", text, flags=re.MULTILINE)
    named = zip(sections[1::2], sections[2::2], strict=True)
    return {name: _kernel(body.split("\t.section\t")[0]) for name, body in named}


def _instruction(text: str, upper: int) -> Instruction:
    bits = upper >> (SCHEDULE_BIT - 64)
    return Instruction(text, bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


def _kernel(listing: str) -> Kernel:
    kernel, labels = Kernel(), {}
    current: list[Instruction] = []
    upper_half = r"\n\s+/\* 0x([0-9a-f]{16}) \*/"
    instruction = rf"\s+/\*[0-9a-f]{{4,}}\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{{16}} \*/{upper_half}"
    line = rf"^(?:(\.L_x_\d+):|{instruction})"

    def close() -> None:
        if current:
            kernel.blocks.append(current[:])
            current.clear()

    for label, text, upper in re.findall(line, listing, flags=re.MULTILINE):
        if label:
            close()
            labels[label] = len(kernel.blocks)
            continue
        current.append(_instruction(text, int(upper, 16)))
        if current[-1].name in ("BRA", "EXIT", "RET", "BRX"):
            close()
    close()
    for block, instructions in enumerate(kernel.blocks):
        last, following = instructions[-1], []
        if last.target in labels:
            following.append(labels[last.target])
        leaves = last.name in ("BRA", "EXIT", "RET") and not last.conditional and ".DIV" not in last.opcode
        if not leaves and block + 1 < len(kernel.blocks):
            following.append(block + 1)
        kernel.successors.append(following)
    return kernel
