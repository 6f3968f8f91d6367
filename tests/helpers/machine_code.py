"""The machine code of a compiled library, as shown by NVIDIA's tools.

cuobjdump reports each kernel's resources, nvdisasm its instructions. They come with the CUDA toolkit, with
Triton, and as the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, which the extra "test" installs.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ARCHITECTURES = ("sm_80", "sm_90a")
RESERVED = {"sm_80": 0, "sm_90a": 1024}
"""Bytes that the tools add to every kernel with shared memory: the driver's share, from sm_90 on."""


@dataclass(frozen=True)
class Usage:
    """The resources that the compiler assigned to a kernel."""

    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread, including spilled registers."""
    local: int
    """Bytes per thread besides the stack."""
    shared: int
    """Static shared memory: bytes per block that are not requested at launch."""


@dataclass(frozen=True)
class Bounds:
    """__launch_bounds__: the maximum threads per block and minimum blocks per multiprocessor."""

    threads: int
    blocks: int


@functools.cache
def tool(name: str) -> str | None:
    """Find a program of the CUDA toolkit."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    folders += [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    folders.append(Path("/usr/local/cuda/bin"))
    for packages in map(Path, sys.path):
        folders += sorted(packages.glob("nvidia/*/bin"), reverse=True)
        folders.append(packages / "triton/backends/nvidia/bin")
    return shutil.which(name, path=os.pathsep.join(map(str, folders)))


def absent(reason: str) -> NoReturn:
    """Skip a test that needs CUDA machine code or tools; fail instead in CI that requires the kernels."""
    if os.environ.get("CI") and os.environ.get("PMF_CUDA") == "on":
        pytest.fail(reason)
    pytest.skip(reason)


class MachineCode:
    """The CUDA kernels in a library or object file, by mangled name."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def _usage(self) -> dict[str, dict[str, Usage]]:
        found: dict[str, dict[str, Usage]] = {}
        kernels: dict[str, Usage] = {}
        number = r"(\d+)"
        pattern = (
            rf"arch = (\S+)|Function (\S+):\s+REG:{number} STACK:{number} SHARED:{number} LOCAL:{number}"
        )
        for arch, name, *numbers in re.findall(pattern, self._cuobjdump("-res-usage")):
            if arch:
                kernels = found.setdefault(arch, {})
            else:
                kernels[name] = Usage(*(int(numbers[i]) for i in (0, 1, 3, 2)))
        return found

    def usage(self, architecture: str) -> dict[str, Usage]:
        reserved = RESERVED[architecture]
        return {
            name: Usage(u.registers, u.stack, u.local, max(0, u.shared - reserved))
            for name, u in self._usage.get(architecture, {}).items()
        }

    @functools.cached_property
    def bounds(self) -> dict[str, Bounds]:
        """The bounds of kernels present as PTX."""
        found = {}
        text = self._cuobjdump("-ptx")
        for name, directives in re.findall(r"\.entry (\w+)\(.*?\n\)\n([^{]*)\{", text, flags=re.DOTALL):
            threads = re.search(r"\.maxntid (\d+), 1, 1", directives)
            blocks = re.search(r"\.minnctapersm (\d+)", directives)
            found[name] = Bounds(int(threads[1]) if threads else 1024, int(blocks[1]) if blocks else 1)
        return found

    @functools.cached_property
    def hosts(self) -> dict[int, str]:
        """Kernels by the address of their host function, which identifies launches."""
        kernels = set().union(*self._usage.values())
        found = {}
        for line in _read("nm", self.path).splitlines():
            place, _, name = line.rpartition(" ")
            # The host function of a template is static: its mangled name has an L that the kernel's lacks.
            kernel = name if name in kernels else re.sub(r"L(?=\d)", "", name, count=1)
            if kernel in kernels and " t " in line.lower():
                found[int(place.split()[0], 16)] = kernel
        return found

    @functools.cached_property
    def registered(self) -> set[str]:
        """The kernels that the library registers with the CUDA runtime: all that it can launch."""
        strings = _read("readelf", "-p", ".rodata", "-W", self.path)
        return set(re.findall(r"(_Z\w+)$", strings, flags=re.MULTILINE))

    def instructions(self, architecture: str, kernels: Iterable[str]) -> dict[str, Counter[str]]:
        """Counts of a kernel's instructions, by disassembled name with modifiers."""
        wanted, found = set(kernels), {}
        with tempfile.TemporaryDirectory() as folder:
            self._cuobjdump("-xelf", "all", "-arch", architecture, folder=folder)
            for path in sorted(Path(folder).glob("*.cubin")):
                symbols = (line.split() for line in _read("readelf", "-s", "-W", path).splitlines())
                indices = [line[0].rstrip(":") for line in symbols if "FUNC" in line and line[-1] in wanted]
                if not indices:
                    continue
                text = _read(_need("nvdisasm"), "-c", "-fun", ",".join(indices), path)
                for section in re.split(r"^//-+ \.text\.", text, flags=re.MULTILINE)[1:]:
                    name, _, body = section.partition(" ")
                    # "/*0a40*/  @!P0 LDG.E.128 R4, [R2.64] ;"
                    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)"
                    found[name] = Counter(re.findall(pattern, body, flags=re.MULTILINE))
        return found

    def _cuobjdump(self, *options: str, folder: str | None = None) -> str:
        return _read(_need("cuobjdump"), *options, self.path.resolve(), folder=folder)


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Mangled to readable names, without the namespaces of this library."""
    ordered = sorted(names)
    lines = subprocess.run(
        ["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    noise = r"pmf::|cuda::|ns::|\(anonymous namespace\)::|^void "
    return {name: re.sub(noise, "", line) for name, line in zip(ordered, lines, strict=True)}


def _need(name: str) -> str:
    found = tool(name)
    assert found is not None, f"there is no {name}: pip install nvidia-cuda-{name}"
    return found


def _read(*command: str | Path, folder: str | None = None) -> str:
    parts = [str(part) for part in command]
    done = subprocess.run(parts, capture_output=True, text=True, errors="replace", check=True, cwd=folder)
    return done.stdout
