"""The part of the optimizer that knows of other ranks: shared steps, and a state that can be sharded."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._plain import adam_step, muon_apply, muon_directions

if TYPE_CHECKING:  # at run time it is imported when there are ranks: it costs what torch.distributed costs
    from torch.distributed import ProcessGroup

    from ._ranks import Exchange

__all__ = ["SharedSteps", "fill", "gradient", "local", "new_state"]


class SharedSteps(torch.optim.Optimizer):
    """Steps of parameter groups that several ranks have, each with a part of the work and of the state."""

    _process_group: "ProcessGroup | None"
    _exchanges: "dict[int, list[tuple[Exchange, list[Tensor]]]]"
    """By index of the parameter group."""

    def _working(self, p: Tensor) -> Tensor:
        """The local part of a parameter, or its master: a new one if someone else changed the parameter."""
        master: Tensor | None = self.state[p].get("master")
        p = local(p.detach())
        if master is None:
            return p
        master = local(master)
        rounded = master.to(p.dtype)
        if not torch.equal(rounded, p) and not (rounded.isnan() | p.isnan()).any():
            master.copy_(p)
        return master

    def _is_shared(self, group: dict[str, Any]) -> bool:
        """Whether several ranks step these parameters together."""
        return self._process_group is not None or any(hasattr(p, "device_mesh") for p in group["params"])

    def _exchanges_of(self, index: int) -> "list[tuple[Exchange, list[Tensor]]]":
        """A group's parameters in lists of one kind, and what moves their gradients; makes their state."""
        from ._ranks import make_exchange

        group = self.param_groups[index]
        if sum(len(parameters) for _, parameters in self._exchanges.get(index, ())) != len(group["params"]):
            kinds: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                kinds[p.dtype, p.device, hasattr(p, "device_mesh")].append(p)
            self._exchanges[index] = [
                (make_exchange(parameters, self._process_group), parameters) for parameters in kinds.values()
            ]
        for exchange, parameters in self._exchanges[index]:
            for i, p in enumerate(parameters):
                if not self.state[p]:
                    self.state[p].update(new_state(group, p, owned=i in exchange.owned))
        return self._exchanges[index]

    def _step_on_ranks(self, group: dict[str, Any], exchange: "Exchange", parameters: list[Tensor]) -> None:
        work = [self._working(p) for p in parameters]
        grads = [
            torch.zeros_like(w) if p.grad is None else local(gradient(p, w))
            for p, w in zip(parameters, work, strict=True)
        ]
        states = [self.state[p] for p in parameters]
        k = states[0]["step"] + 1
        for state in states:
            state["step"] = k
        if group["algorithm"] == "adam":
            here = [{key: local(state[key]) for key in ("momentum", "square")} for state in states]
            adam_step(group, k, work, exchange.average(grads), here)
        else:
            own = exchange.collect(grads)
            momenta = [states[i]["momentum"] for i in exchange.owned]
            directions = list(muon_directions(group, k, own, momenta)) if own else []
            given = exchange.give_back(directions)
            for p, w, direction in zip(parameters, work, given, strict=True):
                muon_apply(group, w, direction, p.shape)
        for p, w in zip(parameters, work, strict=True):
            if "master" in self.state[p]:
                local(p).copy_(w)

    def named_state(self) -> dict[str, Tensor]:
        """The live state as "<parameter>/<what>", to be saved or overwritten in place; made where absent.

        Over several ranks: this rank's matrices, whole; its rows of sharded tensors, as DTensors. The number
        of steps is no tensor of the optimizer: `set_steps` puts it back.
        """
        named: dict[str, Tensor] = {}
        for index, group in enumerate(self.param_groups):
            if self._is_shared(group):
                self._exchanges_of(index)
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if not self.state[p]:
                    self.state[p].update(new_state(group, p))
                for key, value in self.state[p].items():
                    if key != "step":
                        named[f"{name}/{key}"] = value
        return named

    def set_steps(self, steps: int) -> None:
        """Continue as after so many steps of every parameter."""
        self.named_state()
        for state in self.state.values():
            state["step"] = steps

    def _load_on_ranks(self, state_dict: dict[str, Any], states: dict[Tensor, dict[str, Any]]) -> None:
        """Take one process's state: this rank's part of it."""
        counts = {int(state["step"]) for state in states.values()}
        if len(counts) > 1:
            raise ValueError("Muon: ranks step all parameters together, but the saved step counts differ")
        own = self.named_state()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
            for name, p in zip(group["param_names"], group["params"], strict=True):
                for key, value in states.get(p, {}).items():
                    if f"{name}/{key}" in own:
                        fill(own[f"{name}/{key}"], value)
        self.set_steps(counts.pop() if counts else 0)


def local(x: Tensor) -> Tensor:
    """The part of x that lives here: a DTensor's shard, or x itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def fill(live: Tensor, whole: Tensor) -> None:
    """Overwrite a tensor, or this rank's shard of it, with a whole one that every rank has."""
    if hasattr(live, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        whole = whole.to(live.device, live.dtype)
        whole = distribute_tensor(whole, live.device_mesh, live.placements, src_data_rank=None)  # type: ignore[attr-defined]
    live.copy_(whole)


def new_state(group: dict[str, Any], p: Tensor, owned: bool = True) -> dict[str, Any]:
    """What a parameter remembers before its first step; the momentum of a matrix only where it is owned."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    state: dict[str, Any] = {"step": 0}
    if group["algorithm"] == "adam":
        state["momentum"] = torch.zeros_like(p, dtype=dtype)
        state["square"] = torch.zeros_like(p, dtype=dtype)
    elif owned:  # whole, also where the parameter is in shards
        state["momentum"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
    if p.dtype != dtype:
        state["master"] = p.detach().to(dtype)
    return state


def gradient(p: Tensor, work: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad.detach().to(work.dtype)
