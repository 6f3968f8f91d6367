"""The environment report for bug reports: versions, CPU level, CUDA, GPU, and why a component is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from pmf import _library, checked, kernels
from pmf.version import VERSION

OPTIONAL = ("scikit-learn", "matplotlib", "tensorboard", "pyarrow", "PyYAML", "gradio")
OLDEST_CAPABILITY = (8, 0)


def cpu_name() -> str:
    """The processor's model name, as recorded in benchmarks."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


CPU_SETTINGS = ("PMF_CPU_LEVEL", "PMF_FLOAT32_PRODUCTS", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that change how a processor computes."""


def _cpu_kernels() -> str:
    problem = _library.missing()
    if problem is not None:
        return f"missing: {problem}"
    facts = [_library.cpu_level()]
    facts += [f"{name}={os.environ[name]}" for name in CPU_SETTINGS if os.environ.get(name)]
    module = _library.introspection()
    if module is not None:
        facts.append(f"the best of this processor is {module.best_cpu_level()}")
    return ", ".join(facts)


def _choice() -> str:
    """The choice in PMF_KERNELS."""
    if (problem := kernels.problem()) is not None:
        return problem
    names = kernels.references()
    asked = f" (PMF_KERNELS={os.environ['PMF_KERNELS']})" if os.environ.get("PMF_KERNELS") else ""
    if not names:
        return f"kernels for every op{asked}"
    return f"references for {', '.join(sorted(names))}{asked}"


def _introspection() -> str:
    if _library.introspection() is not None:
        return "present"
    if _library.missing() is not None:
        return "missing, like the compiled library"
    return "not in this wheel (portable wheels omit it to serve every Python version)"


def _cuda_kernels() -> str:
    module = _library.introspection()
    return module.build_facts()["cuda"] if module is not None else "unknown without the introspection module"


def _gpu() -> str:
    if torch.version.cuda is None:
        return "none: this PyTorch is a CPU build"
    if not torch.cuda.is_available():
        return f"none usable by PyTorch (built with CUDA {torch.version.cuda})"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        old = "" if (major, minor) >= OLDEST_CAPABILITY else ", too old for pmf's kernels: they need sm_80"
        name = torch.cuda.get_device_name(index)
        day = checked.passed_on(name)
        found = f"pmf check passed on {day}" if day else "no pmf check has passed yet"
        names.append(f"{name} (sm_{major}{minor}{old}; {found})")
    return "; ".join(names)


def _driver() -> str:
    """The NVIDIA kernel driver's version; CUDA 13 kernels need 580 or newer."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "no NVIDIA driver is loaded"


def _compiler() -> str:
    module = _library.introspection()
    return (
        module.build_facts()["compiler"] if module is not None else "unknown without the introspection module"
    )


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The report as text, one fact per line."""
    found = facts()
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in found.items())


def facts() -> dict[str, str]:
    """The facts of a bug report, by name."""
    found = {
        "pixelmeanflow": f"{VERSION} in {Path(__file__).parent}",
        "python": f"{platform.python_version()} ({platform.platform()})",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "processor": f"{cpu_name()}, {os.cpu_count()} logical",
        "cpu kernels": _cpu_kernels(),
        "cuda kernels": _cuda_kernels(),
        "ops by": _choice(),
        "gpu": _gpu(),
        "driver": _driver(),
        "introspection": _introspection(),
        "compiler": _compiler(),
    }
    return {**found, **{name: _version_of(name) for name in OPTIONAL}}
