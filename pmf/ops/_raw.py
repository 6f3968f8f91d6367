"""The compiled operators, torch.ops.pmf, for functions that call several of them: `raw.swiglu(a, b)`.

If `PMF_KERNELS` selects it, a reference runs instead, without a graph for autograd.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf import checked, kernels

from ._autograd import KernelFunction
from ._dispatch import apply, functions

__all__ = ["raw"]


class _Raw:
    def __getattr__(self, op: str) -> Callable[..., Any]:
        return functools.partial(_run, op)


raw = _Raw()


def _run(op: str, *args: Any) -> Any:
    function = _function(op)
    if kernels.uses_reference(function.family()):
        return apply(function.name, False, *args)
    checked.remind(next(x for x in args if isinstance(x, Tensor)))
    return getattr(torch.ops.pmf, op)(*args)


@functools.cache
def _function(op: str) -> type[KernelFunction]:
    return next(f for f in functions.values() if getattr(f, "op", None) == op and not f.constants)
