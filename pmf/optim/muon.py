"""Muon for matrices and Adam for everything else, in one torch optimizer."""

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmf.reference.newton_schulz import Coefficients
from pmf.wrappers import others, plain_names

from ._cohort import cohorts, fit, new_state
from ._settings import ITERATION, LAYOUT, MUON_PRESETS, check, check_read, dtype_name, plain_counts
from ._sharing import SharedSteps, fill
from .routing import ParamsLike, check_tensors, frozen_names, route

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Muon"]


class Muon(torch.optim.Optimizer):
    """Muon (orthogonalised momentum) for matrices; Adam for everything else.

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
            settings below, and "algorithm" "muon" or "adam". `pmf.optim.routing.route` defines the
            assignment, `routing()` lists it.
        lr: learning rate of both; a one-element tensor also works, here and for weight_decay.
        preset: "pmf"; "torch" (torch.optim.Muon's: bfloat16 iteration, no bias correction, weight decay 0.1,
            and AdamW); or "moonlight" (the same with scale "match_rms"). It sets the defaults of the settings
            below.
        momentum, nesterov, bias_correction, scale, weight_decay: as above.
        ns_steps, ns_coefficients, ns_method, compute_dtype: as in `pmf.ops.newton_schulz`.
        split_sizes, num_heads: for fused matrices: split_sizes are the rows of each part, and num_heads (one
            number, or one per part) the heads that share a part's rows equally. Every part or head is
            orthogonalised and scaled like a separate parameter: a fused QKV weight has
            split_sizes=[D, D, D], for separate heads also num_heads=H, and with grouped queries
            split_sizes=[H d, K d, K d], num_heads=[H, K, K]. A parameter [experts, rows, columns] in a group
            with algorithm "muon" is that many such matrices.
        flatten: treat weights of convolutions [out, in, ...] as matrices [out, in ...] for Muon.
        betas, eps, adam_nesterov: Adam's.
        adam_lr: learning rate of the Adam groups, if different.
        process_group: the ranks that are to share the optimizer's work, for example
            `torch.distributed.group.WORLD`; they replicate the parameters and have gradients of different
            samples. step() averages the gradients (averaging those that DDP has averaged changes nothing).
            Parameters sharded by `fully_shard` do not need it.

    Over several ranks each parameter has one owner, which keeps its momentum and orthogonalises its matrices
    (`pmf.optim._ranks`); all ranks apply the result, and a gradient of None counts as zero. The result equals
    that of one process with the same mean gradients; the step is plain PyTorch around `newton_schulz`.
    `named_state` is the state for `torch.distributed.checkpoint`.

    On CUDA the step runs in compiled kernels (plain PyTorch for float64 parameters): two dozen launches for
    pMF-B, four times as many for pMF-H, none of which waits for the device, so a CUDA graph can capture a
    step once the first has created the state. A captured step advances its own step count, and rereads `lr`
    and `weight_decay` if they are tensors on the parameters' device, where they are not checked; numbers stay
    as captured. The update is added in float32, not rounded to the compute dtype.

    State is float32 (float64 for float64 parameters). 16-bit parameters get float32 master weights, which are
    updated and rounded into the parameters; a parameter changed externally starts a new master (on CUDA
    element by element). A gradient of None skips its parameter; a gradient that has always been zero moves
    nothing; p.grad is never modified. `load_state_dict` continues bit for bit.

    Raises ValueError for a setting out of range (including a non-finite learning rate set later), an unused
    setting, rows that split_sizes or num_heads do not divide, a parameter given twice, and a state saved for
    other parameters or splits.

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
        split_sizes: Sequence[int] | None = None,
        num_heads: int | Sequence[int] | None = None,
        flatten: bool = False,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        adam_nesterov: bool | None = None,
        adam_lr: float | Tensor | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        if preset not in MUON_PRESETS:
            raise ValueError(f"Muon: preset must be one of {', '.join(MUON_PRESETS)}, got {preset!r}")
        given = {
            "momentum": momentum,
            "nesterov": nesterov,
            "bias_correction": bias_correction,
            "scale": scale,
            "weight_decay": weight_decay,
            "compute_dtype": dtype_name(compute_dtype),
            "betas": betas,
            "eps": eps,
            "adam_nesterov": adam_nesterov,
        }
        usual = {**MUON_PRESETS[preset], **ITERATION, **LAYOUT}
        defaults = {
            "lr": lr,
            **usual,
            **{key: value for key, value in given.items() if value is not None},
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_method": ns_method,
            "split_sizes": plain_counts(split_sizes),
            "num_heads": plain_counts(num_heads),
            "flatten": flatten,
        }
        check(defaults)
        if adam_lr is not None:
            check({**defaults, "lr": adam_lr})
        groups = route(params, defaults)
        check_tensors(groups)
        algorithms = {group["algorithm"] for group in groups}
        check_read(defaults, algorithms, usual)
        if adam_lr is not None and "adam" not in algorithms:
            raise ValueError("Muon: adam_lr is set, but no parameter uses adam: leave it out")
        _check_process_group(process_group)
        self._frozen = frozen_names(params)
        self._module = weakref.ref(params) if isinstance(params, torch.nn.Module) else None
        self._shared = SharedSteps(process_group)
        self._adam_lr = adam_lr
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group in the constructor's format; without an "algorithm" it may become several.

        Raises like the constructor, and then adds nothing.
        """
        before = sum(len(group["params"]) for group in self.param_groups)
        groups = route([param_group], self.defaults, before=before)
        check_tensors(groups)
        for group in groups:
            if "compute_dtype" in group:
                group["compute_dtype"] = dtype_name(group["compute_dtype"])
            if group["algorithm"] == "adam" and self._adam_lr is not None:
                group.setdefault("lr", self._adam_lr)
            names, params = zip(*group["params"], strict=True)
            check({**self.defaults, **group, "params": params, "param_names": names})
        for group in groups:
            super().add_param_group(dict(group))
            added = {name for name, _ in group["params"]}
            self._frozen = [name for name in self._frozen if name not in added]

    def __getstate__(self) -> dict[str, Any]:
        if self._shared.process_group is not None:
            raise RuntimeError("Muon: an optimizer with a process group cannot be copied or pickled")
        return {
            **super().__getstate__(),
            "_frozen": self._frozen,
            "_module": None,
            "_shared": SharedSteps(),
            "_adam_lr": self._adam_lr,
        }

    def routing(self) -> dict[str, list[str]]:
        """Names of the parameters stepped by "muon" and by "adam", and of the module's "frozen" ones."""
        names: dict[str, list[str]] = {"muon": [], "adam": [], "frozen": list(self._frozen)}
        for group in self.param_groups:
            names[group["algorithm"]] += group["param_names"]
        return names

    @torch._disable_dynamo  # like torch.optim's own methods: Dynamo cannot follow the step counts
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; returns the result of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # check all before any steps: a schedule may have changed something
            check(group)
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError(f"Muon: the gradient of {name} is sparse; make it dense")
        self._warn_of_others()
        for index, group in enumerate(self.param_groups):
            if self._shared.takes(group):
                self._shared.step(index, group, self.state)
            else:
                for cohort in cohorts(group, self.state):
                    cohort.step()
        return loss

    def _warn_of_others(self) -> None:
        """Warn once if the module now trains parameters that this optimizer does not step."""
        module = None if self._module is None else self._module()
        if module is None:
            return
        for name, p in others(module, (p for group in self.param_groups for p in group["params"])):
            if p.grad is not None:
                self._module = None
                warnings.warn(
                    f"Muon: {name} has a gradient but is not trained: it was frozen, absent or another "
                    "tensor when the optimizer was created; add it with add_param_group",
                    stacklevel=5,
                )
                return

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers and tensors; step counts on a device are read."""
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
        """Continue from `state_dict()`. Raises ValueError if the parameters' names or shapes differ.

        The same for a part of a state, which one of several ranks has. Wrapper prefixes in names are ignored.
        Settings become those of the saved state; the splits of parameters must match.
        """
        if missing := {"param_groups", "state"} - set(state_dict):
            raise ValueError(f"Muon: the saved state has no {min(missing)}: give what state_dict() returned")
        saved_groups = [dict(group) for group in state_dict["param_groups"]]
        mine = [(group["algorithm"], plain_names(group["param_names"])) for group in self.param_groups]
        saved = [(g.get("algorithm"), plain_names(g.get("param_names", ()))) for g in saved_groups]
        if any("algorithm" not in group for group in saved_groups):
            raise ValueError(
                "Muon: the saved state is another optimizer's, such as torch.optim.Muon's: start without it"
            )
        if mine != saved:
            raise ValueError("Muon: the saved state belongs to other parameters or algorithms")
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            _require_same_layout(group, saved_group)
            saved_group.update({key: group[key] for key in ("param_names", *LAYOUT)})
        own = [p for g in self.param_groups for p in g["params"]]
        states = {
            p: state_dict["state"][i]
            for p, i in zip(own, (i for g in saved_groups for i in g["params"]), strict=True)
            if i in state_dict["state"]
        }
        for p, state in states.items():
            if any(isinstance(x, Tensor) and x.shape != p.shape for x in state.values()):
                raise ValueError("Muon: the saved state belongs to parameters of other shapes")
        self._require_whole(states)
        if any(self._shared.takes(group) for group in self.param_groups):
            self._load_on_ranks(saved_groups, states)
            return
        super().load_state_dict({**state_dict, "param_groups": saved_groups})
        # torch casts the state to the parameter's dtype, but a 16-bit parameter's state is float32.
        for p, state in states.items():
            for key, value in state.items():
                if key == "step":
                    self.state[p][key] = int(value)
                elif isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)
            fit(p, self.state[p])

    def _require_whole(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Raise ValueError if a saved state lacks what its parameter needs here, as that of one rank does."""
        on_ranks = any(self._shared.takes(group) for group in self.param_groups)
        own = self.named_state() if on_ranks else None
        for group in self.param_groups:
            needed = {"momentum", "square"} if group["algorithm"] == "adam" else {"momentum"}
            for name, p in zip(group["param_names"], group["params"], strict=True):
                for key in needed - states[p].keys() if states.get(p) else ():
                    if own is None or f"{name}/{key}" in own:
                        raise ValueError(
                            f"Muon: the saved state has no {key} of {name}, which another rank kept: save "
                            "the named_state() of all ranks with torch.distributed.checkpoint"
                        )

    def named_state(self) -> dict[str, Tensor]:
        """The live state as "<parameter>/<what>", to be saved or overwritten in place; created if absent.

        Over several ranks: this rank's parameters in full, and its rows of sharded tensors as DTensors. The
        step count is not among these tensors: `set_steps` restores it. Raises ValueError if names repeat.
        """
        named: dict[str, Tensor] = {}
        for index, group in enumerate(self.param_groups):
            if self._shared.takes(group):
                self._shared.make_state(index, group, self.state)
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if not self.state[p]:
                    self.state[p].update(new_state(group, p))
                mine = {f"{name}/{key}": value for key, value in self.state[p].items() if key != "step"}
                if taken := named.keys() & mine.keys():
                    raise ValueError(
                        f"Muon: two parameters are called {name}, and only one could have {min(taken)}: give "
                        "the module, or (name, parameter) pairs with names that differ"
                    )
                named |= mine
        return named

    def set_steps(self, steps: int) -> None:
        """Continue as if every parameter had been stepped this many times."""
        self.named_state()
        for state in self.state.values():
            state["step"] = steps

    def _load_on_ranks(self, groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]]) -> None:
        """Load this rank's part of a single-process state."""
        counts = {int(state["step"]) for state in states.values()}
        if len(counts) > 1:
            raise ValueError("Muon: ranks step all parameters together, but the saved step counts differ")
        own = self.named_state()
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
            for name, p in zip(group["param_names"], group["params"], strict=True):
                for key, value in states.get(p, {}).items():
                    if f"{name}/{key}" in own:
                        fill(own[f"{name}/{key}"], value)
        self.set_steps(counts.pop() if counts else 0)


def _check_process_group(process_group: Any) -> None:
    if process_group is not None:
        from torch.distributed import ProcessGroup

        if not isinstance(process_group, ProcessGroup):
            raise TypeError(
                "Muon: process_group must be a process group, such as torch.distributed.group.WORLD after "
                f"init_process_group, got {process_group!r}"
            )


def _require_same_layout(group: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise ValueError if a saved group splits its parameters differently."""
    for key in LAYOUT:
        mine, other = (list(x) if isinstance(x, tuple) else x for x in (group[key], saved.get(key)))
        if mine != other:
            raise ValueError(
                f"Muon: {group['param_names'][0]} has {key} {mine}, but was saved with {other}: create the "
                f"optimizer with {other}, and change {key} in param_groups after loading"
            )
