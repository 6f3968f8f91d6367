"""Muon for matrices and Adam for the rest, in one torch optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmf.ops.newton_schulz import DTYPES, METHODS
from pmf.reference.newton_schulz import Coefficients, step_coefficients

from . import _kernels
from ._plain import SCALES, adam_step, muon_apply, muon_directions
from ._sharing import SharedSteps, gradient, new_state
from .routing import ParamsLike, check_tensors, frozen_names, route

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Muon"]

PRESETS: dict[str, dict[str, Any]] = {
    "pmf": {
        "momentum": 0.95,
        "nesterov": True,
        "bias_correction": True,
        "scale": "spectral",
        "weight_decay": 0.0,
        "compute_dtype": None,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "adam_nesterov": True,
    },
    "torch": {
        "momentum": 0.95,
        "nesterov": True,
        "bias_correction": False,
        "scale": "spectral",
        "weight_decay": 0.1,
        "compute_dtype": "bfloat16",
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "adam_nesterov": False,
    },
}
PRESETS["moonlight"] = {**PRESETS["torch"], "scale": "match_rms"}


class Muon(SharedSteps):
    """Muon: momentum, orthogonalised, for matrices; Adam for everything else.

    For a matrix p [rows, columns] (torch's [out, in]) with gradient g, at its step k = 1, 2, ...:

        m <- mu m + (1 - mu) g
        u  = mu m / (1 - mu^(k+1)) + (1 - mu) g / (1 - mu^k)        ("pmf": bias-corrected Nesterov)
             mu m + (1 - mu) g                                       (without bias_correction)
             m / (1 - mu^k), or m                                    (without nesterov)
        p <- (1 - lr wd) p - lr s newton_schulz(u)
        s  = sqrt(max(1, rows / columns)) ("spectral"), 0.2 sqrt(max(rows, columns)) ("match_rms"), 1 ("none")

    For any other p, Adam with decoupled weight decay, with Nesterov as in optax's adamw(nesterov=True):

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        u  = b1 m / (1 - b1^(k+1)) + (1 - b1) g / (1 - b1^k)         ("pmf")
             m / (1 - b1^k)                                          (without adam_nesterov)
        p <- (1 - lr wd) p - lr u / (sqrt(v / (1 - b2^k)) + eps)

    Args:
        params: a module, (name, parameter) pairs, parameters, or groups: dicts with "params", any of the
            settings below, and "algorithm" "muon" or "adam". `pmf.optim.routing.route` says who gets what,
            `routing()` lists it.
        lr: learning rate of both; a one-element tensor works, as it does for weight_decay.
        preset: "pmf"; "torch" (torch.optim.Muon's: bfloat16 iteration, no bias correction, weight decay 0.1,
            and AdamW); or "moonlight" (the same with scale "match_rms"). The settings below default to it.
        momentum, nesterov, bias_correction, scale, weight_decay: as above.
        ns_steps, ns_coefficients, ns_method, compute_dtype: as in `pmf.ops.newton_schulz`.
        betas, eps, adam_nesterov: Adam's.
        adam_lr: learning rate of the Adam groups, if it is another.
        process_group: the ranks that have the same parameters, and gradients of their own samples, when the
            optimizer is to share them: `torch.distributed.group.WORLD`. step() averages the gradients (those
            that DDP has averaged stay what they are). Parameters sharded by `fully_shard` need no such word.

    Over several ranks each matrix has one owner, who keeps its momentum and orthogonalises it
    (`pmf.optim._ranks`), all ranks apply the result, and a gradient of None counts as zero. The numbers are
    one process's for the same mean gradients; the step is plain PyTorch around `newton_schulz`.
    `named_state` is the state for `torch.distributed.checkpoint`.

    On CUDA the step is compiled kernels (float64 parameters: plain PyTorch): two dozen launches for a whole
    model, none of which waits for the device, so that a CUDA graph can capture a step once the first has made
    the state. A captured step follows its own step count, and `lr` and `weight_decay` where they are tensors
    on the parameters' device, which are not checked there; numbers stay as they were captured. The result
    does not pass through the compute dtype: it is added in float32.

    State is float32 (float64 for float64 parameters). 16-bit parameters get float32 master weights, which
    take the steps and are rounded into the parameters; a parameter changed from outside starts a new master
    (on CUDA element by element).
    A gradient of None skips its parameter; a zero gradient from the start moves nothing; p.grad is never
    written to. `load_state_dict` continues bit for bit.

    Raises ValueError for a setting out of range (a learning rate that is not finite, also one set later), for
    a parameter given twice, and for a state of other parameters.

    Sources: Jordan et al., "Muon" (2024); Kingma and Ba, "Adam" (2015); Liu et al., "Muon is Scalable for LLM
    Training" (2025) for "moonlight".
    """

    def __init__(
        self,
        params: ParamsLike,
        lr: float | Tensor = 1e-3,
        *,
        preset: str = "pmf",
        momentum: float | None = None,
        nesterov: bool | None = None,
        bias_correction: bool | None = None,
        scale: str | None = None,
        weight_decay: float | Tensor | None = None,
        ns_steps: int = 5,
        ns_coefficients: str | Coefficients | Sequence[Coefficients] = "quintic",
        ns_method: str = "auto",
        compute_dtype: torch.dtype | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        adam_nesterov: bool | None = None,
        adam_lr: float | Tensor | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"Muon: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        given = {
            "momentum": momentum,
            "nesterov": nesterov,
            "bias_correction": bias_correction,
            "scale": scale,
            "weight_decay": weight_decay,
            "compute_dtype": _name(compute_dtype),
            "betas": betas,
            "eps": eps,
            "adam_nesterov": adam_nesterov,
        }
        defaults = {
            "lr": lr,
            **PRESETS[preset],
            **{key: value for key, value in given.items() if value is not None},
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_method": ns_method,
        }
        groups = route(params)
        check_tensors(groups)
        for group in groups:
            if adam_lr is not None and group.get("algorithm") == "adam":
                group.setdefault("lr", adam_lr)
        _check({**defaults})
        self._frozen = frozen_names(params)
        self._process_group = process_group
        self._exchanges = {}
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as the constructor takes them; without an "algorithm" it may become two."""
        for group in route([param_group]):
            check_tensors([group])
            if "compute_dtype" in group:
                group["compute_dtype"] = _name(group["compute_dtype"])
            _check({**self.defaults, **group})
            super().add_param_group(group)

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise RuntimeError("Muon: an optimizer with a process group cannot be copied or pickled")
        return {
            **super().__getstate__(),
            "_frozen": self._frozen,
            "_process_group": None,
            "_exchanges": {},
        }

    def routing(self) -> dict[str, list[str]]:
        """Names of the parameters that go by "muon", by "adam", and those of the module that are "frozen"."""
        names: dict[str, list[str]] = {"muon": [], "adam": [], "frozen": list(self._frozen)}
        for group in self.param_groups:
            names[group["algorithm"]] += group["param_names"]
        return names

    @torch._disable_dynamo  # as torch.optim's own methods: Dynamo cannot follow what depends on step counts
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check(group)  # a schedule may have set it
        for index, group in enumerate(self.param_groups):
            if self._is_shared(group):
                for exchange, parameters in self._exchanges_of(index):
                    self._step_on_ranks(group, exchange, parameters)
                continue
            for parameters in self._in_step(group):
                if isinstance(self.state[parameters[0]]["step"], Tensor):
                    self._by_kernels(group, parameters)
                    continue
                work = [self._working(p) for p in parameters]
                grads = [gradient(p, w) for p, w in zip(parameters, work, strict=True)]
                states = [self.state[p] for p in parameters]
                k = states[0]["step"] = states[0]["step"] + 1
                for state in states[1:]:
                    state["step"] = k
                if group["algorithm"] == "adam":
                    adam_step(group, k, work, grads, states)
                else:
                    directions = muon_directions(group, k, grads, [state["momentum"] for state in states])
                    for w, direction in zip(work, directions, strict=True):
                        muon_apply(group, w, direction, w.shape)
                for p, w in zip(parameters, work, strict=True):
                    if p is not w:
                        p.copy_(w)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers and tensors; step counts that live on a device are read."""
        saved = super().state_dict()
        counts: dict[int, int] = {}
        for i, state in saved["state"].items():
            step = state["step"]
            if isinstance(step, Tensor):
                if id(step) not in counts:
                    counts[id(step)] = int(step)
                saved["state"][i] = {**state, "step": counts[id(step)]}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises ValueError where the parameters' names or shapes differ."""
        saved_groups = state_dict["param_groups"]
        mine = [(g["algorithm"], g["param_names"]) for g in self.param_groups]
        saved = [(g.get("algorithm"), g.get("param_names")) for g in saved_groups]
        if mine != saved:
            raise ValueError("Muon: the saved state is of other parameters, or they went by other algorithms")
        own = [p for g in self.param_groups for p in g["params"]]
        states = {
            p: state_dict["state"][i]
            for p, i in zip(own, (i for g in saved_groups for i in g["params"]), strict=True)
            if i in state_dict["state"]
        }
        for p, state in states.items():
            if any(isinstance(x, Tensor) and x.shape != p.shape for x in state.values()):
                raise ValueError("Muon: the saved state is of parameters of other shapes")
        if any(self._is_shared(group) for group in self.param_groups):
            self._load_on_ranks(state_dict, states)
            return
        super().load_state_dict(state_dict)
        # torch casts the state to the parameter's dtype; a 16-bit parameter's is float32.
        for p, state in states.items():
            for key, value in state.items():
                if key == "step":
                    self.state[p][key] = int(value)
                elif isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)

    def _in_step(self, group: dict[str, Any]) -> Iterator[list[Tensor]]:
        """The parameters that have gradients, in lists that share step count, dtype and device."""
        together: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        counters: dict[tuple[Any, ...], Tensor] = {}
        left_out: set[int] = set()
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if p.grad is None:
                if p in self.state:
                    left_out.add(id(self.state[p].get("step")))
                continue
            if p.grad.is_sparse:
                raise RuntimeError(f"Muon: the gradient of {name} is sparse; make it dense")
            state = self.state[p]
            if not state:
                state.update(new_state(group, p))
            if not _kernels.take(group, p):
                state["step"] = int(state["step"])
            elif not isinstance(state["step"], Tensor):
                key = state["step"], p.dtype, p.device
                if key not in counters:
                    counters[key] = torch.full((), state["step"], dtype=torch.int64, device=p.device)
                state["step"] = counters[key]
            step = state["step"]
            together[id(step) if isinstance(step, Tensor) else step, p.dtype, p.device].append(p)
        # A copy: the step counts change while these are consumed.
        for parameters in list(together.values()):
            step = self.state[parameters[0]]["step"]
            if (
                isinstance(step, Tensor) and id(step) in left_out
            ):  # those without gradients keep the old count
                step = step.clone()
                for p in parameters:
                    self.state[p]["step"] = step
            yield parameters

    def _by_kernels(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        if group["algorithm"] == "muon":
            scales = [SCALES[group["scale"]](*p.shape) if p.numel() else 1.0 for p in parameters]
            _kernels.muon_step(group, parameters, states, scales)
        else:
            _kernels.adam_step(group, parameters, states)


def _name(dtype: torch.dtype | str | None) -> str | None:
    """A dtype as settings hold it, which a saved state can be read without unpickling."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _check(group: dict[str, Any]) -> None:
    """Raises ValueError in one sentence for a setting out of range."""
    for name, words in (("lr", "the learning rate"), ("weight_decay", "weight_decay")):
        value = group[name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"Muon: {words} must be one number, got shape {list(value.shape)}")
            if value.device.type != "cpu":
                continue  # reading it would wait for the device, and end a capture
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"Muon: {words} must be finite and not negative, got {float(value)}")
    for name, value in (
        ("momentum", group["momentum"]),
        ("betas[0]", group["betas"][0]),
        ("betas[1]", group["betas"][1]),
    ):
        if not 0 <= value < 1:
            raise ValueError(f"Muon: {name} must be at least 0 and less than 1, got {value}")
    if not (math.isfinite(group["eps"]) and group["eps"] >= 0):
        raise ValueError(f"Muon: eps must be finite and not negative, got {group['eps']}")
    if group["scale"] not in SCALES:
        raise ValueError(f"Muon: scale must be one of {', '.join(SCALES)}, got {group['scale']!r}")
    if group["ns_method"] not in METHODS:
        raise ValueError(f"Muon: ns_method must be one of {', '.join(METHODS)}, got {group['ns_method']!r}")
    if group["compute_dtype"] not in (None, *map(_name, DTYPES)):
        raise ValueError(f"Muon: compute_dtype must be a floating dtype, got {group['compute_dtype']}")
    step_coefficients(group["ns_steps"], group["ns_coefficients"])
