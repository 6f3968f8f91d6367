"""The statements of a PTX function, one by one."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LABEL = re.compile(r"([$%\w]+):")
_GUARD = re.compile(r"@(!?)(%\w+)\s+")


class UnknownInstruction(Exception):
    """The translator has no rule for an instruction; rules are in tests/helpers/ptx."""


@dataclass(frozen=True)
class Statement:
    line: int
    text: str
    """"{", "}", "label:", or a directive or an instruction without its semicolon."""


@dataclass(frozen=True)
class Instruction:
    line: int
    guard: str
    """"", "%p1" or "!%p1"."""
    name: str
    """As written: "mul.wide.s32"."""
    operands: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")

    @property
    def type(self) -> str:
        """The type suffix of the name."""
        return self.name.rpartition(".")[2]


def statements(body: str, line: int) -> Iterator[Statement]:
    at = 0
    while True:
        start = at
        while at < len(body) and body[at].isspace():
            at += 1
        line += body.count("\n", start, at)
        if at == len(body):
            return
        if body[at] in "{}":
            yield Statement(line, body[at])
            at += 1
        elif (label := _LABEL.match(body, at)) is not None:
            yield Statement(line, label.group())
            at = label.end()
        else:
            end = body.index(";", at)
            yield Statement(line, " ".join(body[at:end].split()))
            line += body.count("\n", at, end)
            at = end + 1


def instruction(statement: Statement) -> Instruction:
    text, guard = statement.text, ""
    if (found := _GUARD.match(text)) is not None:
        guard, text = found.group(1) + found.group(2), text[found.end() :]
    name, _, rest = text.partition(" ")
    return Instruction(statement.line, guard, name, tuple(_split(rest)))


def elements(operand: str) -> list[str]:
    """The elements of "{%r1, %r2}", or the operand itself."""
    return _split(operand[1:-1]) if operand.startswith("{") else [operand]


def _split(text: str) -> list[str]:
    parts, depth, last = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[last:i].strip())
            last = i + 1
    rest = text[last:].strip()
    return [*parts, rest] if rest else parts
