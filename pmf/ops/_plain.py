"""Derivatives of plain PyTorch code, where no kernel computes them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["in_float32", "jvp", "vjp"]

Args = tuple[Any, ...]


def vjp(function: Callable[..., tuple[Tensor, ...]], args: Args, cotangents: Args) -> Args:
    """Gradients for all arguments: None for arguments that are not floating tensors."""
    pure, tensors, where = _of_tensors(function, args)
    outputs, pull = torch.func.vjp(pure, *tensors)[:2]
    grads: list[Tensor | None] = [None] * len(args)
    found = pull(
        tuple(torch.zeros_like(y) if c is None else c for y, c in zip(outputs, cotangents, strict=True))
    )
    for i, grad in zip(where, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def jvp(function: Callable[..., tuple[Tensor, ...]], args: Args, tangents: Args) -> tuple[Tensor, ...]:
    """Tangents of the outputs; a None tangent means zero.

    J t is the gradient of <J^T c, t> in c, for any c: two reverse passes, because forward-mode levels do not
    nest.
    """
    pure, tensors, where = _of_tensors(function, args)
    given = (tangents[i] for i in where)
    directions = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(tensors, given, strict=True))
    cotangents = tuple(torch.zeros_like(y) for y in pure(*tensors))
    pull = torch.func.vjp(lambda *c: torch.func.vjp(pure, *tensors)[1](c), *cotangents)[1]
    return pull(directions)


def in_float32(
    function: Callable[..., tuple[Tensor, ...]], like: int = 0, wide: tuple[int, ...] = ()
) -> Callable[..., tuple[Tensor, ...]]:
    """Make plain PyTorch code compute 16-bit inputs in float32, even under autocast, and round once: to the
    dtype of argument `like`, except for the outputs `wide`.
    """

    @functools.wraps(function)
    def wrapper(*args: Any) -> tuple[Tensor, ...]:
        with torch.autocast(args[like].device.type, enabled=False):
            found = function(*map(_widen, args))
            return tuple(y if i in wide else y.to(args[like].dtype) for i, y in enumerate(found))

    return wrapper


def _of_tensors(
    function: Callable[..., Any], args: Args
) -> tuple[Callable[..., Any], tuple[Tensor, ...], list[int]]:
    """`function` as a function of only its floating tensors, with these tensors and their positions."""
    where = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]

    def pure(*tensors: Tensor) -> Any:
        full = list(args)
        for i, x in zip(where, tensors, strict=True):
            full[i] = x
        return function(*full)

    return pure, tuple(args[i] for i in where), where


def _widen(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x
