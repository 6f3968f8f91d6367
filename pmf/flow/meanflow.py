"""MeanFlow and improved MeanFlow for any network and data of any shape."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pmf.arguments import are_numbers, check_fields, require_number
from pmf.defaults import normal, uniform
from pmf.tangents import Jvp

from .draws import Draws
from .guidance import ClassifierFreeGuidance, Guidance, IntervalGuidance, NoGuidance
from .objective import Terms
from .path import conditional_velocity, interpolate, per_sample
from .prediction import PREDICTIONS
from .times import PlaneTimes, TimeSampling

__all__ = ["MeanFlow", "sample"]

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class MeanFlow:
    """The MeanFlow loss of a batch, for any network.

        objective = pmf.flow.MeanFlow()
        draws = objective.draw(x, generator)
        terms = objective(network, x, draws, label=label)
        terms.loss.backward()

    With z = (1 - t) x + t e, and v_t = e - x:

        V = u(z, t, r) + (t - r) stopgrad(du/dt)      du/dt along (z, t, r) in the direction (v, 1, 0)
        loss = mean of adp(sum (V - v_g)^2),          adp(l) = l / stopgrad((l + norm_eps)^norm_p)

    prediction: what the network returns: "u", the average velocity, or "x", the data, for which
        u = (z - x) / clip(t, 0.05, 1) (arXiv 2601.22158).
    direction: v is the target v_g itself ("conditional", arXiv 2505.13447) or the network's own u(z, t, t)
        ("network", arXiv 2512.02012).
    guidance: `NoGuidance`: v_g = v_t. `ClassifierFreeGuidance`: MeanFlow's,
        v_g = omega v_t + kappa u(z, t, t | c) + (1 - omega - kappa) u(z, t, t | null). `IntervalGuidance`:
        improved MeanFlow's, v_g = v_t + (1 - 1/omega) (u(z, t, t | c) - u(z, t, t | null)) with an omega per
        sample, which the network takes as the conditions omega, t_min and t_max.
    null: the null value of each condition that guidance drops: null={"label": 10}. A fraction class_dropout
        of the samples loses these conditions and trains on v_t.
    times: pairs (t, r); MeanFlow's ImageNet settings are PlaneTimes(-0.4, 1.0, data_proportion=0.75).
    noise_scale: the standard deviation of e. norm_p, norm_eps: of adp; norm_p = 0 is the plain sum.

    The network is called as network(z, t, r, **conditions), with t and r [B] in x's dtype, and returns a
    tensor like z. It is a module, a `pmf.Jvp` of one, or any function of PyTorch operations; DDP, FSDP and
    torch.compile wrap the `pmf.Jvp`. It is called once with tangents and, if direction or guidance need it,
    before that without gradients; the number of calls does not depend on the draws. Where r = t, du/dt does
    not matter and is zero in the Terms.

    Two savings reorder samples: those with r = t come last and get no tangent, and the calls without
    gradients are joined into one. Both are made only where nothing else can depend on the order: the network
    is a module that stores nothing per sample, `null` names every condition except numbers and text, and
    torch.compile wraps at most the network, not this call.

    Raises ValueError or TypeError, in one sentence, for settings, draws, conditions or outputs that do not
    fit.
    """

    prediction: Literal["u", "x"] = "u"
    direction: Literal["conditional", "network"] = "conditional"
    times: TimeSampling = field(default_factory=PlaneTimes)
    norm_p: float = 1.0
    norm_eps: float = 0.01
    noise_scale: float = 1.0
    guidance: Guidance = field(default_factory=NoGuidance)
    null: Mapping[str, Any] | None = None
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_fields("MeanFlow", self)
        require_number("MeanFlow: noise_scale", self.noise_scale, above=0)
        require_number("MeanFlow: norm_p", self.norm_p, at_least=0)
        require_number("MeanFlow: norm_eps", self.norm_eps, above=0)
        require_number("MeanFlow: class_dropout", self.class_dropout, at_least=0, at_most=1)
        if not self.null and not isinstance(self.guidance, NoGuidance):
            raise ValueError('MeanFlow: guidance needs null values for its conditions: null={"label": 10}')
        if not self.null and self.class_dropout != MeanFlow.class_dropout:
            raise ValueError('MeanFlow: class_dropout drops the conditions of null: give null={"label": 10}')

    @torch.inference_mode(False)  # autograd rejects inference-mode tensors
    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Draws:
        """Draw for data x [B, ...] from a CPU generator, identical on every device; only noise is moved.

        Flow-matching samples come first; the first Binomial(B, class_dropout) samples lose their conditions.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"MeanFlow: x must be a Tensor, got {type(x).__name__}")
        _check_data(x)
        batch = len(x)
        t, r = self.times.draw(batch, generator)
        omega, t_min, t_max = self.guidance.draw(r == t, generator)
        dropped = int((uniform(batch, generator=generator) < self.class_dropout).sum())
        noise = self.noise_scale * normal(*x.shape, generator=generator)
        drop = torch.arange(batch, device="cpu") < dropped
        return Draws(t, r, noise.to(x.device, x.dtype, non_blocking=True), omega, t_min, t_max, drop)

    def __call__(self, network: Network, x: Tensor, draws: Draws, **conditions: Any) -> Terms:
        """Loss terms for data x [B, ...], float32 or float64; in the Terms, loss_v and v are zero."""
        _check(x, draws, self.guidance)
        _check_callable(network)
        self._check_names(conditions)
        known = isinstance(network, nn.Module) and self._knows(conditions)
        flow_matching = draws.r == draws.t
        effective = self.guidance.effective_omega(
            draws.t, draws.omega, draws.t_min, draws.t_max, flow_matching
        )
        t, r, omega, effective = (
            value.to(x.device, x.dtype, non_blocking=True)
            for value in (draws.t, draws.r, draws.omega, effective)
        )
        drop = draws.drop.to(x.device, non_blocking=True)
        z = interpolate(x, draws.noise, t)
        v_t = conditional_velocity(z, x, t) if self.prediction == "x" else draws.noise - x
        own, told, null = conditions, {}, {}
        if self.null:
            null = _nulls(self.null, conditions, x)
            own = conditions | {
                name: torch.where(per_sample(drop, value), value, conditions[name])
                for name, value in null.items()
            }
        if self._tells_omega:
            told = dict(zip(("omega", "t_min", "t_max"), (omega, draws.t_min, draws.t_max), strict=True))
            told = {name: value.to(x.device, x.dtype) for name, value in told.items()}

        v_c, v_u = self._passes_before(network, z, t, conditions, null, effective, known)
        v_g = v_t
        if v_u is not None:
            v_g = self._guided(v_t, v_c, v_u, effective, draws)
            v_g = torch.where(per_sample(drop, z), v_t, v_g)
        v = v_g if v_c is None or self.direction == "conditional" else v_c

        u, du_dt = self._with_tangent(network, z, t, r, v, flow_matching, own, told, known)
        target = v_g - per_sample(t - r, z) * du_dt
        error = (u - target).square().flatten(1).sum(1)
        loss = (error / (error.detach() + self.norm_eps) ** self.norm_p).mean()
        zero = error.detach().new_zeros(())
        parts = {"v_target": v_g, "v_tangent": v, "u": u.detach(), "du_dt": du_dt, "v": z[:0]}
        loss_u = error.detach().mean() / x[0].numel()
        return Terms(loss, loss_u, zero, zero, torch.arange(len(x)), parts)

    def _check_names(self, conditions: Mapping[str, Any]) -> None:
        taken = {"primals", "tangents", "detach_tangent"} & conditions.keys()
        if taken:
            raise ValueError(
                f"MeanFlow: a condition cannot be called {min(taken)}, like an argument of pmf.Jvp: rename it"
            )
        if self._tells_omega and (taken := {"omega", "t_min", "t_max"} & conditions.keys()):
            raise ValueError(
                f"MeanFlow: {type(self.guidance).__name__} supplies {min(taken)}: do not pass it"
            )

    def _knows(self, conditions: Mapping[str, Any]) -> bool:
        """Whether `null` names all conditions that may belong to samples."""
        fixed = (bool, int, float, str, type(None))
        return all(name in (self.null or {}) or isinstance(x, fixed) for name, x in conditions.items())

    @property
    def _tells_omega(self) -> bool:
        """Whether the network takes its guidance as a condition."""
        return not isinstance(self.guidance, (NoGuidance, ClassifierFreeGuidance))

    @torch.no_grad()
    def _passes_before(
        self,
        network: Network,
        z: Tensor,
        t: Tensor,
        conditions: dict[str, Any],
        null: dict[str, Tensor],
        effective: Tensor,
        known: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """u(z, t, t) with and without conditions, as far as the settings need them; one pass if known."""
        guided = not isinstance(self.guidance, NoGuidance)
        kappa = self.guidance.kappa if isinstance(self.guidance, ClassifierFreeGuidance) else 0.0
        with_c = self.direction == "network" or kappa != 0 or self._tells_omega
        passes = [conditions] * with_c + [conditions | null] * guided
        if self._tells_omega:
            one = torch.ones_like(t)
            omegas = [effective] * with_c + [one] * guided
            passes = [
                given | {"omega": omega, "t_min": 0 * one, "t_max": one}
                for given, omega in zip(passes, omegas, strict=True)
            ]
        if known and len(passes) == 2:
            both = {name: _joined(value, passes[1][name]) for name, value in passes[0].items()}
            parts = self._velocity(network, torch.cat((z, z)), torch.cat((t, t)), both).split(len(z))
        else:
            parts = tuple(self._velocity(network, z, t, given) for given in passes)
        return parts[0] if with_c else None, parts[-1] if guided else None

    def _velocity(self, network: Network, z: Tensor, t: Tensor, conditions: dict[str, Any]) -> Tensor:
        out = _like(_call(network, z, t, t, conditions), z)
        return PREDICTIONS[self.prediction].velocity(z, out, t)

    def _guided(
        self, v_t: Tensor, v_c: Tensor | None, v_u: Tensor, effective: Tensor, draws: Draws
    ) -> Tensor:
        """v_g, where effective is omega inside its interval and 1 outside."""
        omega = per_sample(effective, v_t)
        if not isinstance(self.guidance, ClassifierFreeGuidance):
            assert v_c is not None
            return v_t + (1 - 1 / omega) * (v_c - v_u)
        kappa = self.guidance.effective_kappa(draws.t, draws.t_min, draws.t_max)
        kappa = per_sample(kappa.to(v_t.device, v_t.dtype), v_t)
        v_g = omega * v_t + (1 - omega - kappa) * v_u
        return v_g if v_c is None else v_g + kappa * v_c

    def _with_tangent(
        self,
        network: Network,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        v: Tensor,
        flow_matching: Tensor,
        own: dict[str, Any],
        told: dict[str, Tensor],
        known: bool,
    ) -> tuple[Tensor, Tensor]:
        """u, and du/dt as a constant: zero where r = t, since its factor t - r is.

        Samples with a tangent come first, and the others have none, if all that belongs to samples is known.
        """
        jvp = network if _is_jvp(network) else Jvp(_as_module(network))
        count, order = len(z), None
        apart = known and not (torch.compiler.is_compiling() or _stores_samples(network, len(z)))
        if apart and flow_matching.any():
            order = torch.argsort(flow_matching.to(torch.uint8), stable=True).to(z.device)
            count -= int(flow_matching.sum())
            z, t, r, v = (x[order] for x in (z, t, r, v))
            own = {name: x[order] if isinstance(x, Tensor) else x for name, x in own.items()}
            told = {name: x[order] for name, x in told.items()}
        first = slice(count)
        one, prediction = torch.ones_like(t[first]), PREDICTIONS[self.prediction]
        out, out_t = jvp((z, t, r), (v[first], one, None), **own, **told)
        out = _like(out, z)
        with torch.no_grad():
            at, value = (x[first] for x in (z, out))
            moved = prediction.velocity_tangent(at, value, t[first], v[first], _like(out_t, at), one)
            du_dt = torch.zeros_like(out)
            du_dt[first] = torch.where(per_sample(t == r, z)[first], 0.0, moved)
        u = prediction.velocity(z, out, t)
        if order is None:
            return u, du_dt
        back = order.argsort()
        return u[back], du_dt[back]


@torch.no_grad()
def sample(
    network: Network,
    noise: Tensor,
    times: Sequence[float] = (1.0, 0.0),
    *,
    prediction: Literal["u", "x"] = "u",
    **conditions: Any,
) -> Tensor:
    """Samples shaped like noise, in one step per interval of `times`.

        z <- z - (t - r) u(z, t, r),  t and r adjacent in times, starting from z = noise

    network and prediction: as for `MeanFlow`; a module stays in its mode, so call its eval() first if it has
    dropout. noise [B, ...]: e itself, already multiplied by noise_scale. times: descending in [0, 1]. Raises
    ValueError or TypeError if one of these does not fit.
    """
    _check_choice("prediction", prediction, PREDICTIONS)
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.dim() < 1:
        raise TypeError("flow.sample: noise must be a floating tensor [B, ...] (pmf.sample takes labels)")
    if not are_numbers(times):
        raise ValueError(f"flow.sample: times must be a list of numbers in [0, 1], got {times!r}")
    times = [float(t) for t in times]
    if len(times) < 2 or not 1 >= times[0] or not times[-1] >= 0:
        raise ValueError(f"flow.sample: times must be at least two numbers in [0, 1], got {times}")
    if any(not t > r for t, r in zip(times, times[1:], strict=False)):
        raise ValueError(f"flow.sample: times must descend, got {times}")
    z = noise
    for start, end in zip(times, times[1:], strict=False):
        t, r = noise.new_full((len(noise),), start), noise.new_full((len(noise),), end)
        out = _like(_call(network, z, t, r, conditions), z)
        z = z - (start - end) * PREDICTIONS[prediction].velocity(z, out, t)
    return z


def _call(network: Network, z: Tensor, t: Tensor, r: Tensor, conditions: dict[str, Any]) -> Any:
    """The network's value, without a tangent."""
    _check_callable(network)
    if _is_jvp(network):
        return network((z, t, r), (None, None, None), **conditions)[0]
    return network(z, t, r, **conditions)


def _check_callable(network: Any) -> None:
    if not callable(network):
        raise TypeError(f"MeanFlow: the network must be a module or function, got {network!r}")


def _is_jvp(network: Any) -> bool:
    """Whether it is a Jvp, possibly inside wrappers: DDP, torch.compile, weight averages."""
    while isinstance(network, nn.Module) and not isinstance(network, Jvp):
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if not isinstance(inner, nn.Module):
            return False
        network = inner
    return isinstance(network, Jvp)


def _stores_samples(network: Any, batch: int) -> bool:
    """Whether a module has something with `batch` entries among its attributes and buffers."""
    stored: list[Any] = []
    for module in network.modules():
        stored += [value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
        stored += module._buffers.values()
    for value in stored:
        plain = isinstance(value, (list, tuple, dict, Tensor)) or hasattr(value, "shape")
        held = [value] if plain else list(getattr(value, "__dict__", {}).values())
        for part in (*held, *tree_leaves(held)):
            size = getattr(part, "shape", (len(part),) if isinstance(part, (list, tuple)) else ())
            if tuple(size[:1]) == (batch,):
                return True
    return False


_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _joined(value: Any, other: Any) -> Any:
    return torch.cat((value, other)) if isinstance(value, Tensor) else value


class _Function(nn.Module):
    """Wraps a function of tensors as a module; any weights inside it are not registered."""

    def __init__(self, function: Network) -> None:
        super().__init__()
        self.function = function

    def forward(self, *primals: Tensor, **conditions: Any) -> Tensor:
        return self.function(*primals, **conditions)


def _as_module(network: Network) -> nn.Module:
    return network if isinstance(network, nn.Module) else _Function(network)


def _like(out: Any, z: Tensor) -> Tensor:
    if not isinstance(out, Tensor) or out.shape != z.shape:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"MeanFlow: the network must return a tensor like z, {list(z.shape)}, got {got}")
    return out.to(z.dtype)


def _is_per_sample(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch


def _nulls(null: Mapping[str, Any], conditions: Mapping[str, Any], x: Tensor) -> dict[str, Tensor]:
    """For each named condition, a tensor like it filled with its null value."""
    found = {}
    for name, nothing in null.items():
        given = conditions.get(name)
        if not _is_per_sample(given, len(x)):
            raise ValueError(f"MeanFlow: null names {name}, which must be a condition [B, ...] of the call")
        assert isinstance(given, Tensor)
        whole = not given.is_floating_point() and not given.is_complex()
        if nothing is None or (whole and torch.as_tensor(nothing).is_floating_point()):
            raise ValueError(
                f"MeanFlow: the null value of {name} must fit its dtype, {given.dtype}, got {nothing!r}"
            )
        found[name] = torch.as_tensor(nothing, dtype=given.dtype, device=given.device).expand(given.shape)
    return found


def _check_choice(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"MeanFlow: {name} must be one of {', '.join(known)}, got {value!r}")


def _check_data(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x.dim() < 2 or len(x) == 0:
        raise ValueError(
            f"MeanFlow: x must be float32 or float64 [B, ...] with B >= 1, got {x.dtype} {list(x.shape)}"
        )


def _check(x: Tensor, draws: Draws, guidance: Guidance) -> None:
    _check_data(x)
    if draws.noise.shape != x.shape or draws.noise.dtype != x.dtype:
        raise ValueError(
            f"MeanFlow: noise must be like x, {x.dtype} {list(x.shape)}, "
            f"got {draws.noise.dtype} {list(draws.noise.shape)}"
        )
    for name in ("t", "r", "omega", "t_min", "t_max", "drop"):
        if (shape := getattr(draws, name).shape) != x.shape[:1]:
            raise ValueError(f"MeanFlow: {name} must have shape [{len(x)}], got {list(shape)}")
    if draws.drop.dtype != torch.bool:
        raise TypeError(f"MeanFlow: drop must be bool, got {draws.drop.dtype}")
    t, r = draws.t, draws.r
    if t.device.type == "cpu" and not ((0 <= r) & (r <= t) & (t <= 1)).all():
        raise ValueError("MeanFlow: draws must have 0 <= r <= t <= 1")
    # What omega means to another guidance is for that to say.
    least = {IntervalGuidance: 1.0, ClassifierFreeGuidance: 0.0}.get(type(guidance), -math.inf)
    if draws.omega.device.type == "cpu" and not (draws.omega >= least).all():
        raise ValueError(f"MeanFlow: draws must have omega >= {least:g}, and never NaN")
