"""Load libpmf.so once; if it cannot be loaded, remember why.

``import pmf`` works without the library, and so do models, references and data; the first op that needs it
raises a one-sentence error with the reason and the fix.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

from pmf.version import VERSION

OLDEST_TORCH = (2, 11)
LIBRARY = Path(__file__).with_name("libpmf.so")


def _why_not() -> str | None:
    """Load the library; return None on success, else an error message for the user."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if version < OLDEST_TORCH:
        return (
            f"pmf's compiled ops need PyTorch 2.11 or newer, but found {torch.__version__}: "
            "upgrade with `pip install --upgrade torch`."
        )
    if not LIBRARY.exists():
        return (
            f"pmf's compiled library is not at {LIBRARY}: install the package with `pip install .` in its "
            "source folder and run from another folder; to work on it, build it in place (CONTRIBUTING.md)."
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return (
            f"pmf's compiled library could not be loaded with PyTorch {torch.__version__} ({error}): "
            "reinstall it with `pip install --force-reinstall --no-deps --no-build-isolation .`."
        )
    return None


_error = _why_not()


def missing() -> str | None:
    """Why the compiled ops are unavailable, in one sentence; None if they are available."""
    return _error


def require() -> None:
    """Raise RuntimeError if the compiled ops are unavailable."""
    if _error is not None:
        raise RuntimeError(_error)


def identity() -> str:
    """Identifies this version and build of the library, and with it the kernels."""
    try:
        found = LIBRARY.stat()
    except OSError:
        return f"pmf {VERSION} without a library"
    return f"pmf {VERSION}, build {found.st_size:x}-{found.st_mtime_ns:x}"


def takes_cuda_kernel(tensor: torch.Tensor) -> bool:
    """Whether this tensor goes to the CUDA kernel. (The tests' emulator patches this for CPU tensors.)"""
    return tensor.is_cuda


def allow_tf32() -> bool:
    """Whether float32 products on CUDA may round their operands to TF32: PyTorch's own setting."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through torch's newer API, which the older getter cannot read
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def cpu_level() -> str:
    """The instruction-set level of the CPU kernels: portable, avx2, avx512, avx512_bf16 or amx_bf16."""
    require()
    return torch.ops.pmf.cpu_level("")


def set_cpu_level(name: str) -> str:
    """Set the level of the CPU kernels for this process ("auto": the best available).

    The environment variable ``PMF_CPU_LEVEL`` sets the initial level. Raises ValueError for a level that this
    processor lacks.
    """
    require()
    return torch.ops.pmf.cpu_level(name)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch's own product of this dtype is the fastest on this processor, at the level in force.

    If not, csrc/ops/products.h says what is: 16 bits without instructions for them go through float32.
    """
    return _error is None and torch.ops.pmf.multiplied_by_pytorch(dtype)


# The effect of torch.compiler.assume_constant_result, without importing torch._dynamo, which takes seconds.
multiplies._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_asked_level() -> None:
    """Warn if PMF_CPU_LEVEL names a level that this processor or this library lacks."""
    asked = os.environ.get("PMF_CPU_LEVEL", "auto")
    if _error is None and asked not in ("", "auto") and asked != cpu_level():
        warnings.warn(
            f"PMF_CPU_LEVEL={asked} is not available on this processor: using {cpu_level()}.",
            RuntimeWarning,
            stacklevel=2,
        )


_check_asked_level()


@functools.cache
def introspection() -> ModuleType | None:
    """The pybind11 module, or None in portable wheels, which omit it to serve every Python version."""
    if _error is not None:
        return None
    try:
        return importlib.import_module("pmf._introspection")
    except ImportError:
        return None
