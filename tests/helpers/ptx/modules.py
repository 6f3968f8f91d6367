"""Split the PTX of a built library or a source file into functions."""

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from helpers.machine_code import tool

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
_START = re.compile(r"^(?:\.visible |\.weak |\.extern )*\.(entry|func)\b", re.MULTILINE)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\s+([\w$]+)(?:\[(\d+)\])?")


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    """In the parameter block, in which both compilers use the same layout."""
    bytes: int


@dataclass(frozen=True)
class Function:
    name: str
    parameters: tuple[Parameter, ...]
    results: tuple[Parameter, ...]
    """The results of a function that kernels call; a kernel has none."""
    body: str
    """The text between its braces."""
    line: int
    """The line of the opening brace."""


class Module:
    """One file of PTX."""

    def __init__(self, text: str):
        self.text = re.sub(r"//[^\n]*", "", text)
        self.shared = frozenset(re.findall(r"\.extern \.shared[^;]*?\s([\w$]+)\[\];", self.text))
        """The names of dynamic shared memory."""
        self.kernels: dict[str, tuple[int, int]] = {}
        self._functions: dict[str, tuple[int, int]] = {}
        starts = list(_START.finditer(self.text))
        ends = [*(match.start() for match in starts), len(self.text)][1:]
        for match, end in zip(starts, ends, strict=True):
            span = match.start(), end
            head = self.text[match.end() : end].partition("{")[0]
            if ";" in head:
                continue  # declared, defined elsewhere
            found = re.match(r"\s*(?:\([^)]*\))?\s*([\w$]+)", head)
            assert found is not None, head[:200]
            (self.kernels if match.group(1) == "entry" else self._functions)[found.group(1)] = span

    def function(self, name: str) -> Function:
        """The PTX of a kernel, or of a function that a kernel calls."""
        start, end = self.kernels.get(name) or self._functions[name]
        head, _, rest = self.text[start:end].partition("{")
        results, parameters = re.fullmatch(
            rf"[^(]*?\.(?:entry|func)\s*(\([^)]*\))?\s*{re.escape(name)}\s*(\([^)]*\))?.*", head, re.DOTALL
        ).groups()  # type: ignore[union-attr]
        return Function(
            name,
            _parameters(parameters or ""),
            _parameters(results or ""),
            rest[: rest.rindex("}")],
            self.text.count("\n", 0, start + len(head)) + 1,
        )

    def source(self, name: str) -> str:
        """Everything that a kernel's translation depends on."""
        start, end = self.kernels[name]
        called = [f for f in self._functions if re.search(rf"\b{f}\b", self.text[start:end])]
        return "".join(
            self.text[slice(*span)] for span in [(start, end), *(self._functions[f] for f in called)]
        )


def _parameters(text: str) -> tuple[Parameter, ...]:
    found, offset = [], 0
    for align, bits, name, count in _PARAMETER.findall(text):
        size = BYTES[bits]
        step = int(align or size)
        offset = -(-offset // step) * step
        found.append(Parameter(name, offset, size * int(count or 1)))
        offset += found[-1].bytes
    return tuple(found)


def of_library(path: Path) -> tuple[Module, ...]:
    """The library's PTX for GPUs newer than its machine code."""
    cuobjdump = tool("cuobjdump")
    assert cuobjdump is not None
    with tempfile.TemporaryDirectory() as folder:
        _run([cuobjdump, "-xptx", "all", path.resolve()], cwd=folder)
        return tuple(Module(file.read_text()) for file in sorted(Path(folder).glob("*.ptx")))


@functools.cache
def of_source(source: Path, includes: tuple[Path, ...], arch: str = "compute_80") -> Module:
    """The PTX that nvcc generates from one file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.ptx"
        options = ["-std=c++17", f"-arch={arch}", *(f"-I{path}" for path in includes)]
        _run([tool("nvcc"), "-ptx", *options, source, "-o", out])
        return Module(out.read_text())


def _run(command: Iterable[object], cwd: str | None = None) -> None:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
