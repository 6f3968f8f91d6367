"""Argument handling before a kernel: autocast, and absent tangents."""

import math
from typing import Any

import torch
from torch import Tensor

from pmf.arguments import as_plain, require_number

__all__ = [
    "autocast_matmul",
    "autocast_widest",
    "check_constant",
    "check_flags",
    "check_tangents",
    "is_differentiable",
    "zeros",
]


def check_constant(op: str, name: str, value: Any) -> None:
    """Raise unless a value is a number of at least 0: a tensor's gradient and tangent would be lost."""
    if (type(value) is float and 0 <= value < math.inf) or torch.compiler.is_compiling():
        return
    if isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a number, got a tensor")
    require_number(f"{op}: {name}", value, at_least=0)


def check_flags(op: str, **flags: Any) -> None:
    """Raise TypeError for the first value that is not True or False: any text would count as True."""
    for name, value in flags.items():
        if value is True or value is False or isinstance(value, torch.SymBool):
            continue
        if not torch.compiler.is_compiling() and (
            isinstance(value, Tensor) or type(as_plain(value)) is not bool
        ):
            raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def autocast_matmul(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, cast like a matrix product: everything to autocast's dtype (float64 stays)."""
    if not _is_autocast_enabled(tensors):
        return tensors
    dtype = torch.get_autocast_dtype(_device(tensors))
    return tuple(x.to(dtype) if _is_castable(x) else x for x in tensors)


def autocast_widest(data: int, *tensors: Any) -> tuple[Any, ...]:
    """Under autocast, cast everything, parameters included, to the widest dtype of the first `data` tensors.

    The kernels compute in float32 internally, so 16-bit activations with float32 parameters lose nothing.
    """
    if not _is_autocast_enabled(tensors):
        return tensors
    dtype = None
    for x in tensors[:data]:
        if x is not None:
            dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
    return tuple(x if x is None else x.to(dtype) for x in tensors)


def check_tangents(
    op: str,
    pairs: list[tuple[str, Tensor, Tensor | None]],
    detach_tangent: bool,
    parameters: tuple[Tensor | None, ...] = (),
) -> int | None:
    """The number of samples with a tangent; None if no tangent is given.

    Raises ValueError unless each tangent of (name, value, tangent) has its value's shape, or all tangents
    cover the same first n samples and are detached if autograd would record the op.
    """
    check_flags(op, detach_tangent=detach_tangent)
    given = [(name, value, tangent) for name, value, tangent in pairs if tangent is not None]
    counts = [tangent.shape[:1] for _, _, tangent in given]  # not a set: torch.compile would specialise on it
    fewer = False
    for name, value, tangent in given:
        if tangent.shape == value.shape:
            continue
        fewer = True
        same_rank = tangent.dim() == value.dim() > 1
        if not same_rank or tangent.shape[1:] != value.shape[1:] or tangent.shape[0] > value.shape[0]:
            raise ValueError(
                f"{op}: {name} must have the shape of its value {list(value.shape)}, or of its "
                f"first samples, got {list(tangent.shape)}"
            )
    if fewer and any(count != counts[0] for count in counts):
        sizes = " and ".join(str(count[0]) for count in sorted(set(counts)))
        raise ValueError(f"{op}: all tangents must cover the same first samples, got {sizes} of them")
    values = (x for _, value, tangent in pairs for x in (value, tangent))
    if fewer and not detach_tangent and is_differentiable(*values, *parameters):
        raise ValueError(
            f"{op}: gradients with tangents of only the first samples need detach_tangent=True, "
            "because there is no backward through such a tangent"
        )
    if not given:
        return None
    tangent = given[0][2]
    return tangent.shape[0] if tangent.dim() else 0


def is_differentiable(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on any of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def zeros(like: Tensor, count: int | None = None) -> Tensor:
    """A zero tangent for the first `count` samples of `like` that takes no memory."""
    shape = like.shape if count is None else (count, *like.shape[1:])
    return like.new_zeros(()).expand(shape)


def _device(tensors: tuple[Any, ...]) -> str:
    return next(x.device.type for x in tensors if x is not None)


def _is_autocast_enabled(tensors: tuple[Any, ...]) -> bool:
    device = _device(tensors)
    return device != "meta" and torch.is_autocast_enabled(device)  # torch raises for the meta device


def _is_castable(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point() and x.dtype != torch.float64
