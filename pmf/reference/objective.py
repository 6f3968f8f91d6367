"""The Pixel MeanFlow objective written out: forward mode and three guidance passes for the whole batch.

It takes several times the work of `pmf.flow.Objective` and must give the same result, with every switch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .network import network

__all__ = ["ObjectiveValues", "coefficients", "objective"]

Distances = Callable[[Tensor, Tensor, Tensor | None], Sequence[tuple[float, Tensor]]]


class ObjectiveValues(NamedTuple):
    """loss (to differentiate), plain means of its terms, and images [B, C, H, W]."""

    loss: Tensor
    loss_u: Tensor
    loss_v: Tensor
    loss_perceptual: Tensor
    v_target: Tensor
    v_tangent: Tensor
    u: Tensor
    du_dt: Tensor
    v: Tensor


def objective(
    params: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    t: Tensor,
    r: Tensor,
    noise: Tensor,
    omega: Tensor,
    t_min: Tensor,
    t_max: Tensor,
    drop: Tensor,
    crop: Tensor | None = None,
    num_heads: int,
    norm_p: float = 1.0,
    norm_eps: float = 0.01,
    prediction: str = "x",
    preconditioner: str = "none",
    sigma_data: float = 0.5,
    noise_scale: float = 1.0,
    v_head: bool = True,
    perceptual: Distances | None = None,
    perceptual_max_t: float = 1.0,
) -> ObjectiveValues:
    """Loss terms for images [B, C, H, W], labels [B] and the draws [B]; noise is e, shaped like images.

    prediction, preconditioner and v_head are the ablation switches. perceptual(x_pred, x, crop) returns
    (weight, distances [B]) for each network.
    """
    null = torch.full_like(labels, len(params["condition.label_embedder.embedding.weight"]) - 1)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    x, e = images, noise
    z = (1 - _image(t)) * x + _image(t) * e

    def velocity(z: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (z - x) / _image(t.clamp(0.05, 1))

    def head_velocity(head: str, z: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        c_in, c_skip, c_out = coefficients(preconditioner, t, sigma_data, noise_scale)
        output = network(params, _image(c_in) * z, *condition, num_heads=num_heads, head=head)
        output = _image(c_skip) * z + _image(c_out) * output
        return output if prediction == "u" else velocity(z, output, t)

    def v_at(w: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            return head_velocity("v" if v_head else "u", z, t, zero, w, zero, one, label)

    flow_matching = r == t
    w_inside = torch.where((t_min <= t) & (t <= t_max), omega, one)
    w_inside = torch.where(flow_matching, omega, w_inside)
    v_t = velocity(z, x, t)
    v_u, v_c, v_c_inside = v_at(one, null), v_at(omega, labels), v_at(w_inside, labels)
    v_g = torch.where(
        _image(flow_matching),
        v_t + _image(1 - 1 / omega) * (v_c - v_u),
        v_t + _image(1 - 1 / w_inside) * (v_c_inside - v_u),
    )
    v_g = torch.where(_image(drop), v_t, v_g)
    label = torch.where(drop, null, labels)

    def u_and_v(z: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        condition = t - r, omega, t_min, t_max, label
        u = head_velocity("u", z, t, *condition)
        return u, head_velocity("v", z, t, *condition) if v_head else torch.zeros_like(u)

    result: Any = torch.func.jvp(u_and_v, (z, t, r), (v_c_inside, one, zero), has_aux=True)
    u, du_dt, v = result
    V = u + _image(t - r) * du_dt.detach()

    def adaptive(error: Tensor) -> Tensor:
        return error / (error.detach() + norm_eps) ** norm_p

    error_u = (V - v_g).square().sum((1, 2, 3))
    error_v = (v - v_g).square().sum((1, 2, 3)) if v_head else zero
    loss = (adaptive(error_u) + adaptive(error_v)).mean()

    x_pred, loss_perceptual = z - _image(t) * u, zero.sum()
    for weight, distances in [] if perceptual is None else perceptual(x_pred, x, crop):
        counts = (t < perceptual_max_t).to(t)
        loss = loss + (weight * counts * adaptive(distances)).mean()
        loss_perceptual = loss_perceptual + (weight * counts * distances).mean()
    loss_u, loss_v = (error.mean() / images[0].numel() for error in (error_u, error_v))
    return ObjectiveValues(loss, loss_u, loss_v, loss_perceptual, v_g, v_c_inside, u, du_dt, v)


def coefficients(
    preconditioner: str, t: Tensor, sigma_data: float, noise_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """c_in, c_skip, c_out [B] for "none", "edm" or "scm", as derived in `pmf.flow.preconditioner`."""
    if preconditioner == "edm":
        variance = (sigma_data * (1 - t)) ** 2 + (noise_scale * t) ** 2
        c_skip = sigma_data**2 * (1 - t) / variance
        return 1 / variance.sqrt(), c_skip, sigma_data * noise_scale * t / variance.sqrt()
    if preconditioner == "scm":
        length = ((1 - t) ** 2 + t**2).sqrt()
        cos, sin = (1 - t) / length, t / length
        return 1 / (sigma_data * length), cos / length, -sigma_data * sin
    return torch.ones_like(t), torch.zeros_like(t), torch.ones_like(t)


def _image(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]
