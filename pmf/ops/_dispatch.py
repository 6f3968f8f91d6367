"""Choose the implementation: a kernel with its derivatives or its reference, eager or in a compiled graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pmf import _library, kernels

from ._autograd import JvpFunction, KernelFunction

__all__ = ["apply", "call", "functions", "has_kernel", "plain", "register", "register_fake"]

functions: dict[str, type[KernelFunction]] = {}
_value_of: dict[str, str] = {}  # each function's name -> the function whose tangent it computes, or itself


def call(name: str, *args: Any) -> Any:
    """Run a registered KernelFunction such that every derivative is correct or raises."""
    _library.require()
    _check_meta(name, args)
    op = _value_of[name]  # a block's branch is not an op: the ops inside it choose separately
    by_reference = op in kernels.NAMES and kernels.uses_reference(op)
    return _run(name, args, not by_reference and has_kernel(*args))


def plain(name: str, *args: Any) -> Any:
    """The result of `call` from the reference, differentiated by PyTorch; None for the constants."""
    return _run(name, args, False)


def _run(name: str, args: tuple[Any, ...], by_kernel: bool) -> Any:
    if not torch.compiler.is_compiling():
        return apply(name, by_kernel, *args)
    from . import _compiled  # imports torch._dynamo, which takes seconds

    # Read here, where torch.compile guards it: a graph compiled earlier is not reused inside a dual_level.
    if forward_ad._current_level >= 0 and not _compiled.in_func_jvp():
        op = _value_of[name]
        raise RuntimeError(
            f"{op}: torch.compile drops the tangents of torch.autograd.forward_ad; "
            f"call pmf.ops.{op}_jvp with explicit tangents, or torch.func.jvp, instead"
        )
    return _compiled.apply(name, by_kernel, *args)


def apply(name: str, by_kernel: bool, *args: Any) -> Any:
    """Run a registered KernelFunction, or its reference, hidden from torch.compile."""
    function = functions[name]
    if by_kernel:
        return function.call(*args)
    found = function.plain(function.Arguments(*args))
    outputs = tuple(found.get(y) for y in function.outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def _check_meta(name: str, args: tuple[Any, ...]) -> None:
    """A meta tensor makes PyTorch compute only shapes, so the results would hold no values."""
    meta = [x.is_meta for x in args if isinstance(x, Tensor)]
    if any(meta) and not meta[0]:  # the result would be on the first one's device
        raise ValueError(
            f"{_value_of[name]}: some arguments are on the meta device, where tensors have no values: load "
            "them first"
        )


def has_kernel(*args: Any) -> bool:
    """Whether a kernel accepts these tensors. float64 on CUDA uses the reference."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    return all(x.dtype != torch.float64 for x in tensors) or not _library.takes_cuda_kernel(tensors[0])


def register(name: str, function: type[KernelFunction]) -> None:
    """Register `function` for `call`; if it has a `fake`, also its raw op's shapes, gradient and vmap.

    The raw op's gradient and vmap are for direct users of torch.ops.pmf: `call` never needs them.
    """
    function.name = name
    functions[name] = function
    _value_of[name] = function.value.name if issubclass(function, JvpFunction) else name
    fake = getattr(function, "fake", None)
    if fake is None or getattr(function, "detaches", False) or _library.missing():
        return
    register_fake(function.op, fake)
    torch.library.register_autograd(f"pmf::{function.op}", function.backward, setup_context=function.save)
    torch.library.register_vmap(f"pmf::{function.op}", function.vmap)


def register_fake(op: str, fake: Callable[..., Any]) -> None:
    """Register only the shapes of a raw op."""
    if not _library.missing():
        torch.library.register_fake(f"pmf::{op}", fake)
