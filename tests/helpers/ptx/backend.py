"""Kernels translated from PTX, compiled on their first launch in the emulator and cached by their text."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import emulator
from helpers.machine_code import tool
from helpers.ptx.modules import Module, of_library
from helpers.ptx.translate import ENTRY, translate

from pmf import _library

HEADERS = emulator.SOURCE / "include"
COMPILE = [
    "-std=gnu++17", "-Og", "-g1", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off",
    "-fno-math-errno", "-fno-strict-aliasing", "-w", "-mavx2", "-mfma", f"-I{HEADERS}",
]  # fmt: skip
Launched = tuple[str, str]
"""A kernel's demangled name, and the source file of its anonymous namespace; "" if it has none."""


def why_not() -> str | None:
    """Why this machine cannot run the ptx backend; None if it can."""
    if (reason := emulator.why_not()) is not None:
        return reason
    module = _library.introspection()
    if module is None or not module.build_facts()["has_cuda"]:
        return "this build has no CUDA kernels, and so no PTX"
    missing = [name for name in ("cuobjdump", "nm", "c++filt", "g++") if tool(name) is None]
    return f"{', '.join(missing)} not found" if missing else None


@functools.cache
def of_this_build() -> tuple[Module, ...]:
    """The PTX in the installed library."""
    return of_library(_library.LIBRARY)


class _Translation(ctypes.Structure):
    _fields_ = (("run", ctypes.c_void_p), ("problem", ctypes.c_char * 1024))


_Translator = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int, ctypes.POINTER(_Translation)
)


@contextmanager
def running(
    host: Path, modules: Sequence[Module], note: Callable[[str], None] | None = None
) -> Iterator[None]:
    """The emulator in the library `host` runs these modules' kernels instead of its own.

    `note` is called with each mangled name on its first launch.
    """
    library, kernels = ctypes.CDLL(str(host)), _by_name(modules)

    def answer(kernel: int, sizes: list[int]) -> int:
        where = _host_kernels(host)[kernel - _base(library)]
        if where not in kernels:
            raise LookupError(f"no PTX for the kernel {where[0]}: rebuild the library")
        module, name = kernels[where]
        expected = [p.bytes for p in module.function(name).parameters]
        if sizes != expected:
            raise TypeError(
                f"parameters of {where[0]} have {sizes} bytes on the host and {expected} in the PTX: "
                "rebuild the library; if that does not help, a type's layout differs between the two"
            )
        if note is not None:
            note(name)
        return _compiled(module, name)

    def found(kernel: int, sizes: Any, count: int, result: Any) -> None:  # called by the emulator
        try:
            result.contents.run = answer(kernel, list(sizes[:count]))
        except Exception as problem:  # reported by the launch
            result.contents.problem = f"the ptx backend: {problem}".encode()[:1023]

    callback = _Translator(found)
    library.pmf_emulator_translate(callback)
    try:
        yield
    finally:
        library.pmf_emulator_translate(None)


# ---- names --------------------------------------------------------------------------------------

_ANONYMOUS = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")


def _by_name(modules: Sequence[Module]) -> dict[Launched, tuple[Module, str]]:
    found = {}
    for module in modules:
        names = list(module.kernels)
        for name, readable in zip(names, _readable(names), strict=True):
            file = _ANONYMOUS.search(name)
            found[readable, file.group(1) + ".cu" if file else ""] = module, name
    return found


@functools.cache
def _host_kernels(host: Path) -> dict[int, Launched]:
    """A library's functions by offset. nm -p keeps the order: a file, then its local symbols."""
    listed = subprocess.run(["nm", "-ap", host], capture_output=True, text=True, check=True).stdout
    file, offsets, names, files = "", [], [], []
    for line in listed.splitlines():
        offset, kind, name = line[:16], line[17:18], line[19:]
        if kind == "a":
            file = name
        elif kind in "tTwW" and "4cuda" in name or "7planted" in name:
            offsets.append(int(offset, 16))
            names.append(name)
            files.append(file if "_GLOBAL__N_" in name else "")
    return dict(zip(offsets, zip(_readable(names), files, strict=True), strict=True))


def _readable(names: Sequence[str]) -> list[str]:
    """The demangled name, with the toolkit's names for its 16-bit types."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    text = done.stdout.replace("pmf::emulator::BFloat16", "__nv_bfloat16")
    return text.replace("pmf::emulator::Half", "__half").splitlines()


class _Place(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p), ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p), ("address", ctypes.c_void_p),
    )  # fmt: skip


def _base(library: ctypes.CDLL) -> int:
    place = _Place()
    ctypes.CDLL(None).dladdr(
        ctypes.cast(library.pmf_emulator_translate, ctypes.c_void_p), ctypes.byref(place)
    )
    assert place.base is not None
    return place.base


# ---- compiled -----------------------------------------------------------------------------------

_loaded: dict[Path, ctypes.CDLL] = {}


def _compiled(module: Module, name: str) -> int:
    """The address of the kernel's function."""
    key = hashlib.sha256("\n".join((module.source(name), _toolchain(), name)).encode()).hexdigest()[:24]
    folder = emulator.BUILD / "ptx"
    path = folder / f"{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source, made = (folder / f"{key}.{os.getpid()}.{kind}" for kind in ("cpp", "so"))
        text = folder / f"{hashlib.sha256(module.text.encode()).hexdigest()[:24]}.ptx"  # for messages
        if not text.exists():
            text.write_text(module.text)
        source.write_text(translate(module, name, text.name))
        command = [tool("g++"), *COMPILE, source, "-o", made]
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
        assert done.returncode == 0, f"g++ rejects the translation of {name}:\n{done.stderr[:900]}"
        shutil.move(made, path)  # atomically, even if another process writes it too
        source.unlink()
    if path not in _loaded:
        _loaded[path] = ctypes.CDLL(str(path))
    address = ctypes.cast(getattr(_loaded[path], ENTRY), ctypes.c_void_p).value
    assert address is not None
    return address


@functools.cache
def _toolchain() -> str:
    """Everything except the PTX that affects the result."""
    files = [
        *sorted(Path(__file__).parent.glob("*.py")),
        *(HEADERS / "emulator" / f for f in ("ptx.h", "runtime.h")),
    ]
    version = subprocess.run([str(tool("g++")), "--version"], capture_output=True, text=True).stdout
    return "\n".join((*(file.read_text() for file in files), *COMPILE[:-1], version))
