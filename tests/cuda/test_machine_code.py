"""The machine code of this build as the compiler left it: nothing is recompiled, no GPU is needed."""

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from helpers.machine_code import ARCHITECTURES, MachineCode, Usage, absent, demangled, tool
from helpers.occupancy import A100, H100, RTX_3090, blocks_per_processor
from helpers.ptx.modules import Module, of_library, of_source

from pmf import _library

ROOT = Path(__file__).parents[2]

# For kernels with 16-bit products: tensor cores, whole fragments from shared memory, copies that bypass
# registers, 16-byte stores.
PRODUCTS = (r"HMMA\.16816\.F32", r"LDSM\.16\.(M88|MT88)", r"LDGSTS\.E.*\.128", r"STG\.E.*\.128")
WIDE = (r"LDG\.E.*\.128", r"STG\.E.*\.128")
# Kernels by name, and the instructions that each must contain. One 16-bit type stands for both, since their
# kernels share a template.
MEANT = {
    r"attention_\w+<(ForwardSizes<)?Arithmetic16<__nv_bfloat16>, (64|80), ": PRODUCTS,
    r"patch_fused_kernel<__nv_bfloat16>": PRODUCTS,
    r"patch_product_kernel<__nv_bfloat16, ": PRODUCTS,
    r"product_kernel<HalfProducts<__half>": PRODUCTS,
    r"update_kernel<HalfProducts<__half>": PRODUCTS[:3],
    r"(slots|forward|backward)_kernel<Whole<__nv_bfloat16>": WIDE,
    r"(ema|adam)_kernel": WIDE,
    r"places_kernel<Forward<__nv_bfloat16, __nv_bfloat16, 8, 3>": WIDE,
    # Products of a warpgroup, copies by tensor map, barriers that count bytes.
    r"hopper_forward_kernel<HopperSizes<__nv_bfloat16, ": (
        r"HGMMA\.64x\d+x16\.F32\.BF16", r"UTMALDG\.4D", r"SYNCS\.PHASECHK", r"STG\.E\.64"
    ),
    r"hopper_backward_(kernel<HopperBackwardSizes|heads_kernel<HopperHeadSizes)<__nv_bfloat16, ": (
        r"HGMMA\.64x\d+x16\.F32\.BF16", r"UTMALDG\.4D", r"SYNCS\.PHASECHK", r"STG\.E.*\.128"
    ),
    r"hopper_backward_tangents_kernel<HopperTangentSizes<__nv_bfloat16, .*, false>": (
        r"HGMMA\.64x32x16\.F32\.BF16", r"HGMMA\.64x64x16\.F32\.BF16", r"UTMALDG\.4D", r"SYNCS\.PHASECHK",
        r"STG\.E.*\.128",
    ),
    r"hopper_backward_tangents_kernel<HopperTangentSizes<__nv_bfloat16, .*, true>": (
        r"HGMMA\.64x96x16\.F32\.BF16", r"UTMALDG\.4D", r"SYNCS\.PHASECHK"
    ),
    r"hopper_product_kernel<__half>": (
        r"HGMMA\.64x256x16\.F32", r"UTMALDG\.4D", r"SYNCS\.PHASECHK", r"LDSM\.16\.MT88\.4", r"STG\.E.*\.128"
    ),
    r"hopper_update_kernel<__half>": (
        r"HGMMA\.64x256x16\.F32", r"UTMALDG\.4D", r"SYNCS\.PHASECHK", r"UBLKPF"
    ),
}  # fmt: skip
HOPPER = r"hopper_\w+kernel<"
"""Kernels for sm_90a only."""
# Kernels on whole vectors: they read and write tensors in no smaller pieces.
WHOLE = r"(slots_kernel|forward_kernel)<Whole<__nv_bfloat16>"
TUNED = r"attention_\w+<(ForwardSizes<)?Arithmetic16<.*>, (64|80), "
"""Attention for widths 64 and 80."""


def spilling(usage: dict[str, Usage]) -> dict[str, Usage]:
    """The kernels with thread-local memory: a stack frame, spilled registers."""
    return {name: each for name, each in usage.items() if each.stack or each.local}


def lacking(name: str, instructions: Counter[str]) -> list[str]:
    """Instructions that a kernel of this name lacks, or has but should not have."""
    found = [op for op in instructions if re.match("LDL|STL", op)]
    for kernels, patterns in MEANT.items():
        if re.match(kernels, name):
            found += [
                pattern for pattern in patterns if not any(re.match(pattern, op) for op in instructions)
            ]
    if re.match(r"attention|patch|product_kernel|update_kernel", name):
        found += [
            op for op in instructions if re.match(r"LDGSTS", op) and not op.endswith((".128", ".ZFILL"))
        ]
    if re.match(WHOLE, name):
        found += [op for op in instructions if re.match(r"(LDG|STG)\.", op) and ".128" not in op]
    return found


