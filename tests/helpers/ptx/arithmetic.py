"""Instructions that compute in registers."""

from helpers.ptx.registers import CPP, Scope, size, unsigned
from helpers.ptx.syntax import Instruction, UnknownInstruction

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}
COMPARED = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
NEGATED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
"""Comparisons that are true for a NaN: the ordered comparison that each one negates."""


def compute(s: Scope, i: Instruction) -> str:
    """Apply the opcode's rule to the instruction's operands and type."""
    rule = RULES[i.parts[0]]
    modifiers = frozenset(i.parts[1:-1])
    return rule(s, i, i.type, modifiers)


def _two(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    op, (out, a, b) = i.parts[0], i.operands
    if t == "pred":
        word = {"and": "&&", "or": "||", "xor": "!="}[op]
        return s.put(out, f"{s.value(a, t)} {word} {s.value(b, t)}", t)
    if t in ("f32", "f64"):
        _only(i, modifiers, {"rn"})
        return s.put(out, f"{s.value(a, t)} {INFIX[op]} {s.value(b, t)}", t)
    if op == "mul":
        return _multiply(s, i, t, modifiers)
    _only(i, modifiers, set())
    if op == "div":
        return s.put(out, f"divide<{CPP[t]}>({s.value(a, t)}, {s.value(b, t)})", t)
    u = unsigned(t)
    return s.put(out, f"({CPP[u]})({s.value(a, u)} {INFIX[op]} {s.value(b, u)})", u)


def _product(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> tuple[str, str]:
    """Expression and type of the first two operands' product."""
    a, b = i.operands[1:3]
    if modifiers == {"lo"}:
        u = unsigned(t)
        wide = "uint64_t" if size(t) == 8 else "uint32_t"
        return f"({CPP[u]})(({wide}){s.value(a, u)} * ({wide}){s.value(b, u)})", u
    bits = 16 * size(t)
    wide = ("unsigned " if t[0] != "s" else "") + "__int128" if bits == 128 else CPP[f"{t[0]}{bits}"]
    whole = f"({wide}){s.value(a, t)} * ({wide}){s.value(b, t)}"
    if modifiers == {"wide"} and bits <= 64:
        return f"({CPP[f'u{bits}']})({whole})", f"u{bits}"
    if modifiers == {"hi"}:
        return f"({CPP[unsigned(t)]})(({whole}) >> {bits // 2})", unsigned(t)
    raise UnknownInstruction(i.name)


def _multiply(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    value, u = _product(s, i, t, modifiers)
    return s.put(i.operands[0], value, u)


def _multiply_add(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    value, u = _product(s, i, t, modifiers)
    return s.put(i.operands[0], f"({CPP[u]})({value} + {s.value(i.operands[3], u)})", u)


def _fused(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    names = {("f32", "rn"): "__builtin_fmaf", ("f64", "rn"): "__builtin_fma", ("f32", "rm"): "fma_down"}
    name = names.get((t, *modifiers))  # type: ignore[arg-type]
    if name is None:
        raise UnknownInstruction(i.name)
    return s.put(i.operands[0], f"{name}({', '.join(s.value(x, t) for x in i.operands[1:])})", t)


def _remainder(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    a, b = (s.value(x, t) for x in i.operands[1:])
    return s.put(i.operands[0], f"remainder<{CPP[t]}>({a}, {b})", t)


def _extreme(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    _only(i, modifiers, set())
    a, b = (s.value(x, t) for x in i.operands[1:])
    if t in ("f32", "f64"):  # the other operand if one is NaN
        return s.put(i.operands[0], f"__builtin_f{i.parts[0]}{'f' if t == 'f32' else ''}({a}, {b})", t)
    return s.put(i.operands[0], f"{a} {'<' if i.parts[0] == 'min' else '>'} {b} ? {a} : {b}", t)


def _shift(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    out, a, by = i.operands
    name = "shift_left" if i.parts[0] == "shl" else "shift_right"
    u = t if t[0] == "s" else unsigned(t)
    return s.put(out, f"{name}({s.value(a, u)}, {s.value(by, 'u32')})", u)


def _one(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    _only(i, modifiers, set())
    op, (out, a) = i.parts[0], i.operands
    if t == "pred":
        return s.put(out, f"!{s.value(a, t)}", t)
    if t in ("f32", "f64"):
        name = "-" if op == "neg" else "__builtin_fabs" + ("f" if t == "f32" else "")
        return s.put(out, f"{name}({s.value(a, t)})", t)
    u, zero = unsigned(t), f"({CPP[unsigned(t)]})0"
    minus = f"({CPP[u]})({zero} - {s.value(a, u)})"
    value = {"not": f"({CPP[u]})~{s.value(a, u)}", "neg": minus}
    value["abs"] = f"{s.value(a, t)} < 0 ? {minus} : {s.value(a, u)}"
    return s.put(out, value[op], u)


def _leading_zeros(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    x = s.value(i.operands[1], "u32")
    return s.put(i.operands[0], f"{x} == 0 ? 32u : (uint32_t)__builtin_clz({x})", "u32")


def _insert(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    return s.put(i.operands[0], f"insert_bits({', '.join(s.value(x, 'u32') for x in i.operands[1:])})", "u32")


def _select(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    out, a, b, condition = i.operands
    u = unsigned(t)
    return s.put(out, f"{s.value(condition, 'pred')} ? {s.value(a, u)} : {s.value(b, u)}", u)


def _compare(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    if len(modifiers) != 1 or "|" in i.operands[0]:
        raise UnknownInstruction(i.name)
    (how,) = modifiers
    a, b = (s.value(x, t) for x in i.operands[1:])
    if t not in ("f32", "f64"):
        return s.put(i.operands[0], f"{a} {COMPARED[how]} {b}", "pred")
    ordered = NEGATED.get(how, how)
    # C's != is true for a NaN; PTX's ne is not.
    value = f"({a} < {b} || {a} > {b})" if ordered == "ne" else f"({a} {COMPARED[ordered]} {b})"
    return s.put(i.operands[0], f"!{value}" if how in NEGATED else value, "pred")


def _root(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    if modifiers != {"rn"}:
        raise UnknownInstruction(i.name)
    suffix = "f" if t == "f32" else ""
    return s.put(i.operands[0], f"__builtin_sqrt{suffix}({s.value(i.operands[1], t)})", t)


def _approximate(s: Scope, i: Instruction, t: str, modifiers: frozenset[str]) -> str:
    op, x = i.parts[0], s.value(i.operands[1], t)
    if op == "rcp" and modifiers == {"rn"}:
        return s.put(i.operands[0], f"({CPP[t]})1 / {x}", t)
    if modifiers != {"approx", "ftz"} or (t == "f64" and op != "rcp"):
        raise UnknownInstruction(i.name)
    name = {"ex2": "exp2", "lg2": "log2", "rcp": "rcp"}[op]
    return s.put(i.operands[0], f"{name}_approx({x})", t)


def _only(i: Instruction, modifiers: frozenset[str], allowed: set[str]) -> None:
    if not modifiers <= allowed:
        raise UnknownInstruction(i.name)


RULES = {
    **dict.fromkeys(("add", "sub", "mul", "div", "and", "or", "xor"), _two),
    **dict.fromkeys(("min", "max"), _extreme),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("not", "neg", "abs"), _one),
    **dict.fromkeys(("ex2", "lg2", "rcp"), _approximate),
    "rem": _remainder,
    "mad": _multiply_add,
    "fma": _fused,
    "clz": _leading_zeros,
    "bfi": _insert,
    "selp": _select,
    "setp": _compare,
    "sqrt": _root,
}
