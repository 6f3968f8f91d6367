"""What the public functions do with arguments before a kernel sees them: autocast, and absent tangents."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_matmul", "autocast_widest", "check_tangents", "zeros"]


def autocast_matmul(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, what a matrix product does: everything in autocast's dtype (float64 stays)."""
    device = _device(tensors)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if _is_castable(x) else x for x in tensors)


def autocast_widest(data: int, *tensors: Any) -> tuple[Any, ...]:
    """Under autocast, the widest dtype of the first `data` tensors; the others, which are parameters, follow
    them.

    The kernels compute in float32 inside, so 16-bit activations with float32 parameters lose nothing.
    """
    if not torch.is_autocast_enabled(_device(tensors)):
        return tensors
    dtype = None
    for x in tensors[:data]:
        if x is not None:
            dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
    return tuple(x if x is None else x.to(dtype) for x in tensors)


def check_tangents(op: str, pairs: list[tuple[str, Tensor, Tensor | None]]) -> int | None:
    """The number n of samples that have a tangent, which all (name, value, tangent) must agree on; None if
    none has.

    Raises ValueError unless each tangent has its value's shape, or that of its first n samples.
    """
    count: int | None = None
    for name, value, tangent in pairs:
        if tangent is None:
            continue
        fits = tangent.shape == value.shape
        if not fits and tangent.dim() == value.dim() > 1:
            fits = tangent.shape[1:] == value.shape[1:] and tangent.shape[0] < value.shape[0]
        if not fits:
            raise ValueError(
                f"{op}: {name} must have the shape of its value {list(value.shape)}, or of its first "
                f"samples, got {list(tangent.shape)}"
            )
        n = tangent.shape[0] if tangent.dim() else 0
        if count is not None and n != count:
            raise ValueError(
                f"{op}: all tangents must be of the same first samples, got {count} and {n} of them"
            )
        count = n
    return count


def zeros(like: Tensor, count: int | None = None) -> Tensor:
    """A zero tangent of the first `count` samples of `like` that takes no memory."""
    shape = like.shape if count is None else (count, *like.shape[1:])
    return like.new_zeros(()).expand(shape)


def _device(tensors: tuple[Any, ...]) -> str:
    return next(x.device.type for x in tensors if x is not None)


def _is_castable(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point() and x.dtype != torch.float64