@pytest.fixture(scope="module")
def code() -> MachineCode:
    """The machine code of this build."""
    if _library.missing() is not None:
        absent(_library.missing())
    sections = subprocess.run(
        ["readelf", "-S", "-W", _library.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    if ".nv_fatbin" not in sections:
        absent("this build of pmf has no CUDA kernels")
    for name in ("cuobjdump", "nvdisasm"):
        if tool(name) is None:
            absent(f"there is no {name} to read machine code with: pip install nvidia-cuda-{name}")
    return MachineCode(_library.LIBRARY)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> MachineCode:
    """The machine code of planted.cu, for sm_80 only."""
    nvcc = tool("nvcc")
    if nvcc is None or tool("cuobjdump") is None or tool("nvdisasm") is None:
        pytest.skip("planting faults takes nvcc, cuobjdump and nvdisasm")
    out = tmp_path_factory.mktemp("planted") / "planted.o"
    includes = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include")]
    target = "-gencode=arch=compute_80,code=[sm_80,compute_80]"
    source = ROOT / "tests" / "cuda" / "planted.cu"
    subprocess.run([nvcc, "-std=c++17", target, *includes, "-c", source, "-o", out], check=True)
    return MachineCode(out)


def named(code: MachineCode, name: str) -> str:
    """The mangled name of a planted kernel."""
    return next(
        mangled for mangled, readable in demangled(code.bounds).items() if readable.startswith(name + "(")
    )


# ---- this build ----------------------------------------------------------------------------------


def test_every_kernel_exists_for_every_architecture(code: MachineCode) -> None:
    """Machine code for sm_80 and sm_90a, and PTX, for everything the host code can launch; Hopper kernels
    for sm_90a."""
    hopper = {name for name, readable in demangled(code.registered).items() if re.match(HOPPER, readable)}
    assert hopper and code.registered > hopper
    assert set(code.usage("sm_80")) == code.registered - hopper
    assert set(code.usage("sm_90a")) == code.registered
    assert set(code.bounds) == code.registered
    assert set(code.hosts.values()) == code.registered


def test_every_kernel_in_the_sources_is_in_the_library(code: MachineCode) -> None:
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").rglob("*.cu*")))
    written = re.findall(r"__global__ void\s+(?:__launch_bounds__\([^()]*\)\s+)?(\w+)\(", sources)
    assert len(written) == sources.count("__global__ void")
    assert {re.split("[<(]", name)[0] for name in demangled(code.registered).values()} == set(written)


def test_no_other_source_asks_for_the_architecture() -> None:
    """Machine code for all comes from one PTX. This file asks in fp16, which is compiled for each
    (PMF_CUDA_BY_ARCHITECTURE in cmake/cuda_kernels.cmake)."""
    asking = [p.name for p in (ROOT / "csrc").rglob("*.*") if "__CUDA_ARCH" in p.read_text()]
    assert asking == ["attention_forward.cuh"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_has_a_stack_frame(code: MachineCode, architecture: str) -> None:
    """Spilled registers live in the stack frame, so no kernel spills: widths 64 and 80, and all others."""
    usage = code.usage(architecture)
    assert sum(re.match(TUNED, name) is not None for name in demangled(usage).values()) == 44
    assert spilling(usage) == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_have_the_intended_instructions(code: MachineCode, architecture: str) -> None:
    names = demangled(code.usage(architecture))
    chosen = [mangled for mangled, name in names.items() if any(re.match(each, name) for each in MEANT)]
    for kernels in MEANT:
        there = architecture == "sm_90a" or not kernels.startswith("hopper")
        assert any(re.match(kernels, names[mangled]) for mangled in chosen) == there, kernels
    found = code.instructions(architecture, chosen)
    assert set(found) == set(chosen)
    wrong = {names[mangled]: lacking(names[mangled], ops) for mangled, ops in found.items()}
    assert {name: what for name, what in wrong.items() if what} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_allow_the_blocks_that_launch_bounds_promise(code: MachineCode, architecture: str) -> None:
    gpu = {"sm_80": A100, "sm_90a": H100}[architecture]
    for name, usage in code.usage(architecture).items():
        bounds = code.bounds[name]
        assert blocks_per_processor(gpu, bounds.threads, usage.registers, 0) >= bounds.blocks, name
        assert usage.shared == 0, f"{name} has static shared memory, which no launch counts"


def test_the_library_is_small_enough(code: MachineCode, tmp_path: Path) -> None:
    """A wheel, which is a zip file, contains little else: it stays under 40 MB."""
    packed = shutil.make_archive(str(tmp_path / "library"), "zip", code.path.parent, code.path.name)
    assert Path(packed).stat().st_size < 36e6


# ---- ptxas's log of the Hopper kernels -----------------------------------------------------------


def ptxas_log(module: Module, folder: Path) -> str:
    """ptxas's log of compiling PTX for sm_90a."""
    ptxas = tool("ptxas")
    if ptxas is None:
        absent("there is no ptxas, which comes with the CUDA toolkit")
    source = folder / "source.ptx"
    source.write_text(module.text)
    command = [ptxas, "-arch=sm_90a", "-v", source, "-o", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def complaints(log: str) -> list[str]:
    """Spilled bytes, and the warnings that ptxas serialises products (C7510 to C7519)."""
    return re.findall(r"C751\d", log) + re.findall(r"\b[1-9]\d* bytes spill", log)


def test_products_run_asynchronously_and_nothing_spills(code: MachineCode, tmp_path: Path) -> None:
    modules = [module for module in of_library(code.path) if ".target sm_90a" in module.text]
    assert len(modules) == len(list((ROOT / "csrc/cuda").rglob("hopper_*.cu")))
    for module in modules:
        log = ptxas_log(module, tmp_path)
        assert log.count("0 bytes spill stores") >= len(module.kernels) > 0, log
        assert complaints(log) == [], log


def test_products_that_ptxas_serialises_are_found(tmp_path: Path) -> None:
    if tool("nvcc") is None:
        pytest.skip("planting a fault takes nvcc")
    source, includes = ROOT / "tests" / "cuda" / "overlapping_sums.cu", (ROOT / "csrc", ROOT / "csrc/include")
    assert "C7511" in complaints(ptxas_log(of_source(source, includes, "compute_90a"), tmp_path))


# ---- the checks detect violations ---------------------------------------------------------


def test_planted_faults_are_found(planted: MachineCode) -> None:
    usage = planted.usage("sm_80")
    faulty = {named(planted, name) for name in ("stack_frame", "spills")}
    assert set(spilling(usage)) == faulty
    assert usage[named(planted, "static_shared")].shared == 40960

    kernels = {name: named(planted, name) for name in ("spills", "narrow", "sound")}
    found = planted.instructions("sm_80", kernels.values())
    tuned = "attention_forward_kernel<ForwardSizes<Arithmetic16<__nv_bfloat16>, 64, 64, 32>>"
    whole = "slots_kernel<Whole<__nv_bfloat16>, Forward>"
    assert lacking(tuned, found[kernels["sound"]]) == []
    assert lacking(tuned, found[kernels["narrow"]]) == list(PRODUCTS)
    assert {"LDL", "STL"} <= {op[:3] for op in lacking(tuned, found[kernels["spills"]])}
    assert {"LDG.E", "STG.E"} <= set(lacking(whole, found[kernels["narrow"]]))


def test_an_absent_architecture_is_found(planted: MachineCode) -> None:
    assert set(planted.usage("sm_80")) == set(planted.bounds) != set()
    assert planted.usage("sm_90a") == {}


# ---- blocks on a multiprocessor ------------------------------------------------------------------

NVIDIAS = r"""
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, minor, threads, registers;
  unsigned long shared, of_block, of_processor;
  int most_threads, most_blocks;
  while (std::scanf("%d %d %lu %lu %d %d %d %d %lu", &major, &minor, &of_block, &of_processor, &most_threads,
                    &most_blocks, &threads, &registers, &shared) == 9) {
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = most_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32, device.numSms = 100;
    device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = of_processor;
    device.sharedMemPerBlockOptin = of_block, device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared, kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared)) return 1;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_matches_nvidias_calculator(tmp_path: Path) -> None:
    nvcc, compiler = tool("nvcc"), shutil.which("c++")
    if nvcc is None or compiler is None:
        pytest.skip("NVIDIA's calculator is a header of the CUDA toolkit, which is not here")
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    includes = re.findall(r'"(-I[^"]+)"', dry_run)
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(NVIDIAS)
    subprocess.run([compiler, "-w", *includes, source, "-o", program], check=True)
    cases = [
        (gpu, threads, registers, shared)
        for gpu in (A100, RTX_3090, H100)
        for threads in (32, 96, 128, 192, 256, 1024)
        for registers in (32, 64, 96, 128, 168, 232, 255)
        for shared in (0, 8192, 49152, 50000, 99 * 1024, 114000, 163 * 1024, 227 * 1024)
        if shared <= gpu.shared_per_block
    ]
    asked = [
        (*gpu.capability, gpu.shared_per_block, gpu.shared, gpu.threads, gpu.blocks, *case)
        for gpu, *case in cases
    ]
    lines = "\n".join(" ".join(map(str, numbers)) for numbers in asked)
    said = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.split()
    assert [blocks_per_processor(*case) for case in cases] == list(map(int, said))
