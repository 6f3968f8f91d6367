"""Builds the two libraries of CMakeLists.txt into the package; everything else is in pyproject.toml.

pip install .                         uses the torch that is installed, whatever its version from 2.11 on
PMF_PORTABLE=1 pip wheel --no-deps .  one wheel for every Python (without the pybind11 module)
PMF_CUDA=auto|on|off                  CUDA kernels if torch has CUDA and nvcc is found (auto), always, never
PMF_JOBS=N                            compile N files at once (default: what processors and memory allow)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 11)
COMPILE_GIB = 1.5  # memory for compiling the largest file, with some margin
PORTABLE = os.environ.get("PMF_PORTABLE", "0") not in ("", "0")

INSTALL_TORCH = (
    "pixelmeanflow compiles against the PyTorch you already have, and this Python ({python}) has none: "
    "install PyTorch 2.11 or newer first, then run `pip install .` again (add --no-build-isolation if your "
    "installer isolates builds, as uv and `python -m build` do)."
)
UPGRADE_TORCH = (
    "pixelmeanflow needs PyTorch 2.11 or newer, but {folder} is {version}: upgrade it with "
    "`pip install --upgrade torch`, then run `pip install .` again."
)


def fail(sentence: str) -> None:
    """End the build with a one-sentence error as the last line."""
    raise SystemExit(f"\nerror: {sentence}")


def find_torch() -> Path:
    """The torch package of the target environment; ends the build if there is none.

    pip isolates builds through PYTHONPATH and a sitecustomize on it, so a fresh interpreter that ignores
    the PYTHON* variables sees the real environment. torch is not imported: only its headers and
    libraries are used.
    """
    script = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    found = subprocess.run([sys.executable, "-E", "-c", script], capture_output=True, text=True, cwd=os.sep)
    if not found.stdout.strip():
        fail(INSTALL_TORCH.format(python=sys.executable))
    folder = Path(found.stdout.strip()).parent
    facts: dict[str, str] = {}
    exec((folder / "version.py").read_text(), facts)
    version = str(facts["__version__"])
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        fail(UPGRADE_TORCH.format(folder=folder, version=version))
    return folder


def parallel_jobs() -> int:
    """The number of parallel compilers that processors and free memory allow: swapping costs hours."""
    asked = os.environ.get("PMF_JOBS") or os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            fail(f"PMF_JOBS (or MAX_JOBS) must be a whole number from 1, got {asked!r}.")
        return int(asked)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    try:  # includes memory that the kernel can free
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    return max(1, min(processors, int(free / COMPILE_GIB)))


def newest_glibc(libraries: list[Path]) -> tuple[int, int]:
    """The newest glibc version that any of these files needs, for the wheel's manylinux tag."""
    needed = [(2, 17)]  # older than any required by current toolchains
    for library in libraries:
        listing = subprocess.run(["readelf", "-V", "-W", library], capture_output=True, text=True, check=True)
        for word in listing.stdout.split():
            if word.startswith("GLIBC_2."):
                needed.append((2, int(word.removeprefix("GLIBC_2.").split(".")[0])))
    return max(needed)


class CMakeBuild(build_ext):
    """Runs CMake once, for both libraries."""

    def run(self) -> None:
        package = ROOT / "pmf" if self.inplace else Path(self.build_lib).resolve() / "pmf"
        folder = Path(self.build_temp).resolve() / "cmake"
        torch_folder = find_torch()
        configure = [
            self.tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={self.tool('ninja')}",
            f"-DPMF_TORCH_DIR={torch_folder}",
            f"-DPMF_OUTPUT_DIR={package}",
            f"-DPMF_VERSION={self.distribution.get_version()}",
            f"-DPMF_CUDA={os.environ.get('PMF_CUDA', 'auto')}",
            f"-DPMF_INTROSPECTION={'OFF' if PORTABLE else 'ON'}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        if PORTABLE:  # leftovers of an earlier build would be packed too
            for stale in package.glob("_introspection*.so"):
                stale.unlink()
        jobs = parallel_jobs()
        print(f"pmf: building with {torch_folder}, {jobs} compiler(s) at once", flush=True)
        for command in (configure, [self.tool("cmake"), "--build", folder, "--parallel", str(jobs)]):
            if subprocess.run(command).returncode != 0:
                fail("compiling pixelmeanflow failed; the compiler's or CMake's own message is above.")

    def tool(self, name: str) -> str:
        """cmake or ninja: from the build requirements, else from the system."""
        found = shutil.which(
            name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        )
        if found is None:
            fail(
                f"building without isolation needs {name}: "
                "run `pip install 'cmake>=3.22' ninja 'pybind11>=2.13'`."
            )
        return str(found)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "pmf").glob("*.so")]


class EarlyCheck(dist_info):
    """Requires torch before pip resolves dependencies, or pip would download one and then fail without it."""

    def run(self) -> None:
        find_torch()
        super().run()


class TaggedWheel(bdist_wheel):
    """Names the oldest glibc the wheel runs on and, in its portable form, every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if PORTABLE:
            python, abi = "py3", "none"
        libraries = list(Path(self.bdist_dir or "", "pmf").glob("*.so"))
        if platform.startswith("linux_") and libraries:
            major, minor = newest_glibc(libraries)
            platform = platform.replace("linux_", f"manylinux_{major}_{minor}_", 1)
        return python, abi, platform


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("pmf.libpmf", sources=[])],  # marks the package as having compiled parts
        cmdclass={"build_ext": CMakeBuild, "dist_info": EarlyCheck, "bdist_wheel": TaggedWheel},
    )
