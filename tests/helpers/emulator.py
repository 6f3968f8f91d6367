"""Build and load the emulator's libraries (tests/emulator) on first use, once for all processes."""

import ctypes
import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "emulator"
BUILD = Path(os.environ.get("PMF_EMULATOR_DIR", ROOT / "build" / "emulator"))
TENSOR_CORES = (24, 2)
"""How the emulator adds by default: the bits and blocks of Ampere."""
LIBRARY = BUILD / "libpmf_emulated.so"


def why_not() -> str | None:
    """Why this machine cannot run the emulator; None if it can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the emulator switches stacks in x86-64 assembly"
    if not {"avx2", "fma", "f16c"} <= _processor_flags():
        return "the emulator multiplies with AVX2, FMA and F16C, which this processor lacks"
    return None


def library(name: str) -> Path:
    """libpmf_emulated.so or libplanted.so, up to date."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [
            _tool("cmake"), "-S", SOURCE, "-B", BUILD, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DPMF_TORCH_DIR={Path(torch.__file__).parent}",
        ]  # fmt: skip
        if not (BUILD / "build.ninja").exists():
            _run(configure)
        _run([_tool("cmake"), "--build", BUILD, "--target", name])
    return BUILD / f"lib{name}.so"


@functools.cache
def namespace() -> Any:
    """torch.ops.pmf_emulated, which runs the CUDA kernels on CPU tensors."""
    torch.ops.load_library(library("pmf_emulated"))
    return torch.ops.pmf_emulated


def launches() -> int:
    """The number of kernels that torch.ops.pmf_emulated has launched in this process."""
    count = ctypes.CDLL(str(LIBRARY)).pmf_emulator_launches
    count.restype = ctypes.c_int64
    return count()


def products() -> int:
    """The number of mma instructions that warps have executed in this process."""
    count = ctypes.CDLL(str(LIBRARY)).pmf_emulator_products
    count.restype = ctypes.c_int64
    return count()


def warpgroup_products() -> int:
    """The number of wgmma instructions that warps have executed in this process."""
    count = ctypes.CDLL(str(LIBRARY)).pmf_emulator_warpgroup_products
    count.restype = ctypes.c_int64
    return count()


def prefetched() -> int:
    """The number of bytes that kernels have brought to the L2 cache in this process."""
    count = ctypes.CDLL(str(LIBRARY)).pmf_emulator_prefetched
    count.restype = ctypes.c_int64
    return count()


def last_shared_bytes() -> int:
    """Shared memory per block that the latest launch of torch.ops.pmf_emulated requested."""
    shared = ctypes.CDLL(str(LIBRARY)).pmf_emulator_last_shared_bytes
    shared.restype = ctypes.c_int64
    return shared()


def seed(value: int) -> None:
    """Choose another order of warps, blocks and copies."""
    ctypes.CDLL(str(LIBRARY)).pmf_emulator_seed(ctypes.c_uint64(value))


@contextmanager
def elsewhere(*tensors: torch.Tensor, device: str) -> Iterator[None]:
    """Pretend that these tensors are on "cpu" or "cuda:1"; all others are on cuda:0."""
    namespace()
    machine = ctypes.CDLL(str(LIBRARY))
    kind, _, index = device.partition(":")
    for x in tensors:
        storage = ctypes.c_void_p(x.untyped_storage().data_ptr())
        machine.pmf_emulator_place(storage, ctypes.c_bool(kind == "cuda"), ctypes.c_int32(int(index or 0)))
    try:
        yield
    finally:
        machine.pmf_emulator_forget_places()


@contextmanager
def hardware(index: int, *, capability: tuple[int, int] = (9, 0), driver: int = 13000) -> Iterator[None]:
    """Pretend that CUDA device `index` is not sm_90; it is queried once per process."""
    namespace()
    machine = ctypes.CDLL(str(LIBRARY))
    machine.pmf_emulator_device(index, *capability)
    machine.pmf_emulator_driver(driver)
    try:
        yield
    finally:
        machine.pmf_emulator_driver(13000)


@contextmanager
def limits(shared_kb: int, processors: int, hopper: bool | None = None) -> Iterator[None]:
    """Set the KB of shared memory per block, 1 KB more per multiprocessor, and the processor count.

    hopper: whether the device is an sm_90; by default, if it has an H100's shared memory.
    """
    namespace()
    machine = ctypes.CDLL(str(LIBRARY))

    def let(kb: int, count: int, hopper: bool) -> None:
        memory = ctypes.c_int64(kb * 1024), ctypes.c_int64((kb + 1) * 1024)
        machine.pmf_emulator_limits(*memory, count, ctypes.c_bool(hopper))

    let(shared_kb, processors, shared_kb == 227 if hopper is None else hopper)
    try:
        yield
    finally:
        let(163, 4, False)


