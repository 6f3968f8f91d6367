"""The Pixel MeanFlow objective, line by line: forward mode and three guidance passes for the whole batch.

It spends several times the work of `pmf.flow.Objective` and must give the same numbers.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .network import network

__all__ = ["ObjectiveValues", "objective"]


class ObjectiveValues(NamedTuple):
    """loss (to differentiate), plain means loss_u and loss_v, and images [B, C, S, S]."""

    loss: Tensor
    loss_u: Tensor
    loss_v: Tensor
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
    num_heads: int,
    norm_p: float = 1.0,
    norm_eps: float = 0.01,
) -> ObjectiveValues:
    """Loss terms for images [B, C, S, S], labels [B] and the draws [B]; noise is e, shaped like images."""
    null = torch.full_like(labels, len(params["condition.label_embedder.embedding.weight"]) - 1)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    x, e = images, noise
    z = (1 - _image(t)) * x + _image(t) * e

    def velocity(z: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (z - x) / _image(t.clamp(0.05, 1))

    def v_head(w: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            return velocity(
                z, network(params, z, zero, w, zero, one, label, num_heads=num_heads, head="v"), t
            )

    flow_matching = r == t
    w_inside = torch.where((t_min <= t) & (t <= t_max), omega, one)
    w_inside = torch.where(flow_matching, omega, w_inside)
    v_t = velocity(z, x, t)
    v_u, v_c, v_c_inside = v_head(one, null), v_head(omega, labels), v_head(w_inside, labels)
    v_g = torch.where(
        _image(flow_matching),
        v_t + _image(1 - 1 / omega) * (v_c - v_u),
        v_t + _image(1 - 1 / w_inside) * (v_c_inside - v_u),
    )
    v_g = torch.where(_image(drop), v_t, v_g)
    label = torch.where(drop, null, labels)

    def u_and_v(z: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        condition = t - r, omega, t_min, t_max, label
        x_u, x_v = (network(params, z, *condition, num_heads=num_heads, head=head) for head in "uv")
        return velocity(z, x_u, t), velocity(z, x_v, t)

    result: Any = torch.func.jvp(u_and_v, (z, t, r), (v_c_inside, one, zero), has_aux=True)
    u, du_dt, v = result
    V = u + _image(t - r) * du_dt.detach()

    def adaptive(error: Tensor) -> Tensor:
        return error / (error.detach() + norm_eps) ** norm_p

    error_u = (V - v_g).square().sum((1, 2, 3))
    error_v = (v - v_g).square().sum((1, 2, 3))
    loss = (adaptive(error_u) + adaptive(error_v)).mean()
    pixels = images[0].numel()
    return ObjectiveValues(
        loss, error_u.mean() / pixels, error_v.mean() / pixels, v_g, v_c_inside, u, du_dt, v
    )


def _image(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]
