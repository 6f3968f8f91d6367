"""MeanFlow on points in a plane in D dimensions: loss, training and measurements."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pmf.defaults import normal
from pmf.flow import PlaneTimes, Prediction
from pmf.flow.path import conditional_velocity, interpolate, over_pixels
from pmf.flow.prediction import PREDICTIONS
from pmf.metrics import sliced_wasserstein
from pmf.optim import Muon
from pmf.toy.network import Mlp
from pmf.toy.shapes import draw_plane, draw_points

__all__ = ["PREDICTIONS", "Outcome", "Settings", "meanflow_loss", "one_step", "train_and_measure"]

_TIMES = PlaneTimes(uniform_fraction=1.0)
_ROWS = 1024  # rows of the distance matrix computed at a time


@dataclass(frozen=True)
class Settings:
    """Settings of a toy experiment; all but dim, prediction and seed are shared by its trainings."""

    shape: str = "spiral"
    steps: int = 5500
    batch_size: int = 512
    width: int = 256
    depth: int = 4
    bottleneck: int = 32
    learning_rate: float = 1e-2  # of Muon
    adam_lr: float = 3e-3
    num_samples: int = 16384


@dataclass(frozen=True)
class Outcome:
    """A trained network's one-step samples in plane coordinates [N, 2], and their scores.

    wasserstein: sliced Wasserstein distance in the plane between the samples and equally many fresh points.
    off_plane: mean length of the samples' component orthogonal to the plane.
    to_data: mean distance in D dimensions from a sample to the nearest of those points.
    """

    seed: int
    dim: int
    prediction: str
    points: Tensor
    wasserstein: float
    off_plane: float
    to_data: float
    seconds: float

    def to_json(self) -> dict[str, float | int | str]:
        """All fields except the samples."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "points"
        }


def meanflow_loss(
    network: Mlp, prediction: Prediction, x: Tensor, noise: Tensor, t: Tensor, r: Tensor
) -> Tensor:
    """Batch mean of |V - v|^2: pixel MeanFlow without guidance, labels or loss weighting (norm_p = 0).

        z = (1 - t) x + t e,  v = e - x
        V = u(z, t, r) + (t - r) stopgrad(du/dt)      du/dt in the direction (u(z, t, t), 1, 0) of (z, t, r)

    x and noise are points [B, D, 1, 1]; times t >= r [B] are ordered with t > r first, as only these need a
    tangent. Source: arXiv 2601.22158; the direction, the network's own velocity, is from improved MeanFlow
    (arXiv 2512.02012).
    """
    z = interpolate(x, noise, t)
    n = int((t > r).sum())
    one = torch.ones_like(t[:n])
    with torch.no_grad():
        z_t = prediction.velocity(z[:n], network(z[:n], t[:n], torch.zeros_like(one)), t[:n])
    output, output_t = network.jvp(z, t, t - r, z_t, one)
    u = prediction.velocity(z, output, t)
    with torch.no_grad():
        du_dt = prediction.velocity_tangent(z[:n], output[:n], t[:n], z_t, output_t, one)
        target = conditional_velocity(z, x, t)
        target[:n] -= over_pixels(t[:n] - r[:n]) * du_dt
    return (u - target).square().sum(dim=(1, 2, 3)).mean()


@torch.no_grad()
def one_step(network: Mlp, prediction: Prediction, noise: Tensor) -> Tensor:
    """One-step samples x = e - u(e, t = 1, r = 0) from noise e [B, D, 1, 1]."""
    one = noise.new_ones(len(noise))
    return noise - prediction.velocity(noise, network(noise, one, one), one)


def train_and_measure(
    settings: Settings, seed: int, dim: int, prediction: str, on_step: Callable[[], object] = lambda: None
) -> Outcome:
    """Train a network with Muon and a cosine decay to 0, and measure its samples.

    Muon trains the hidden layers; Adam the layers in and out, whose other dimensions Muon would amplify.

    A seed determines all randomness. Both predictions at a dimension use the same plane, points, noise, times
    and initial weights.
    """
    start = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(seed)
    basis = draw_plane(dim, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Mlp(dim, settings.width, settings.depth, settings.bottleneck)
    hidden = [layer.get_parameter("weight") for layer in network.hidden]
    others = [parameter for parameter in network.parameters() if all(parameter is not x for x in hidden)]
    optimizer = Muon(
        [{"params": hidden, "algorithm": "muon"}, {"params": others, "algorithm": "adam"}],
        lr=settings.learning_rate,
        adam_lr=settings.adam_lr,
        betas=(0.9, 0.999),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    meaning = PREDICTIONS[prediction]

    def draw(count: int) -> tuple[Tensor, Tensor]:
        points = draw_points(settings.shape, count, generator)
        return points, normal(count, dim, 1, 1, generator=generator)

    for _ in range(settings.steps):
        points, noise = draw(settings.batch_size)
        t, r = (times.flip(0) for times in _TIMES.draw(settings.batch_size, generator))  # r = t last
        x = (points @ basis.T)[:, :, None, None]
        optimizer.zero_grad()
        meanflow_loss(network, meaning, x, noise, t, r).backward()
        optimizer.step()
        schedule.step()
        on_step()

    data, noise = draw(settings.num_samples)
    samples = one_step(network, meaning, noise).flatten(1)
    in_plane = samples @ basis
    off_plane = (samples - in_plane @ basis.T).norm(dim=1)
    nearest = torch.cat([torch.cdist(part, data).amin(1) for part in in_plane.split(_ROWS)])
    return Outcome(
        seed,
        dim,
        prediction,
        in_plane,
        wasserstein=sliced_wasserstein(in_plane, data),
        off_plane=float(off_plane.mean()),
        to_data=float(torch.hypot(off_plane, nearest).mean()),
        seconds=time.perf_counter() - start,
    )
