"""The compiled parts: exports, dependencies, guarantees, and the build's error messages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.levels import CPU_LEVELS, at_level

import pmf
from pmf import _library, env

ROOT = Path(__file__).parents[1]
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
# The functions declared in pmf/introspection.h; everything else is internal.
EXPORTS = {
    *("build_facts", "cpu_level", "best_cpu_level", "set_cpu_level", "attention_plan"),
    *("attention_launches", "newton_schulz_launches", "newton_schulz_products", "patch_embed_launches"),
}
# The wheels target glibc 2.34 (RHEL 9, Ubuntu 22.04, Debian 12).
NEWEST_GLIBC = (2, 34)


def read(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def run_script(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that imports this pmf, unless PYTHONPATH says otherwise."""
    path = str(Path(pmf.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def symbols(option: str) -> list[tuple[str, str]]:
    """(kind, demangled name) of the library's dynamic symbols."""
    lines = read("nm", "-D", "-C", option, _library.LIBRARY).splitlines()
    return [(match[1], match[2]) for line in lines if (match := re.match(r"[0-9a-f ]{16} (\w) (.*)", line))]


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pmf_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_library_loads() -> None:
    assert _library.missing() is None


def test_only_introspection_is_exported() -> None:
    """A leaked C++ symbol can replace another extension's, or be replaced by it."""
    exported = {name.partition("(")[0] for kind, name in symbols("--defined-only") if kind != "A"}
    assert exported == {f"pmf::{name}" for name in EXPORTS}


def test_uses_only_the_stable_abi_of_torch() -> None:
    """No mangled C++ symbol of libtorch or c10: these change with every release, and with the compiler."""
    needed = [name for _, name in symbols("--undefined-only")]
    assert not [name for name in needed if re.match(r"(at|c10|torch|caffe2)::", name)]
    stable = {name for name in needed if name.startswith(("aoti_torch_", "torch_"))}
    assert "torch_parallel_for" in stable


def test_cuda_symbols_are_weak() -> None:
    """aoti_torch_get_current_cuda_stream exists only in CUDA builds of PyTorch."""
    kinds = {name: kind for kind, name in symbols("--undefined-only")}
    assert kinds.get("aoti_torch_get_current_cuda_stream", "w") == "w"
    assert not [name for name in kinds if name.startswith(("cuda", "cu")) and "::" not in name]


def test_no_search_path_is_baked_in() -> None:
    dynamic = read("readelf", "-d", "-W", _library.LIBRARY)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= needed
    assert not [name for name in needed if "cuda" in name or "python" in name]


def test_newest_required_glibc_is_as_promised() -> None:
    """The manylinux tag is determined from the library in the same way."""
    setup = load_setup()
    assert setup.newest_glibc([_library.LIBRARY]) <= NEWEST_GLIBC
    versions = read("readelf", "-V", "-W", _library.LIBRARY)
    by_hand = max(tuple(map(int, v.split("."))) for v in re.findall(r"Name: GLIBC_([0-9.]+)", versions))
    assert setup.newest_glibc([_library.LIBRARY]) == max(by_hand[:2], (2, 17))


def test_every_schema_is_complete() -> None:
    """Each op has a CPU and a CUDA kernel registered (a CUDA one may raise), so that none falls through."""
    schemas = [x for x in torch._C._jit_get_all_schemas() if x.name.startswith("pmf::")]
    # Schemas without tensors query or set something of the whole library.
    names = {x.name for x in schemas if any("Tensor" in str(argument.type) for argument in x.arguments)}
    assert {"pmf::attention_jvp_backward", "pmf::muon_step"} <= names
    for name in names:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} has no {key} kernel"


def test_every_public_op_has_compiled_parts() -> None:
    raw = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("pmf::")}
    raw |= {f"{name}_jvp_forward" for name in raw}
    for name in pmf.ops.__all__:
        kernel = name.replace("attention_varlen", "attention")  # the same kernels, with offsets
        assert any(found.startswith(f"pmf::{kernel}") for found in raw), f"pmf.ops.{name} has no compiled op"


