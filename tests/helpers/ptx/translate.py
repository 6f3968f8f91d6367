"""A kernel's PTX as C++: one function is one thread (tests/emulator/include/emulator/ptx.h)."""

import re
from collections.abc import Callable

from helpers.ptx import arithmetic, collective, hopper, movement
from helpers.ptx.modules import Function, Module
from helpers.ptx.registers import CPP, Scope
from helpers.ptx.syntax import Instruction, Statement, UnknownInstruction, instruction, statements

ENTRY = "pmf_translated"

RULES: dict[str, Callable[[Scope, Instruction], str]] = {
    **dict.fromkeys(arithmetic.RULES, arithmetic.compute),
    "mov": movement.move,
    "ld": movement.load,
    "st": movement.store,
    "cvta": movement.convert_address,
    "cvt": movement.convert,
    "mma": collective.multiply,
    "ldmatrix": collective.load_matrices,
    "cp": collective.copy,
    "bar": collective.barrier,
    "barrier": collective.barrier,
    "shfl": collective.shuffle,
    "vote": collective.vote,
    "mbarrier": hopper.mbarrier,
    "fence": hopper.fence,
    "wgmma": hopper.wgmma,
    "elect": hopper.elect,
    "setmaxnreg": hopper.set_registers,
    "mapa": hopper.peer_address,
    "bra": lambda s, i: f"goto {_label(i.operands[0])};",
    "ret": lambda s, i: "return;",
    "trap": lambda s, i: "d.trap();",
}

_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(.+)")
_ARRAY = re.compile(r"\.(?:local|param)\s+(?:\.align (\d+) )?\.[a-z](\d+) ([\w$]+)(?:\[(\d+)\])?")
_CALL = re.compile(r"call(?:\.uni)? (?:\(([^)]*)\), )?([\w$]+)(?:, \(([^)]*)\))?")


def translate(module: Module, kernel: str, called: str) -> str:
    """C++ for the kernel and everything it calls; `called` names the PTX in messages."""
    parts: list[str] = []
    written: set[str] = set()

    def write(name: str) -> None:
        if name in written:
            return
        written.add(name)
        function = module.function(name)
        body = _body(function, module.shared, write, entry=name == kernel)
        line = f'#line {function.line} "{called}"\n'
        parts.append(f"{line}{_signature(function, name == kernel)} {{\n{body}\n}}\n")

    write(kernel)
    return (
        '#include "emulator/ptx.h"\nusing namespace pmf::emulator;\nusing namespace pmf::emulator::ptx;\n'
        + "\n".join(parts)
    )


def _signature(function: Function, entry: bool) -> str:
    if entry:
        return f'extern "C" void {ENTRY}(const Device& d, const unsigned char* parameters)'
    places = ", ".join(f"unsigned char* {p.name}" for p in (*function.results, *function.parameters))
    return f"static void {function.name}(const Device& d, {places})"


def _body(function: Function, shared: frozenset[str], write: Callable[[str], None], entry: bool) -> str:
    if entry:
        places = {p.name: f"(parameters + {p.offset})" for p in function.parameters}
    else:
        places = {p.name: p.name for p in (*function.results, *function.parameters)}
    scope = Scope(places, shared)
    body = tuple(statements(function.body, function.line))
    scope.sums = hopper.registers_of_sums(body)
    lines: list[str] = []
    at = function.line
    for statement in body:
        try:
            text = _statement(scope, statement, write)
        except (UnknownInstruction, KeyError, ValueError) as problem:
            raise UnknownInstruction(
                f"line {statement.line} of the PTX, '{statement.text}': {problem}"
            ) from problem
        # One line of C++ per line of PTX, so that one #line suffices.
        while at < statement.line:
            lines.append("\n")
            at += 1
        lines.append(text + " ")
    return "".join(lines)


def _statement(scope: Scope, statement: Statement, write: Callable[[str], None]) -> str:
    text = statement.text
    if text in ("{", "}"):
        return text
    if text.endswith(":"):
        return f"{_label(text[:-1])}: ;"
    if (found := _REGISTERS.fullmatch(text)) is not None:
        return " ".join(_declare(scope, found.group(1), name.strip()) for name in found.group(2).split(","))
    if (found := _ARRAY.fullmatch(text)) is not None:
        align, bits, name, count = found.groups()
        size = int(bits) // 8
        scope.places[name] = name
        return f"alignas({align or size}) unsigned char {name}[{size * int(count or 1)}];"
    if text.startswith((".pragma", ".loc")):
        return ""
    if (found := _CALL.fullmatch(text)) is not None:
        results, name, arguments = found.groups()
        write(name)
        places = [
            x.strip() for x in (*(results or "").split(","), *(arguments or "").split(",")) if x.strip()
        ]
        return f"{name}({', '.join(['d', *places])});"
    i = instruction(statement)
    rule = RULES.get(i.parts[0])
    if rule is None:
        raise UnknownInstruction(f"no rule for {i.name}")
    done = rule(scope, i)
    if not i.guard:
        return f"{{ {done} }}" if "const " in done else done
    negated, register = i.guard.startswith("!"), i.guard.lstrip("!")
    return f"if ({'!' if negated else ''}{scope.value(register, 'pred')}) {{ {done} }}"


def _declare(scope: Scope, type_: str, name: str) -> str:
    found = re.fullmatch(r"([%\w$]+)(?:<(\d+)>)?", name)
    if found is None or type_ not in CPP:
        raise UnknownInstruction(f"registers {name} of type {type_}")
    return scope.declare(type_, found.group(1), int(found.group(2)) if found.group(2) else None)


def _label(name: str) -> str:
    return name.replace("$", "").replace("%", "_")
