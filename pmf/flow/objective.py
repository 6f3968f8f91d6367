"""The Pixel MeanFlow objective (arXiv 2601.22158, following the authors' code where the two differ)."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pmf.arguments import check_fields, require_number
from pmf.defaults import normal, uniform
from pmf.models import ModelConfig, PixelMeanFlow, network_in
from pmf.nn import Condition
from pmf.wrappers import exchanges, unwrap, without_ddp

from .draws import Draws
from .guidance import ClassifierFreeGuidance, Guidance, IntervalGuidance
from .path import conditional_velocity, interpolate, over_pixels
from .perceptual import Perceptual
from .plan import Plan, Scalars, make_plan
from .preconditioner import Preconditioner
from .prediction import Prediction
from .read_out import ReadOut
from .times import PlaneTimes, TimeSampling

__all__ = ["Objective", "Terms"]


class Terms:
    """The result of one evaluation.

    loss is the value to differentiate: the batch mean of the weighted terms, about 2 throughout if norm_p is
    1. Watch loss_u and loss_v instead, the plain means of (V - v_g)^2 and (v - v_g)^2, and loss_perceptual,
    the batch mean of the weighted distances; disabled terms are 0. The rest are images [B, C, H, W] without
    gradients, in batch order: v_target = v_g, v_tangent (the direction of z; zero where no tangent was
    needed), u, du_dt (likewise) and v (zero without a v head).
    """

    def __init__(
        self,
        loss: Tensor,
        loss_u: Tensor,
        loss_v: Tensor,
        loss_perceptual: Tensor,
        order: Tensor,
        parts: dict[str, Tensor],
    ) -> None:
        self.loss, self.loss_u, self.loss_v, self.loss_perceptual = loss, loss_u, loss_v, loss_perceptual
        self._order, self._parts = order, parts

    @cached_property
    def v_target(self) -> Tensor:
        return self._in_given_order("v_target")

    @cached_property
    def v_tangent(self) -> Tensor:
        return self._in_given_order("v_tangent")

    @cached_property
    def u(self) -> Tensor:
        return self._in_given_order("u")

    @cached_property
    def du_dt(self) -> Tensor:
        return self._in_given_order("du_dt")

    @cached_property
    def v(self) -> Tensor:
        return self._in_given_order("v")

    def _in_given_order(self, name: str) -> Tensor:
        part = self._parts[name]
        whole = part.new_zeros(len(self._order), *part.shape[1:])
        whole[self._order[: len(part)].to(part.device)] = part
        return whole


@dataclass(frozen=True)
class Objective:
    """The loss of a batch, and the random draws it needs.

        objective = Objective(noise_scale=model.config.noise_scale)
        draws = objective.draw(images, labels, generator)
        terms = objective(model, images, labels, draws)
        terms.loss.backward()

    With z = (1 - t) x + t e, h = t - r, and the guided velocity v_g = v_t + (1 - 1/w') (v_c(w') - v_u):

        V = u + (t - r) stopgrad(du/dt)      du/dt along (z, t, r) in the direction (v_c(w'), 1, 0)
        loss = mean of adp(sum (V - v_g)^2) + adp(sum (v - v_g)^2)
        adp(l) = l / stopgrad((l + norm_eps)^norm_p)

    perceptual adds weight_k adp(d_k(z - t u, x)) for each of its distances where t < its max_t. Without
    v_head, v is the u head at h = 0, also in v_c and v_u, and has no loss term. prediction and
    preconditioner, objects or names as in `ModelConfig`, default to the model's own.

    Only what affects the result is computed (see `pmf.flow.plan`). Images, scalars and losses are float32, or
    float64 for float64 images, whatever the model's dtype.

    row_multiple rounds the number of samples in guidance passes and with tangents up to a multiple of it: the
    same result for slightly more work, with fewer different shapes (for torch.compile and CUDA graphs).
    even_passes always calls the network twice whatever the draws, as ranks that share its weights must.
    """

    noise_scale: float = 1.0
    norm_p: float = 1.0
    norm_eps: float = 0.01
    class_dropout: float = 0.1
    row_multiple: int = 1
    even_passes: bool = False
    v_head: bool = True
    prediction: Prediction | str | None = None
    preconditioner: Preconditioner | str | None = None
    times: TimeSampling = field(default_factory=PlaneTimes)
    guidance: Guidance = field(default_factory=IntervalGuidance)
    perceptual: Perceptual | None = None

    def __post_init__(self) -> None:
        check_fields("objective", self)
        require_number("objective: noise_scale", self.noise_scale, above=0)
        require_number("objective: norm_p", self.norm_p, at_least=0)
        require_number("objective: norm_eps", self.norm_eps, above=0)
        require_number("objective: class_dropout", self.class_dropout, at_least=0, at_most=1)
        require_number("objective: row_multiple", self.row_multiple, at_least=1)
        if isinstance(self.guidance, ClassifierFreeGuidance):  # the target above has no kappa
            raise ValueError(
                "objective: ClassifierFreeGuidance is a guidance of pmf.flow.MeanFlow: give IntervalGuidance "
                "or NoGuidance"
            )
        ReadOut.of(ModelConfig(), self.prediction, self.preconditioner)  # refuses unknown names now

    @torch.inference_mode(False)  # autograd rejects inference-mode tensors
    def draw(self, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Draws:
        """Draw for images [B, C, H, W] from a CPU generator, identical on every device; only noise is moved.

        Flow-matching samples come first; the first Binomial(B, class_dropout) samples lose their label.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"objective: images must be a Tensor, got {type(images).__name__}")
        if not isinstance(labels, Tensor):  # such as the generator, in the second place as in MeanFlow.draw
            raise TypeError(f"objective: labels must be a Tensor, got {type(labels).__name__}")
        if not images.is_floating_point() or images.dim() != 4:  # the noise would be rounded to whole numbers
            raise ValueError(
                f"objective: images must be float32 [B, C, H, W], got {images.dtype} {list(images.shape)}"
            )
        batch = len(images)
        t, r = self.times.draw(batch, generator)
        omega, t_min, t_max = self.guidance.draw(r == t, generator)
        dropped = int((uniform(batch, generator=generator) < self.class_dropout).sum())
        noise = self.noise_scale * normal(*images.shape, generator=generator)
        noise = noise.to(images.device, images.dtype, non_blocking=True)
        crop = None
        if self.perceptual is not None:  # last, so that the other draws do not depend on it
            crop = self.perceptual.draw(batch, (images.shape[-2], images.shape[-1]), generator)
        return Draws(t, r, noise, omega, t_min, t_max, torch.arange(batch, device="cpu") < dropped, crop)

    def __call__(self, model: PixelMeanFlow, images: Tensor, labels: Tensor, draws: Draws) -> Terms:
        """Loss terms for images [B, C, H, W] in [-1, 1] and labels [B] (int64, 0 .. num_classes - 1).

        model may be wrapped in DistributedDataParallel, `fully_shard` and torch.compile, nested in any order.
        Ranks may draw differently: if a pass waits for other ranks, even_passes applies.
        """
        config = network_in(model, "objective").config
        _check(images, labels, draws, config)
        if self.noise_scale != config.noise_scale:  # sampling would start from noise never seen in training
            raise ValueError(
                f"objective: noise_scale is {self.noise_scale} but the model samples with "
                f"{config.noise_scale}: use Objective(noise_scale=model.config.noise_scale)"
            )
        device = images.device
        even = self.even_passes or exchanges(without_ddp(model))
        plan = make_plan(draws, self.guidance, images.dtype, self.row_multiple, even)
        scalars, order, n = plan.scalars.to(device), plan.order.to(device), plan.num_meanflow
        x, labels, t = images[order], labels[order], scalars.t
        z = interpolate(x, draws.noise[order], t)

        v_c, v_u = self._guidance_pass(without_ddp(model), z, labels, scalars, plan)
        z_t, t_t = _direction(v_c[:n], t, plan.num_tangents) if n else (None, None)
        u, du_dt, v = self._training_pass(model, z, labels, scalars, z_t, t_t)
        du_dt = None if du_dt is None else du_dt[:n]
        v_target = _guided_velocity(x, z, u if v is None else v, v_c, v_u, scalars, plan)
        u_target = v_target if du_dt is None else _target_of_u(v_target, du_dt, scalars)

        error_u = _squared(u - u_target)
        loss, error_v = self._adaptive(error_u).mean(), torch.zeros_like(error_u)
        if v is not None:
            error_v = _squared(v - v_target)
            loss = loss + self._adaptive(error_v).mean()
        weighted, loss_perceptual = self._perceptual_terms(x, z, u, draws.crop, plan)

        pixels = x[0].numel()
        parts = {"v_target": v_target, "v_tangent": v_c[:n], "u": u.detach()}
        parts["v"] = v_c[:0] if v is None else v.detach()
        parts["du_dt"] = v_c[:0] if du_dt is None else du_dt
        loss_u, loss_v = error_u.detach().mean() / pixels, error_v.detach().mean() / pixels
        return Terms(loss + weighted, loss_u, loss_v, loss_perceptual, plan.order, parts)

    @torch.no_grad()
    def _guidance_pass(
        self, model: PixelMeanFlow, z: Tensor, labels: Tensor, scalars: Scalars, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """v_c(w') for the rows in plan.conditional and v_u for those in plan.guided, in one pass at h = 0."""
        num_conditional, num_guided = len(plan.conditional), len(plan.guided)
        if num_conditional + num_guided + len(plan.repeated) == 0:
            return z[:0], z[:0]
        rows = torch.cat((plan.conditional, plan.guided, plan.repeated)).to(z.device)
        z, t, omega, labels = z[rows], scalars.t[rows], scalars.effective_omega[rows], labels[rows]
        omega[num_conditional:] = 1.0
        config = unwrap(model).config
        labels[num_conditional:] = config.num_classes
        condition = Condition(torch.zeros_like(t), omega, torch.zeros_like(t), torch.ones_like(t), labels)
        read_out = ReadOut.of(config, self.prediction, self.preconditioner)
        head = "v" if self.v_head else "u"
        out = model(read_out.network_input(z, t), condition, heads=head, as_tokens=True)
        v = read_out.velocity(z, getattr(out, head), t)
        return v[:num_conditional], v[num_conditional : num_conditional + num_guided]

    def _training_pass(
        self,
        model: PixelMeanFlow,
        z: Tensor,
        labels: Tensor,
        scalars: Scalars,
        z_t: Tensor | None,
        t_t: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """u, du/dt (a constant) of the first samples, those with z_t and t_t, and v if there is a v head."""
        config, (t, r, omega, t_min, t_max, *_) = unwrap(model).config, scalars
        given = labels.masked_fill(scalars.drop, config.num_classes)
        condition = Condition(t - r, omega, t_min, t_max, given)
        read_out = ReadOut.of(config, self.prediction, self.preconditioner)
        shown, heads = read_out.network_input(z, t), "uv" if self.v_head else "u"
        if z_t is None or t_t is None:
            out, du_dt = model(shown, condition, heads=heads, as_tokens=True), None
            u = read_out.velocity(z, out.u, t)
        else:
            shown_t = read_out.network_input_tangent(z, t, z_t, t_t)
            # h = t - r changes with t.
            out = model(shown, condition, shown_t, t_t, heads=heads, as_tokens=True)
            u, du_dt = read_out.velocity_jvp(z, out.u, t, z_t, out.u_t, t_t)
        return u, du_dt, read_out.velocity(z, out.v, t) if self.v_head else None

    def _perceptual_terms(
        self, x: Tensor, z: Tensor, u: Tensor, crop: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """Batch means of sum_k weight_k adp(d_k), to differentiate, and of sum_k weight_k d_k."""
        weighted, plain = x.new_zeros(()), x.new_zeros(())
        if self.perceptual is None:
            return weighted, plain
        near = plan.scalars.t < self.perceptual.max_t
        if not near.any():
            return weighted, plain
        rows = near.nonzero().flatten().to(x.device)
        t = plan.scalars.t[near].to(x.device, non_blocking=True)
        x_pred = z[rows] - over_pixels(t) * u[rows]
        crop = None if crop is None else crop[plan.order[near]].to(x.device, non_blocking=True)
        for weight, distances in self.perceptual(x_pred, x[rows], crop):
            weighted = weighted + weight * self._adaptive(distances).sum() / len(x)
            plain = plain + weight * distances.detach().sum() / len(x)
        return weighted, plain

    def _adaptive(self, error: Tensor) -> Tensor:
        """adp(l) = l / stopgrad((l + norm_eps)^norm_p)."""
        return error / (error.detach() + self.norm_eps) ** self.norm_p


@torch.no_grad()
def _guided_velocity(
    x: Tensor, z: Tensor, v: Tensor, v_c: Tensor, v_u: Tensor, scalars: Scalars, plan: Plan
) -> Tensor:
    """v_g = v_t + (1 - 1/w') (v_c(w') - v_u); v_c is the training pass's v except for plan.conditional."""
    v_target = conditional_velocity(z, x, scalars.t)
    v_conditional = v.detach().index_copy(0, plan.conditional.to(z.device), v_c)
    guided = plan.guided.to(z.device)
    pull = over_pixels(scalars.weight[guided]) * (v_conditional[guided] - v_u)
    return v_target.index_add_(0, guided, pull)


def _target_of_u(v_target: Tensor, du_dt: Tensor, scalars: Scalars) -> Tensor:
    """The target of u, v_g - (t - r) du/dt; du/dt exists for the first samples only."""
    n = len(du_dt)
    u_target = v_target.clone()
    u_target[:n] -= over_pixels((scalars.t - scalars.r)[:n]) * du_dt
    return u_target


def _squared(error: Tensor) -> Tensor:
    """The sum of squares per sample, [B]."""
    return error.square().flatten(1).sum(1)


def _direction(v_c: Tensor, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The direction of du/dt in z and t: v_c and 1, and zeros up to `count`, where du/dt is unused."""
    z_t = torch.nn.functional.pad(v_c, (0, 0) * 3 + (0, count - len(v_c)))
    t_t = torch.zeros_like(t[:count])
    t_t[: len(v_c)] = 1
    return z_t, t_t


def _check(images: Tensor, labels: Tensor, draws: Draws, config: ModelConfig) -> None:
    kinds: dict[str, tuple[Any, type]] = {
        "images": (images, Tensor),
        "labels": (labels, Tensor),
        "draws": (draws, Draws),
    }
    for name, (given, kind) in kinds.items():
        if not isinstance(given, kind):
            raise TypeError(f"objective: {name} must be a {kind.__name__}, got {type(given).__name__}")
    shape = config.image_shape
    if images.dtype not in (torch.float32, torch.float64) or tuple(images.shape[1:]) != shape:
        raise ValueError(
            f"objective: images must be float32 [B, {', '.join(map(str, shape))}], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if len(images) == 0:
        raise ValueError("objective: there must be at least one image, got none")
    if draws.noise.shape != images.shape or draws.noise.dtype != images.dtype:
        raise ValueError(
            f"objective: noise must be like the images, {images.dtype} {list(images.shape)}, "
            f"got {draws.noise.dtype} {list(draws.noise.shape)}"
        )
    named = {"labels": labels} | {
        name: getattr(draws, name) for name in ("t", "r", "omega", "t_min", "t_max", "drop")
    }
    for name, value in named.items():
        if value.shape != images.shape[:1]:
            raise ValueError(f"objective: {name} must have shape [{len(images)}], got {list(value.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"objective: labels must be int64, got {labels.dtype}")
    # Reading labels on another device would make the host wait.
    if (
        labels.device.type == "cpu"
        and len(labels)
        and not 0 <= labels.min() <= labels.max() < config.num_classes
    ):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"objective: labels must lie in 0..{config.num_classes - 1}, got {low}..{high}")