@contextmanager
def tensor_cores(fraction_bits: int, blocks: int, library: Path = LIBRARY) -> Iterator[None]:
    """Make tensor cores add as described in tests/emulator/runtime/sums.h.

    0 bits: in order, rounded to nearest.
    """
    machine = ctypes.CDLL(str(library))
    machine.pmf_emulator_tensor_cores(fraction_bits, blocks)
    try:
        yield
    finally:
        machine.pmf_emulator_tensor_cores(*TENSOR_CORES)


class Planted:
    """The bare emulator: kernels with planted bugs, and single instructions, on numpy arrays."""

    def __init__(self) -> None:
        if (reason := why_not()) is not None:
            pytest.skip(reason)
        self.path = library("planted")
        self._library = ctypes.CDLL(str(self.path))
        self.names = self._names("pmf_planted_name")
        self.hopper_faults = self._names("pmf_hopper_fault_name")
        self.cluster_faults = self._names("pmf_hopper_cluster_fault_name")

    def begin(
        self, seed: int, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray], written: bool = False
    ) -> None:
        """Set the arrays that the next launch may access; `written`: outputs contain readable values."""
        self._library.pmf_emulator_seed(ctypes.c_uint64(seed))
        self._library.pmf_emulator_forget_tensors()
        for arrays, writable, initialised in ((inputs, False, True), (outputs, True, written)):
            for x in arrays:
                size = ctypes.c_size_t(x.nbytes)
                self._library.pmf_emulator_add_tensor(_pointer(x), size, writable, initialised)

    def run(self, name: str, bug: bool, given: np.ndarray, result: np.ndarray) -> str | None:
        """The emulator's finding in a planted kernel, or in its correct twin; None if there is none."""
        return self._call("pmf_planted_run", self.names.index(name), bug, given, result)

    def mma(self, kind: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> str | None:
        return self._call("pmf_probe_mma", kind, a, b, c)

    def ldmatrix(self, count: int, transposed: bool, *arrays: np.ndarray) -> str | None:
        return self._call("pmf_probe_ldmatrix", count, transposed, *arrays)

    def lanes(self, x: np.ndarray, result: np.ndarray) -> str | None:
        return self._call("pmf_probe_lanes", x, result)

    def copies(self, given: np.ndarray, result: np.ndarray) -> str | None:
        return self._call("pmf_probe_copy", given, result)

    def numbers(self, x: np.ndarray, result: np.ndarray) -> str | None:
        return self._call("pmf_probe_numbers", x, result)

    def product(
        self,
        half: bool,
        tiles: int,
        transposed: bool,
        image: np.ndarray,
        a: int,
        b: int,
        rows: np.ndarray,
        sums: np.ndarray,
        adds: bool,
    ) -> str | None:
        """One wgmma; addresses in the descriptors `a` and `b` are relative to `image`, the shared memory."""
        descriptors = ctypes.c_uint64(a), ctypes.c_uint64(b)
        return self._call(
            "pmf_hopper_product", half, tiles, transposed, image, image.size, *descriptors, rows, sums, adds
        )

    def box(
        self,
        tensor: np.ndarray,
        sizes: np.ndarray,
        strides: np.ndarray,
        rows: int,
        width: int,
        place: np.ndarray,
        image: np.ndarray,
        elected: np.ndarray,
    ) -> str | None:
        """Copy a box of a tensor to shared memory; `image` receives the shared memory."""
        return self._call("pmf_hopper_box", tensor, sizes, strides, rows, width, place, image, elected)

    def prefetch(self, tensor: np.ndarray, offset: int, size: int) -> str | None:
        """Prefetch bytes of a tensor from `offset` on."""
        return self._call("pmf_hopper_prefetch", tensor, offset, size)

    def hopper(self, fault: str, a: np.ndarray, b: np.ndarray, output: np.ndarray) -> str | None:
        return self._call("pmf_hopper_fault", self.hopper_faults.index(fault), a, b, output)

    def cluster(self, fault: str, a: np.ndarray, output: np.ndarray) -> str | None:
        return self._call("pmf_hopper_cluster_fault", self.cluster_faults.index(fault), a, output)

    def launch(self, grid: int, block: int, shared: int, x: np.ndarray, result: np.ndarray) -> str | None:
        return self._call("pmf_probe_launch", grid, block, ctypes.c_int64(shared), x, result)

    def _names(self, function: str) -> list[str]:
        call = getattr(self._library, function)
        call.restype = ctypes.c_char_p
        found: list[str] = []
        while (name := call(len(found))) is not None:
            found.append(name.decode())
        return found

    def _call(self, function: str, *args: Any) -> str | None:
        call = getattr(self._library, function)
        call.restype = ctypes.c_char_p
        said = call(*(_pointer(x) if isinstance(x, np.ndarray) else x for x in args))
        return None if said is None else said.decode()


def _pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _tool(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found is not None, f"the emulator is built with {name}: pip install {name}"
    return found


def _run(command: list[Any]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"building the emulator failed:\n{(done.stdout + done.stderr)[-6000:]}"
