"""Cohorts: the parameters of a group that step together."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _kernels, _plain
from ._matrices import layout_of

__all__ = ["Cohort", "State", "States", "cohorts", "fit", "gradient", "local", "new_state", "working"]

State = dict[str, Any]
States = dict[Tensor, State]


@dataclass(frozen=True)
class Cohort:
    """Parameters with gradients that share settings, dtype, device and step count.

    The count is one tensor on the device if kernels do the step, and a number if PyTorch does.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    states: list[State]

    def step(self) -> None:
        """Step all of them."""
        if isinstance(self.states[0]["step"], Tensor):
            step = _kernels.muon_step if self.group["algorithm"] == "muon" else _kernels.adam_step
            step(self.group, self.parameters, self.states)
        else:
            self._step_plainly()

    def _step_plainly(self) -> None:
        work = [working(p, state) for p, state in zip(self.parameters, self.states, strict=True)]
        grads = [gradient(p, w) for p, w in zip(self.parameters, work, strict=True)]
        k = self.states[0]["step"] + 1
        for state in self.states:
            state["step"] = k
        if self.group["algorithm"] == "adam":
            _plain.adam_step(self.group, k, work, grads, self.states)
        else:
            layouts = [layout_of(self.group, w.shape) for w in work]
            momenta = [state["momentum"] for state in self.states]
            directions = _plain.muon_directions(self.group, k, grads, momenta, layouts)
            for w, layout, steps in zip(work, layouts, directions, strict=True):
                _plain.muon_apply(self.group, w, layout.parts(w), steps)
        for p, w in zip(self.parameters, work, strict=True):
            if p is not w:
                p.copy_(w)


def cohorts(group: dict[str, Any], states: States) -> list[Cohort]:
    """The cohorts of a group's parameters that have gradients, with their state created."""
    present = [p for p in group["params"] if p.grad is not None]
    for p in present:
        if not states[p]:
            states[p].update(new_state(group, p))
        fit(p, states[p])
    _place_counts(group, present, states)
    together: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p in present:
        together[_count(states[p]), p.dtype, p.device].append(p)
    return [Cohort(group, members, [states[p] for p in members]) for members in together.values()]


def _place_counts(group: dict[str, Any], present: Sequence[Tensor], states: States) -> None:
    """Put step counts where the steps need them: on the device, in one tensor per cohort."""
    absent = {_count(states[p]) for p in group["params"] if p.grad is None and p in states and states[p]}
    counters: dict[tuple[Any, ...], Tensor] = {}
    for p in present:
        state, key = states[p], (_count(states[p]), p.dtype, p.device)
        if not _kernels.take(group, p):
            state["step"] = int(state["step"])
        elif not isinstance(state["step"], Tensor):
            if key not in counters:
                counters[key] = torch.full((), state["step"], dtype=torch.int64, device=p.device)
            state["step"] = counters[key]
        elif key[0] in absent:  # parameters without gradients keep their old count
            if key not in counters:
                counters[key] = state["step"].clone()
            state["step"] = counters[key]


def _count(state: State) -> Any:
    """A step count to compare without reading it from a device: a number, or its tensor's identity."""
    step = state["step"]
    return ("tensor", id(step)) if isinstance(step, Tensor) else step


def new_state(group: dict[str, Any], p: Tensor, owned: bool = True) -> State:
    """A parameter's state before its first step; the momentum of a matrix only if this rank owns it."""
    dtype = _dtype_of_state(p)
    state: State = {"step": 0}
    if group["algorithm"] == "adam":
        state["momentum"] = torch.zeros_like(p, dtype=dtype)
        state["square"] = torch.zeros_like(p, dtype=dtype)
    elif owned:  # full, even if the parameter is sharded
        state["momentum"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
    if p.dtype != dtype:
        state["master"] = p.detach().to(dtype)
    return state


def fit(p: Tensor, state: State) -> None:
    """Convert a state to its parameter's dtype and device, which loading or `module.to` may have changed."""
    dtype = _dtype_of_state(p)
    if p.dtype == dtype:
        state.pop("master", None)
    elif "master" not in state:
        state["master"] = p.detach().to(dtype)
    for key, x in state.items():
        if key != "step" and (x.dtype != dtype or x.device != p.device):
            state[key] = x.to(p.device, dtype)


def _dtype_of_state(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def working(p: Tensor, state: State) -> Tensor:
    """The local part of a parameter, or its master, recreated if the parameter was changed externally."""
    master: Tensor | None = state.get("master")
    p = local(p.detach())
    if master is None:
        return p
    master = local(master)
    rounded = master.to(p.dtype)
    # A NaN in both is no change, but torch.equal, which is faster, says so.
    if not torch.equal(rounded, p) and not torch.allclose(rounded, p, rtol=0, atol=0, equal_nan=True):
        master.copy_(p)
    return master


def gradient(p: Tensor, work: Tensor) -> Tensor:
    """A parameter's gradient in the dtype of its step."""
    assert p.grad is not None
    return p.grad.detach().to(work.dtype)


def local(x: Tensor) -> Tensor:
    """The local part of x: a DTensor's shard, or x itself."""
    return x.to_local() if hasattr(x, "to_local") else x
