"""Instructions executed by several threads, and asynchronous copies."""

from helpers.ptx import hopper
from helpers.ptx.registers import Scope
from helpers.ptx.syntax import Instruction, UnknownInstruction, elements

MMA = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": "bf16",
    "m16n8k16.row.col.f32.f16.f16.f32": "f16",
    "m16n8k8.row.col.f32.tf32.tf32.f32": "tf32",
}
SHUFFLES = {"bfly": "exclusive_or", "idx": "index"}


def multiply(s: Scope, i: Instruction) -> str:
    kind = MMA.get(i.name.removeprefix("mma.sync.aligned."))
    out, a, b, c = i.operands
    if kind is None or [len(elements(x)) for x in i.operands] != [4, 4, 2, 4]:
        raise UnknownInstruction(i.name)
    sums = ", ".join(s.value(x, "f32") for x in elements(c))
    words = ", ".join(s.value(x, "u32") for x in elements(a))
    low, high = (s.value(x, "u32") for x in elements(b))
    return (
        f"const Float4 sum = d.multiply({i.line}, Element::{kind}, Float4{{{sums}}}, Word4{{{words}}}, "
        f"(uint64_t){high} << 32 | {low}); {s.put_all(out, 'sum[{}]', 'f32')}"
    )


def load_matrices(s: Scope, i: Instruction) -> str:
    out, row = i.operands
    *kind, space, t = i.name.removeprefix("ldmatrix.sync.aligned.m8n8.").split(".")
    if space not in ("shared", "shared::cta") or t != "b16" or kind[1:] not in ([], ["trans"]):
        raise UnknownInstruction(i.name)
    count, transposed = int(kind[0][1:]), "true" if "trans" in kind else "false"
    if len(elements(out)) != count:
        raise UnknownInstruction(f"{i.name} to {out}")
    return (
        f"const Word4 words = d.load_matrices({i.line}, {s.address(row, 'shared')}, {count}, {transposed}); "
        f"{s.put_all(out, 'words[{}]', 'u32')}"
    )


def copy(s: Scope, i: Instruction) -> str:
    if i.name == "cp.async.commit_group":
        return "d.commit_copies();"
    if i.name == "cp.async.wait_group":
        return f"d.wait_for_copies({int(i.operands[0])});"
    if i.name.startswith("cp.async.bulk.prefetch"):
        return hopper.prefetch(s, i)
    if i.name.startswith("cp.async.bulk"):
        return hopper.copy_box(s, i)
    if i.name != "cp.async.cg.shared.global" or len(i.operands) not in (3, 4):
        raise UnknownInstruction(i.name)
    to, source, *sizes = i.operands
    size, given = (s.value(x, "u32") for x in (sizes[0], sizes[-1]))
    return f"d.copy({s.address(to, 'shared')}, {s.address(source, 'global')}, {size}, {given});"


def barrier(s: Scope, i: Instruction) -> str:
    if i.name == "bar.warp.sync":
        return f"d.sync_warp({s.value(i.operands[0], 'u32')});"
    if i.name in ("barrier.cluster.arrive.release.aligned", "barrier.cluster.wait.acquire.aligned"):
        return f"d.cluster_{i.parts[2]}({i.line});"
    if i.name not in ("bar.sync", "barrier.sync.aligned"):
        raise UnknownInstruction(i.name)
    number, threads = (s.value(x, "u32") for x in (*i.operands, "0")[:2])
    return f"d.barrier({i.line}, {number}, {threads});"


def shuffle(s: Scope, i: Instruction) -> str:
    how = SHUFFLES.get(i.parts[2])
    if how is None or i.type != "b32":
        raise UnknownInstruction(i.name)
    out, _, inside = i.operands[0].partition("|")
    value = f"d.shuffle(Shuffle::{how}, {', '.join(s.value(x, 'u32') for x in i.operands[1:])})"
    said = s.put(inside or "_", "true", "pred")  # the source lane exists, as all 32 are active
    return f"{said} {s.put(out, value, 'u32')}"


def vote(s: Scope, i: Instruction) -> str:
    if i.name != "vote.sync.any.pred":
        raise UnknownInstruction(i.name)
    out, value, lanes = i.operands
    return s.put(out, f"d.ballot({s.value(value, 'pred')}, {s.value(lanes, 'u32')}) != 0", "pred")