def test_levels_can_be_forced_in_a_running_process() -> None:
    assert LEVELS[: len(CPU_LEVELS)] == CPU_LEVELS
    x = torch.randn(1, 1, 5, 8)
    results = []
    for level in CPU_LEVELS:
        with at_level(level):
            results.append(torch.ops.pmf.attention_forward(x, x, x, None, False, 1.0)[0])
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


BF16, AMX = (
    pytest.mark.skipif(level not in CPU_LEVELS, reason=f"the processor lacks {level}")
    for level in ("avx512_bf16", "amx_bf16")
)


def dtypes_that_differ(
    levels: tuple[str, ...], op: Callable[[torch.Tensor], torch.Tensor]
) -> set[torch.dtype]:
    """The dtypes in which these levels do not all give the same bits."""
    x, found = torch.randn(1, 2, 70, 64), defaultdict(list)
    for level in levels:
        with at_level(level):
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                found[dtype].append(op(x.to(dtype)))
    return {dtype for dtype, results in found.items() if not all(map(results[0].equal, results))}


def attention(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.pmf.attention_forward(x, x, x, None, False, 0.125)[1]


def norm(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.pmf.rms_norm(x, x[0, 0, 0], 1e-6)


@BF16
def test_instructions_for_bfloat16_change_nothing_else() -> None:
    assert dtypes_that_differ(LEVELS[2:4], attention) == {torch.bfloat16}
    assert dtypes_that_differ(LEVELS[2:4], norm) <= {torch.bfloat16}


@AMX
def test_amx_changes_attention_in_bfloat16_only() -> None:
    assert dtypes_that_differ(LEVELS[3:], attention) == {torch.bfloat16}
    assert dtypes_that_differ(LEVELS[3:], norm) == set()


@AMX
def test_without_permission_for_amx_the_level_below_runs(tmp_path: Path) -> None:
    """Linux refuses it, for one, to a process with a signal stack too small for the tile registers."""
    script = (
        "import ctypes, torch\n"
        "from pmf import _library\n"
        "class Stack(ctypes.Structure):\n"
        "    _fields_ = [('at', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "memory = ctypes.create_string_buffer(8192)\n"
        "stack = Stack(ctypes.addressof(memory), 0, len(memory))\n"
        "assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0\n"
        "x = torch.ones(1, 1, 3, 8, dtype=torch.bfloat16)\n"
        "assert torch.equal(torch.ops.pmf.attention_forward(x, x, x, None, False, 1.0)[0], x)\n"
        "print(_library.cpu_level())\n"
    )
    done = run_script(script, tmp_path)
    assert (done.returncode, done.stdout) == (0, "avx512_bf16\n"), done.stderr


def test_unknown_level_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'sse9' is not a level of this processor"):
        _library.set_cpu_level("sse9")


@pytest.mark.parametrize(
    ("asked", "expected"), [("portable", "level portable"), ("sse9", "PMF_CPU_LEVEL=sse9 is not available")]
)
def test_environment_variable_sets_the_level(asked: str, expected: str, tmp_path: Path) -> None:
    script = "from pmf import _library; print('level', _library.cpu_level())"
    done = run_script(script, tmp_path, PMF_CPU_LEVEL=asked)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout + done.stderr


def test_no_function_is_shared_between_levels() -> None:
    """One definition rule: an inline function in two levels would be linked once, perhaps as AVX-512.

    A symbol that the linker may merge and that objects of two levels define is such a function.
    """
    objects = sorted(Path(os.environ.get("PMF_BUILD_DIR", ROOT / "build")).glob("**/pmf_cpu_*.dir/**/*.o"))
    if not objects:
        pytest.skip("no build folder with kernel objects (set PMF_BUILD_DIR)")
    levels = defaultdict(set)
    for path in objects:
        level = re.search(r"pmf_cpu_(\w+)\.dir", str(path))
        assert level is not None
        for line in read("nm", "-C", "--defined-only", path).splitlines():
            match = re.match(r"[0-9a-f]+ ([WVu]) (.*)", line)
            if match:
                levels[match[2]].add(level[1])
    assert {name: found for name, found in levels.items() if len(found) > 1} == {}


def test_introspection_module_agrees_with_the_library() -> None:
    module = _library.introspection()
    if module is None:
        pytest.skip("portable wheel: it has no introspection module")
    facts = module.build_facts()
    assert facts["version"] == pmf.__version__
    assert module.cpu_level() == _library.cpu_level()
    assert module.best_cpu_level() in LEVELS
    assert isinstance(facts["has_cuda"], bool) and facts["cuda"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tangent", [False, True])
def test_attention_memory_is_linear_in_the_length(backward: bool, tangent: bool) -> None:
    """No N x N buffer: scratch memory grows at most in proportion to the keys, and not with the queries."""
    module = _library.introspection()
    if module is None:
        pytest.skip("portable wheel: it has no introspection module")
    sizes = {"batch": 2, "heads": 3, "key_heads": 3, "width": 64, "value_width": 64}
    kind = {"backward": backward, "tangent": tangent, "threads": 2}

    def plan(queries: int, keys: int) -> dict[str, float]:
        return module.attention_plan(queries=queries, keys=keys, **sizes, **kind)

    base, wide = plan(1024, 1024), plan(1024, 4096)
    assert base["workspace_bytes"] < wide["workspace_bytes"] <= 4.1 * base["workspace_bytes"]
    assert plan(8192, 1024)["workspace_bytes"] == base["workspace_bytes"]
    assert base["workspace_bytes"] < 1024 * 1024 * 4 * 2 * 3  # a score matrix per head, never stored
    products = {(False, False): 2, (False, True): 6, (True, False): 5, (True, True): 15}[backward, tangent]
    assert base["flops"] == products * 2 * 2 * 3 * 1024 * 1024 * 64


def test_metadata_leaves_an_installed_torch_alone() -> None:
    try:
        requirements = importlib.metadata.requires("pixelmeanflow") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pmf is imported from its source folder and not installed")
    assert importlib.metadata.version("pixelmeanflow") == pmf.__version__
    torch_requirements = [line for line in requirements if line.startswith("torch")]
    assert torch_requirements == ["torch>=2.11"]
    # A package that requires a specific torch, as torchvision does, must not be in any extra; packages that
    # compile for GPUs or read their machine code are for the tests only.
    assert not [line for line in requirements if line.startswith("torchvision")]
    tools = [line for line in requirements if line.startswith(("triton", "nvidia"))]
    assert all(line.endswith('extra == "test"') for line in tools)


def test_env_report_names_every_part() -> None:
    report = env.report()
    for part in (
        "pixelmeanflow",
        "python",
        "torch",
        "processor",
        "cpu kernels",
        "cuda kernels",
        "gpu",
        "driver",
    ):
        assert re.search(rf"^{part}  +\S", report, re.MULTILINE), f"no line about {part} in\n{report}"
    assert _library.cpu_level() in report


def test_missing_library_is_one_sentence_and_import_works(tmp_path: Path) -> None:
    """A copy of the package without its libraries imports, and says what to do when an op is called."""
    package = tmp_path / "pmf"
    for source in Path(pmf.__file__).parent.rglob("*.py"):
        target = package / source.relative_to(Path(pmf.__file__).parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    script = (
        "import torch, pmf\n"
        "x = torch.ones(1, 1, 2, 4)\n"
        "print(pmf.env.report())\n"
        "try: pmf.ops.attention(x, x, x)\n"
        "except RuntimeError as error: print('RAISED', error)\n"
    )
    done = run_script(script, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"RAISED pmf's compiled library is not at .*pip install \.", done.stdout)
    assert re.search(r"cpu kernels +missing", done.stdout)


@pytest.fixture
def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def test_ops_compile_with_and_without_cuda(compiler: str) -> None:
    """Machines with nvcc never compiled the build without CUDA, which broke unnoticed: here the other one."""
    module = _library.introspection()
    with_cuda = 0 if module is not None and module.build_facts()["has_cuda"] else 1
    folder = ROOT / "csrc"
    launching = [path for path in (folder / "ops").glob("*.cpp") if "PMF_CUDA_KERNEL" in path.read_text()]
    assert launching
    headers = (folder, folder / "include", Path(torch.__file__).parent / "include")
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", *(f"-I{path}" for path in headers)]
        + ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DPMF_WITH_CUDA={with_cuda}"]
        + ['-DPMF_CUDA_FACTS="none"', '-DPMF_VERSION="0"', *map(str, launching)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[:2000]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("level", LEVELS[:3])
def test_flags_for_the_whole_build_cannot_change_a_level(compiler: str, level: str) -> None:
    """Copies for bfloat16 instructions compute no other dtype: an AVX2 level that has them would be wrong."""
    kernel = ROOT / "csrc" / "cpu" / "rows" / "rms_norm.cpp"
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include"]
    command += [f"-DPMF_LEVEL={level}", "-march=x86-64-v4", "-mavx512bf16", str(kernel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "leave -mavx512bf16 and -mamx-bf16 out of CXXFLAGS" in done.stderr


def test_building_without_torch_is_one_sentence(tmp_path: Path) -> None:
    """Without this message, users would see "No module named 'torch'" while building."""
    venv.create(tmp_path / "empty", with_pip=False)
    setup = load_setup()
    script = (
        "import sys, types, importlib.util\n"
        "for name in ('bdist_wheel', 'build_ext', 'dist_info'):\n"
        "    module = types.ModuleType(f'setuptools.command.{name}')\n"
        "    setattr(module, name, object)\n"
        "    sys.modules[module.__name__] = module\n"
        "root = types.ModuleType('setuptools'); root.Extension = root.setup = None\n"
        "sys.modules['setuptools'] = root\n"
        f"spec = importlib.util.spec_from_file_location('s', {str(ROOT / 'setup.py')!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "module.find_torch()\n"
    )
    python = tmp_path / "empty" / "bin" / "python"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip() == "error: " + setup.INSTALL_TORCH.format(python=python)


def test_build_jobs_follow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    monkeypatch.delenv("PMF_JOBS", raising=False)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(setup, "COMPILE_GIB", 1e6)
    assert setup.parallel_jobs() == 1
    monkeypatch.setenv("PMF_JOBS", "3")
    assert setup.parallel_jobs() == 3
    monkeypatch.setenv("PMF_JOBS", "many")
    with pytest.raises(SystemExit, match="must be a whole number from 1, got 'many'"):
        setup.parallel_jobs()


@pytest.mark.parametrize(
    ("value", "sentence"), [("maybe", "must be auto, on or off"), ("on", "no nvcc was found")]
)
def test_impossible_pmf_cuda_is_one_sentence(value: str, sentence: str) -> None:
    done = decide_on_cuda(f"-DPMF_CUDA={value}")
    assert done.returncode != 0
    assert sentence in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("library", "reason"),
    [(None, "as this PyTorch has no CUDA (PMF_CUDA=on"), ("libtorch_cuda.so", "no nvcc found")],
)
def test_cuda_kernels_are_compiled_by_default_only_for_a_pytorch_with_cuda(
    library: str | None, reason: str, tmp_path: Path
) -> None:
    """With nvcc, installing took four minutes on machines whose PyTorch could not use the kernels."""
    if library is not None:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / library).touch()
    done = decide_on_cuda("-DPMF_CUDA=auto", f"-DPMF_TORCH_DIR={tmp_path}")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("-- pmf:") and reason in line


def decide_on_cuda(*definitions: str) -> subprocess.CompletedProcess[str]:
    """CMake's messages before anything is compiled; nvcc is hidden from the search."""
    hidden = ("SYSTEM_ENVIRONMENT", "CMAKE_SYSTEM", "CMAKE_ENVIRONMENT")
    return subprocess.run(
        [
            "cmake",
            *definitions,
            "-DPMF_NVCC_PATHS=",
            *(f"-DCMAKE_FIND_USE_{kind}_PATH=OFF" for kind in hidden),
            "-P",
            ROOT / "cmake" / "cuda_kernels.cmake",
        ],
        capture_output=True,
        text=True,
        env={key: word for key, word in os.environ.items() if key not in ("CUDA_HOME", "CUDA_PATH")},
    )
