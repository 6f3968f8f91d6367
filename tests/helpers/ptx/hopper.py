"""Hopper instructions: barriers in shared memory, copies of boxes, products of warpgroups."""

import re
from collections.abc import Iterable

from helpers.ptx.registers import Scope, variable
from helpers.ptx.syntax import Instruction, Statement, UnknownInstruction, elements, instruction

_PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")
_COPY = "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"


def mbarrier(s: Scope, i: Instruction) -> str:
    if i.name == "mbarrier.init.shared::cta.b64":
        return f"d.mbarrier_init({_shared(s, i.operands[0])}, {s.value(i.operands[1], 'u32')});"
    if i.name == "mbarrier.try_wait.parity.shared::cta.b64":
        out, place, parity = i.operands
        return s.put(out, f"d.mbarrier_try_wait({_shared(s, place)}, {s.value(parity, 'u32')})", "pred")
    arrivals = {
        "mbarrier.arrive.shared::cta.b64": 2,
        "mbarrier.arrive.expect_tx.shared::cta.b64": 3,
        "mbarrier.arrive.release.cluster.shared::cluster.b64": 2,
    }
    if arrivals.get(i.name) != len(i.operands) or i.operands[0] != "_":
        raise UnknownInstruction(i.name)
    announced = s.value(i.operands[2], "u32") if len(i.operands) == 3 else "0"
    return f"d.mbarrier_arrive({_shared(s, i.operands[1])}, {announced});"


def fence(s: Scope, i: Instruction) -> str:
    known = {
        "fence.mbarrier_init.release.cluster": "d.mbarrier_init_fence();",
        "fence.proxy.async.shared::cta": "d.fence_proxy_async();",
    }
    if i.name not in known:
        raise UnknownInstruction(i.name)
    return known[i.name]


def peer_address(s: Scope, i: Instruction) -> str:
    if i.name != "mapa.shared::cluster.u32":
        raise UnknownInstruction(i.name)
    out, address, block = i.operands
    return s.put(out, f"d.peer_address({s.value(address, 'u32')}, {s.value(block, 'u32')})", "u32")


def copy_box(s: Scope, i: Instruction) -> str:
    to, source, barrier, *blocks = i.operands
    found = re.fullmatch(r"\[(%\w+),\s*\{([^}]*)\}\]", source)
    if i.name != _COPY + (".multicast::cluster" if blocks else "") or found is None:
        raise UnknownInstruction(i.name)
    mask = s.value(blocks[0], "u16") if blocks else "0"
    place = ", ".join(s.value(x.strip(), "u32") for x in found.group(2).split(","))
    places = f"{_shared(s, to)}, (const void*){s.value(found.group(1), 'u64')}, {_shared(s, barrier)}"
    return f"d.copy_box({places}, Word4{{{place}}}, {mask});"


def prefetch(s: Scope, i: Instruction) -> str:
    if i.name != "cp.async.bulk.prefetch.L2.global":
        raise UnknownInstruction(i.name)
    place, size = i.operands
    return f"d.prefetch((uint64_t){s.address(place, 'global')}, {s.value(size, 'u32')});"


def wgmma(s: Scope, i: Instruction) -> str:
    if i.name == "wgmma.fence.sync.aligned":
        return f"d.wgmma_fence({i.line});"
    if i.name == "wgmma.commit_group.sync.aligned":
        return f"d.wgmma_commit({i.line});"
    if i.name == "wgmma.wait_group.sync.aligned":
        # The sums may be in any of the registers to which they were moved.
        settled = " ".join(f"settle(d, {variable(x)});" for x in s.sums)
        return f"d.wgmma_wait({i.line}, {int(i.operands[0])}); {settled}"
    return _multiply(s, i)


def _multiply(s: Scope, i: Instruction) -> str:
    found = _PRODUCT.fullmatch(i.name)
    out, a, b, adds, *options = i.operands
    in_registers = a.startswith("{")
    expected = [["1", "1", "0"], ["1", "1", "1"]] if in_registers else [["1", "1", "0", x] for x in "01"]
    if found is None or options not in expected or len(elements(out)) != int(found.group(1)) // 2:
        raise UnknownInstruction(f"{i.name} with {', '.join(options)}")
    sums = ", ".join(s.value(x, "f32") for x in elements(out))
    words = ", ".join(s.value(x, "u32") for x in elements(a)) if in_registers else "0"
    a_descriptor = "0" if in_registers else s.value(a, "u64")
    product = (
        f"Product{{Element::{found.group(2)}, {found.group(1)}, {str(in_registers).lower()}, "
        f"{'true' if options[-1] == '1' else 'false'}, {s.value(adds, 'pred')}, {a_descriptor}, "
        f"{s.value(b, 'u64')}}}"
    )
    return (
        f"float sums[] = {{{sums}}}; const uint32_t a[4] = {{{words}}}; "
        f"d.wgmma({i.line}, {product}, sums, a); {s.put_all(out, 'sums[{}]', 'f32')}"
    )


def elect(s: Scope, i: Instruction) -> str:
    lane, _, elected = i.operands[0].partition("|")
    if i.name != "elect.sync" or lane != "_":
        raise UnknownInstruction(i.name)
    return s.put(elected, f"d.elect_one({s.value(i.operands[1], 'u32')})", "pred")


def set_registers(s: Scope, i: Instruction) -> str:
    known = {"setmaxnreg.inc.sync.aligned.u32": "true", "setmaxnreg.dec.sync.aligned.u32": "false"}
    if i.name not in known:
        raise UnknownInstruction(i.name)
    return f"d.set_registers({i.line}, {int(i.operands[0])}, {known[i.name]});"


def registers_of_sums(body: Iterable[Statement]) -> tuple[str, ...]:
    """The registers that may hold a product's sums: its own, and those connected to them by moves."""
    sums: set[str] = set()
    moves = []
    for statement in body:
        if "wgmma.mma_async" in statement.text:
            sums.update(elements(instruction(statement).operands[0]))
        elif (found := re.fullmatch(r"mov\.(?:f32|b32) (%f\d+), (%f\d+)", statement.text)) is not None:
            moves.append({*found.groups()})
    if not sums:
        return ()
    while any(move & sums and not move <= sums for move in moves):
        sums.update(*(move for move in moves if move & sums))
    return tuple(sorted(sums))


def _shared(s: Scope, place: str) -> str:
    """An address "[%r1+16]" in the shared state space."""
    found = re.fullmatch(r"\[(%\w+)(?:\s*\+\s*(-?\d+))?\]", place)
    if found is None:
        raise UnknownInstruction(f"address {place}")
    return f"{s.value(found.group(1), 'u32')} + (uint32_t)({found.group(2) or 0})"
