"""Steps shared by several ranks, each with part of the work and of the state."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._cohort import State, States, fit, gradient, local, new_state, working
from ._matrices import layout_of
from ._plain import adam_step, muon_apply, muon_directions

if TYPE_CHECKING:  # imported at run time only with several ranks, because it loads torch.distributed
    from torch.distributed import ProcessGroup

    from ._ranks import Exchange

__all__ = ["SharedSteps", "fill"]

Group = dict[str, Any]


class SharedSteps:
    """The ranks that step an optimizer's groups together, and the exchanges of their gradients."""

    def __init__(self, process_group: "ProcessGroup | None" = None) -> None:
        self.process_group = process_group
        self._exchanges: dict[int, list[tuple[Exchange, list[Tensor]]]] = {}

    def takes(self, group: Group) -> bool:
        """Whether several ranks step these parameters together."""
        return self.process_group is not None or any(hasattr(p, "device_mesh") for p in group["params"])

    def make_state(self, index: int, group: Group, states: States) -> None:
        """Create all state that this rank keeps for the group at this index."""
        for exchange, parameters in self._exchanges_of(index, group):
            for i, p in enumerate(parameters):
                if not states[p]:
                    states[p].update(new_state(group, p, owned=i in exchange.owned))
                fit(p, states[p])

    def step(self, index: int, group: Group, states: States) -> None:
        """Step the group at this index on all ranks; a gradient of None counts as zero."""
        self.make_state(index, group, states)
        for exchange, parameters in self._exchanges_of(index, group):
            _step(group, exchange, parameters, [states[p] for p in parameters])

    def _exchanges_of(self, index: int, group: Group) -> "list[tuple[Exchange, list[Tensor]]]":
        """The group's parameters, in lists of one kind."""
        if sum(len(parameters) for _, parameters in self._exchanges.get(index, ())) != len(group["params"]):
            from ._ranks import make_exchange

            kinds: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                kinds[p.dtype, p.device, hasattr(p, "device_mesh")].append(p)
            self._exchanges[index] = [
                (make_exchange(parameters, _works(group, parameters), self.process_group), parameters)
                for parameters in kinds.values()
            ]
        return self._exchanges[index]


def _works(group: Group, parameters: list[Tensor]) -> list[int] | None:
    if group["algorithm"] == "adam":
        return None
    return [layout_of(group, p.shape).work() for p in parameters]


def _step(group: Group, exchange: "Exchange", parameters: list[Tensor], states: list[State]) -> None:
    work = [working(p, state) for p, state in zip(parameters, states, strict=True)]
    grads = [
        torch.zeros_like(w) if p.grad is None else local(gradient(p, w))
        for p, w in zip(parameters, work, strict=True)
    ]
    k = states[0]["step"] + 1
    for state in states:
        state["step"] = k
    if group["algorithm"] == "adam":
        here = [{key: local(state[key]) for key in ("momentum", "square")} for state in states]
        adam_step(group, k, work, exchange.average(grads), here)
    else:
        own = exchange.collect(grads)
        whole = _owned_steps(group, k, own, [states[i]["momentum"] for i in exchange.owned]) if own else []
        for w, step in zip(work, exchange.give_back(whole), strict=True):
            muon_apply(group, w, [w], [step])
    for p, w, state in zip(parameters, work, states, strict=True):
        if "master" in state:
            local(p).copy_(w)


def _owned_steps(group: Group, k: int, grads: list[Tensor], momenta: list[Tensor]) -> list[Tensor]:
    """s newton_schulz(u) of full parameters, in their shapes."""
    layouts = [layout_of(group, grad.shape) for grad in grads]
    steps = zip(grads, layouts, muon_directions(group, k, grads, momenta, layouts), strict=True)
    return [layout.join(matrices, grad) for grad, layout, matrices in steps]


def fill(live: Tensor, whole: Tensor) -> None:
    """Overwrite a tensor, or this rank's shard of it, with a full one that every rank has."""
    if hasattr(live, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        whole = whole.to(live.device, live.dtype)
        whole = distribute_tensor(whole, live.device_mesh, live.placements, src_data_rank=None)  # type: ignore[attr-defined]
    live.copy_(whole)
