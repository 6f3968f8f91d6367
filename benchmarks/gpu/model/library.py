"""The kernels of a built library: the host function that launches each, and their machine code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from .sass import Kernel, parse


class ToolMissingError(Exception):
    """A program of the CUDA toolkit is missing."""


def _tool(name: str) -> str:
    folders = os.environ.get("PATH", "").split(os.pathsep)
    folders += [f"{os.environ[key]}/bin" for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    folders.append("/usr/local/cuda/bin")
    for packages in map(Path, sys.path):
        folders += [str(each) for each in sorted(packages.glob("nvidia/*/bin"), reverse=True)]
        folders.append(str(packages / "triton/backends/nvidia/bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise ToolMissingError(f"there is no {name} to read the kernels: pip install nvidia-cuda-{name}")
    return found


def _read(*command: str | Path, folder: str | None = None) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout


def demangled(name: str) -> str:
    return re.sub(r"pmf::|cuda::|^void ", "", _read("c++filt", name).strip())


def host_functions(library: Path) -> dict[int, str]:
    """Address of each local function -> its mangled name, which is that of the kernel it launches."""
    found = {}
    for line in _read("nm", library).splitlines():
        place, _, name = line.rpartition(" ")
        if " t " in line.lower() and name.startswith("_Z"):
            # The host function of a template is static: its name has an L that the kernel's lacks.
            found[int(place.split()[0], 16)] = re.sub(r"L(?=\d)", "", name, count=1)
    return found


def kernels(library: Path, names: Collection[str], architecture: str = "sm_90a") -> dict[str, Kernel]:
    """The machine code of kernels, by mangled name."""
    cuobjdump, nvdisasm = _tool("cuobjdump"), _tool("nvdisasm")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        _read(cuobjdump, "-xelf", "all", "-arch", architecture, library.resolve(), folder=folder)
        for path in sorted(Path(folder).glob("*.cubin")):
            symbols = (line.split() for line in _read("readelf", "-s", "-W", path).splitlines())
            indices = [line[0].rstrip(":") for line in symbols if "FUNC" in line and line[-1] in names]
            if indices:
                found.update(parse(_read(nvdisasm, "-c", "-hex", "-fun", ",".join(indices), path)))
    return {name: kernel for name, kernel in found.items() if name in names}
