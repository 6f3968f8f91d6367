"""Instructions that move data between registers, types and memories."""

from helpers.ptx.registers import CPP, Scope, size, unsigned
from helpers.ptx.syntax import Instruction, UnknownInstruction, elements

SPACES = ("param", "global", "shared", "local")
# Modifiers that do not affect the value: cache hints, and orderings that emulated lanes have anyway.
HINTS = {"nc", "ca", "cg", "cs", "wb", "wt", "volatile", "weak"}


def move(s: Scope, i: Instruction) -> str:
    out, value = i.operands
    if value.startswith("{"):
        parts, t = elements(value), i.type
        part = f"u{8 * size(t) // len(parts)}"
        terms = (
            f"(({CPP[unsigned(t)]}){s.value(x, part)} << {8 * size(part) * k})" for k, x in enumerate(parts)
        )
        return s.put(out, " | ".join(terms), unsigned(t))
    if out.startswith("{"):
        t = unsigned(i.type)
        part = f"u{8 * size(t) // len(elements(out))}"
        puts = s.put_all(out, f"({CPP[part]})(word >> {{}} * {8 * size(part)})", part)
        return f"const {CPP[t]} word = {s.value(value, t)}; {puts}"
    return s.put(out, s.value(value, i.type), i.type)


def _access(i: Instruction) -> tuple[str, str, int]:
    """State space, type and number of elements of a load or a store."""
    space, count = "generic", 1
    for part in i.parts[1:-1]:
        if part in SPACES:
            space = part
        elif part in ("v2", "v4"):
            count = int(part[1])
        elif part not in HINTS:
            raise UnknownInstruction(i.name)
    return space, i.type, count


def load(s: Scope, i: Instruction) -> str:
    space, t, count = _access(i)
    out, place = i.operands
    # A named location is inside its variable; a pointer may point anywhere.
    named = space in ("param", "local") and "%" not in place
    read = f"fetch<{CPP[t]}, {count}>(" if named else f"load<{CPP[t]}, {count}>(d, "
    return f"const auto loaded = {read}{s.address(place, space)}); {s.put_all(out, 'loaded.of[{}]', t)}"


def store(s: Scope, i: Instruction) -> str:
    space, t, count = _access(i)
    place, value = i.operands
    values = ", ".join(s.value(x, t) for x in elements(value))
    vector = f"const Vector<{CPP[t]}, {count}> stored = {{{{{values}}}}};"
    if space in ("param", "local") and "%" not in place:
        return f"{vector} __builtin_memcpy({s.address(place, space)}, &stored, sizeof(stored));"
    return f"{vector} store(d, {s.address(place, space)}, stored);"


def convert_address(s: Scope, i: Instruction) -> str:
    out, value = i.operands
    spaces = [part for part in i.parts if part in SPACES]
    if spaces != ["shared"]:  # global, local and param use the generic address
        return s.put(out, s.value(value, "u64"), "u64")
    if "to" in i.parts:
        return s.put(out, f"(uint64_t)shared_address(d, {s.value(value, 'u64')})", "u64")
    return s.put(out, f"(uint64_t)shared_at(d, {s.value(value, 'u32')})", "u64")


def convert(s: Scope, i: Instruction) -> str:
    modifiers, (to, source) = frozenset(i.parts[1:-2]), i.parts[-2:]
    out, x = i.operands[0], i.operands[1]
    known = _CONVERSIONS.get((modifiers, to, source))
    if known is not None:
        values = [s.value(v, source) for v in i.operands[1:]]
        return s.put(out, known[0].format(*values), known[1])
    if {to, source} & {"f32", "f64"} or to not in CPP or source not in CPP:
        is_integer = source in CPP and source[0] in "su" and to in ("f32", "f64")
        if is_integer and modifiers == {"rn"}:
            return s.put(out, f"({CPP[to]}){s.value(x, source)}", to)
        raise UnknownInstruction(i.name)
    if modifiers:
        raise UnknownInstruction(i.name)
    # The source type decides the extension, the destination type the width.
    return s.put(out, f"({CPP[to]}){s.value(x, source)}", to)


_RN = frozenset({"rn"})
_CONVERSIONS = {
    (_RN, "bf16x2", "f32"): ("(uint32_t)to_bf16({0}) << 16 | to_bf16({1})", "u32"),
    (_RN, "f16x2", "f32"): ("(uint32_t)d.to_half({0}) << 16 | d.to_half({1})", "u32"),
    (_RN, "bf16", "f32"): ("to_bf16({0})", "u16"),
    (_RN, "f16", "f32"): ("d.to_half({0})", "u16"),
    (frozenset(), "f32", "f16"): ("d.from_half({0})", "f32"),
    (frozenset(), "f32", "bf16"): ("as_float((uint32_t){0} << 16)", "f32"),
    (frozenset({"rna"}), "tf32", "f32"): ("to_tf32({0})", "u32"),
    (frozenset({"sat"}), "f32", "f32"): ("saturate({0})", "f32"),
    (_RN, "f32", "f64"): ("(float){0}", "f32"),
    (frozenset(), "f64", "f32"): ("(double){0}", "f64"),
    (frozenset({"rzi"}), "f64", "f64"): ("__builtin_trunc({0})", "f64"),
    (frozenset({"rzi"}), "s32", "f32"): ("to_s32({0})", "s32"),
}
"""The value and its type, by modifiers and types."""
for _type in ("f16", "bf16"):
    CPP.setdefault(_type, "uint16_t")  # stored as bits
