"""The optimizer's step with CUDA kernels: few launches, no readback, so that a graph can capture it.

Values that change between steps are on the device: always the step count, and learning rate and weight decay
if given as tensors there. Everything else is a launch argument, which a captured graph keeps.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pmf import _library, checked, kernels
from pmf.ops._dispatch import register_fake
from pmf.ops.newton_schulz import kernels_take
from pmf.reference.newton_schulz import step_coefficients

from ._matrices import layout_of

__all__ = ["adam_step", "muon_step", "take"]

State = dict[str, Any]


def take(group: dict[str, Any], p: Tensor) -> bool:
    """Whether the kernels step this parameter, which has a gradient; otherwise plain PyTorch does."""
    assert p.grad is not None
    if not (p.is_contiguous() and p.grad.dtype == p.dtype) or kernels.uses_reference("muon"):
        return False
    if group["algorithm"] == "adam":
        return kernels_take(p, p.dtype)
    if kernels.uses_reference("newton_schulz"):
        return False
    return group["ns_steps"] > 0 and kernels_take(p, compute_dtype(group) or torch.float16)


def compute_dtype(group: dict[str, Any]) -> torch.dtype | None:
    """The dtype of a group's Newton-Schulz iteration; None for the device's default."""
    return None if group["compute_dtype"] is None else getattr(torch, group["compute_dtype"])


def muon_step(group: dict[str, Any], params: list[Tensor], states: list[State]) -> None:
    """Step parameters that share dtype, device and step count, all their matrices together."""
    layouts = [layout_of(group, p.shape) for p in params]
    coefficients = step_coefficients(group["ns_steps"], group["ns_coefficients"])
    checked.remind(params[0])
    torch.ops.pmf.muon_step(
        *(
            [matrix for layout, x in zip(layouts, tensors, strict=False) for matrix in layout.cut(x)]
            for tensors in _lists(params, states, "momentum")
        ),
        *_settings(group, params[0], states[0]),
        group["momentum"],
        group["nesterov"],
        group["bias_correction"],
        [scale for layout in layouts for scale in layout.scales(group["scale"])],
        list(chain.from_iterable(coefficients)),
        group["ns_method"],
        compute_dtype(group) or torch.float16,
        _library.allow_tf32(),
    )


def adam_step(group: dict[str, Any], params: list[Tensor], states: list[State]) -> None:
    """Step any parameters that share dtype, device and step count."""
    checked.remind(params[0])
    torch.ops.pmf.adam_step(
        *_lists(params, states, "momentum", "square"),
        *_settings(group, params[0], states[0]),
        *group["betas"],
        group["eps"],
        group["adam_nesterov"],
    )


def _lists(params: list[Tensor], states: list[State], *names: str) -> list[list[Tensor]]:
    """Parameters, gradients, state tensors by name, and master weights if any."""
    grads = [p.grad.contiguous() for p in params if p.grad is not None]
    return [
        [p.detach() for p in params],
        grads,
        *([state[name] for state in states] for name in names),
        [state["master"] for state in states if "master" in state],
    ]


def _settings(group: dict[str, Any], p: Tensor, state: State) -> list[Any]:
    """Step count, learning rate and weight decay: each of the last two a tensor or a number."""
    settings = [state["step"]]
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and value.device == p.device:
            settings += [value.detach(), 0.0]
        else:
            settings += [None, float(value)]
    return settings


register_fake("muon_step", lambda *_: None)
register_fake("adam_step", lambda *_: None)
