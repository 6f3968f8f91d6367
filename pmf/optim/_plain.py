"""The optimizer's step in plain PyTorch, on lists of parameters that share dtype, device and step count."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from pmf.ops.newton_schulz import newton_schulz

from . import _kernels
from ._matrices import Layout

__all__ = ["adam_step", "muon_apply", "muon_directions"]

CHUNK = 1 << 26
"""Elements orthogonalised at a time: bounds memory (256 MB per update in float32), not the result."""


def muon_directions(
    group: dict[str, Any], k: int, grads: list[Tensor], momenta: list[Tensor], layouts: list[Layout]
) -> Iterator[list[Tensor]]:
    """s newton_schulz(u) of each parameter's matrices at step k; updates the momenta."""
    mu = group["momentum"]
    torch._foreach_lerp_(momenta, grads, 1 - mu)
    of_momentum, of_gradient = _nesterov(mu, k, group["nesterov"], group["bias_correction"])
    for chunk in _chunks(grads):
        updates = torch._foreach_mul(momenta[chunk], of_momentum)
        if of_gradient != 0:
            torch._foreach_add_(updates, grads[chunk], alpha=of_gradient)
        cut = [layout.cut(update) for layout, update in zip(layouts[chunk], updates, strict=True)]
        found = newton_schulz(
            list(chain.from_iterable(cut)),
            group["ns_steps"],
            group["ns_coefficients"],
            group["ns_method"],
            _kernels.compute_dtype(group),
        )
        if found:  # zero experts have no matrices, and PyTorch rejects empty lists
            torch._foreach_mul_(
                found, [s for layout in layouts[chunk] for s in layout.scales(group["scale"])]
            )
        following = iter(found)
        for matrices in cut:
            yield list(islice(following, len(matrices)))


def muon_apply(group: dict[str, Any], p: Tensor, parts: list[Tensor], steps: list[Tensor]) -> None:
    """p <- (1 - lr wd) p - lr step, with a step for each part of p."""
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if decay != 0:
        p.mul_(1 - lr * decay)
    if parts:
        shaped = [step.reshape(part.shape) for part, step in zip(parts, steps, strict=True)]
        torch._foreach_add_(parts, shaped, alpha=-lr)


def adam_step(
    group: dict[str, Any], k: int, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
) -> None:
    (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), float(group["weight_decay"])
    momenta, squares = [state["momentum"] for state in states], [state["square"] for state in states]
    torch._foreach_lerp_(momenta, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    of_momentum, of_gradient = _nesterov(beta1, k, group["adam_nesterov"], True)
    update = torch._foreach_mul(momenta, of_momentum)
    if of_gradient != 0:
        torch._foreach_add_(update, grads, alpha=of_gradient)
    deviation = torch._foreach_div(squares, 1 - beta2**k)
    torch._foreach_sqrt_(deviation)
    torch._foreach_add_(deviation, group["eps"])
    if decay != 0:
        torch._foreach_mul_(params, 1 - lr * decay)
    torch._foreach_addcdiv_(params, update, deviation, -lr)


def _nesterov(beta: float, k: int, nesterov: bool, bias_correction: bool) -> tuple[float, float]:
    """The factors on momentum and gradient in the update of step k."""
    if not nesterov:
        return (1 / (1 - beta**k) if bias_correction else 1.0), 0.0
    if not bias_correction:
        return beta, 1 - beta
    return beta / (1 - beta ** (k + 1)), (1 - beta) / (1 - beta**k)


def _chunks(params: list[Tensor]) -> Iterator[slice]:
    begin = elements = 0
    for i, p in enumerate(params):
        if elements and elements + p.numel() > CHUNK:
            yield slice(begin, i)
            begin, elements = i, 0
        elements += p.numel()
    yield slice(begin, len(params))
