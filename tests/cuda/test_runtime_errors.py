"""Errors of the CUDA runtime: ours are reported and cleared, another library's stay pending."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNTIME = Path(__file__).parent / "runtime"
INCLUDES = [f"-I{path}" for path in (RUNTIME, ROOT / "csrc", ROOT / "csrc/include")]
WELL = ["launch: well", "device: well", "limits: well"]
NO_LIMITS = "limits: the device does not say how much shared memory it has"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host code of launches, with a runtime whose calls fail on request."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    out = tmp_path_factory.mktemp("runtime") / "errors"
    subprocess.run(
        [compiler, "-std=c++17", *INCLUDES, "-x", "c++", RUNTIME / "errors.cpp", "-o", out], check=True
    )
    return out


@pytest.mark.parametrize(
    ("failing", "said", "launched"),
    [
        ("", WELL, 1),
        ("cudaLaunchKernelExC", ["launch: ours", *WELL[1:]], 0),
        ("cudaFuncSetAttribute", ["launch: ours", *WELL[1:]], 0),
        ("cudaGetDevice", ["launch: ours", "device: well", NO_LIMITS], 0),
        (
            "cudaDeviceGetAttribute",
            ["launch: ours", "device: CUDA device 0 cannot be used (ours)", NO_LIMITS],
            0,
        ),
        ("cudaDriverGetVersion", ["launch: well", "device: no NVIDIA driver was found", "limits: well"], 1),
    ],
)
def test_our_errors_are_reported_and_cleared(
    program: Path, failing: str, said: list[str], launched: int
) -> None:
    found = subprocess.run([program, failing], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == [*(f"{x}; pending: nothing" for x in said), f"launched: {launched}"]


def test_anothers_error_is_neither_reported_nor_cleared(program: Path) -> None:
    found = subprocess.run([program, "pending"], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == [*(f"{x}; pending: another's" for x in WELL), "launched: 1"]


@pytest.mark.parametrize(("count", "compiles"), [(32764, True), (32765, False)])
def test_no_kernel_has_more_parameters_than_a_launch_can_pass(
    count: int, compiles: bool, tmp_path: Path
) -> None:
    source = tmp_path / "wide.cpp"
    source.write_text(
        '#include "cuda/common/launch.cuh"\n'
        f"struct Wide {{ char bytes[{count - 4}]; }};\n"
        "void kernel(Wide, int) {}\n"
        "auto status = pmf::cuda::launch(kernel, {}, {}, 0, nullptr, Wide(), 1);\n"
    )
    command = [str(shutil.which("c++")), "-std=c++17", *INCLUDES, "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == compiles
    assert ("more than a launch can pass" in done.stderr) == (not compiles)


def test_if_both_fail_an_error_stays_pending(program: Path) -> None:
    """The runtime keeps only one error: other libraries must still see that something failed."""
    found = subprocess.run(
        [program, "pending", "cudaLaunchKernelExC"], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[0] == "launch: ours; pending: ours"
