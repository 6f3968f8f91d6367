"""PTX types, registers and addresses as C++ expressions."""

import re
from collections.abc import Mapping

from helpers.ptx.syntax import UnknownInstruction, elements

CPP = {
    "pred": "bool", "f32": "float", "f64": "double",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
}  # fmt: skip
"""The C++ type of a PTX type."""

SPECIAL = {
    f"%{name}.{axis}": f"d.{function}().{axis}"
    for name, function in (
        ("tid", "thread_index"), ("ctaid", "block_index"), ("ntid", "block_size"), ("nctaid", "grid_size"),
    )
    for axis in "xyz"
}  # fmt: skip

_ADDRESS = re.compile(r"\[([%\w$]+)(?:\s*\+\s*(-?\d+))?\]")


def size(type_: str) -> int:
    """Bytes of a PTX type."""
    return int(type_[1:]) // 8


def unsigned(type_: str) -> str:
    """The unsigned integer type of the same size, which wraps around; others unchanged."""
    return type_ if type_ in ("f32", "f64", "pred") else f"u{type_[1:]}"


class Scope:
    """The meaning of names inside a function."""

    def __init__(self, places: Mapping[str, str], shared: frozenset[str]):
        self.places = dict(places)
        """The address of each parameter and local array, an expression of type (unsigned) char*."""
        self.shared = shared
        self.registers: dict[str, str] = {}
        """The registers' C++ types."""
        self.sums: tuple[str, ...] = ()
        """The registers that may hold the sums of a warpgroup's product."""

    def declare(self, type_: str, name: str, count: int | None) -> str:
        names = [name] if count is None else [f"{name}{i}" for i in range(count)]
        self.registers |= dict.fromkeys(names, CPP[type_])
        values = ", ".join(f"{variable(n)} = unwritten_{CPP[type_]}" for n in names)
        return f"{CPP[type_]} {values};" if names else ""

    def value(self, operand: str, type_: str) -> str:
        """The operand, a register or a number or a name, as a value of the type."""
        cpp = CPP[type_]
        if operand in SPECIAL:
            return f"({cpp}){SPECIAL[operand]}"
        if operand in self.registers:
            return _converted(variable(operand), self.registers[operand], cpp)
        if operand in self.places:
            return f"({cpp})(uint64_t){self.places[operand]}"
        if operand in self.shared:
            return f"({cpp})kSharedWindow"
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return _converted(f"0x{operand[2:]}u", "uint32_t", cpp)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
            return _converted(f"0x{operand[2:]}ull", "uint64_t", cpp)
        if re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            return f"({cpp})0x{number & (2**64 - 1):x}ull"
        raise UnknownInstruction(f"operand {operand}")

    def put(self, operand: str, value: str, type_: str) -> str:
        """A statement that writes the register, or nothing for "_"."""
        if operand == "_":
            return f"(void)({value});"
        return f"{variable(operand)} = {_converted(f'({value})', CPP[type_], self.registers[operand])};"

    def put_all(self, operand: str, values: str, type_: str) -> str:
        """Assign `values` with {} = i to element i of a vector, or to the register."""
        return " ".join(self.put(x, values.format(i), type_) for i, x in enumerate(elements(operand)))

    def address(self, operand: str, space: str) -> str:
        """The address "[%rd1+16]" in a state space, as unsigned char*."""
        found = _ADDRESS.fullmatch(operand)
        if found is None:
            raise UnknownInstruction(f"address {operand}")
        base, offset = found.group(1), int(found.group(2) or 0)
        if base in self.places:
            return f"((unsigned char*){self.places[base]} + ({offset}))"
        if space == "shared":
            return f"shared_at(d, {self.value(base, 'u32')} + (uint32_t)({offset}))"
        return f"((unsigned char*)({self.value(base, 'u64')} + (int64_t)({offset})))"


def variable(register: str) -> str:
    return "v_" + register.lstrip("%").replace("$", "_")


def _converted(value: str, has: str, wanted: str) -> str:
    """Registers hold bits: a float is never converted, only reinterpreted at its size."""
    if has == wanted:
        return value
    floats = ("float", "double")
    if (has in floats) != (wanted in floats):
        if has in floats:
            return f"({wanted})bits_of({value})"
        return f"as_{wanted}(({'uint32_t' if wanted == 'float' else 'uint64_t'}){value})"
    if has in floats:
        raise UnknownInstruction(f"a {has} where a {wanted} is needed")
    return f"({wanted}){value}"
