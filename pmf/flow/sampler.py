"""Images from noise in one step, or in a few."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import PixelMeanFlow
from ..nn import Condition
from .path import over_pixels
from .preconditioner import NoPreconditioner, Preconditioner
from .prediction import Prediction, XPrediction

__all__ = ["sample"]


@torch.no_grad()
def sample(
    model: PixelMeanFlow,
    labels: Tensor | Sequence[int],
    steps: int = 1,
    omega: float | Tensor | None = None,
    interval: tuple[float, float] | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    prediction: Prediction | None = None,
    preconditioner: Preconditioner | None = None,
) -> Tensor:
    """Images [B, C, S, S] of classes labels [B], around [-1, 1], not clipped; float32 (float64 models: so).

        z <- z - (t - r) u(z, t, r, omega, interval, label), t from 1 to 0 in `steps` equal parts

    labels may hold num_classes, the null label. omega (one number or [B]) and interval default to the model's
    own. noise [B, C, S, S] is e itself, already times noise_scale; without it, it is drawn from generator (on
    the generator's device, the CPU if there is none). prediction and preconditioner must be those the model
    was trained with.
    """
    config = model.config
    device = model.position.device
    dtype = torch.float64 if model.position.dtype == torch.float64 else torch.float32
    labels = torch.as_tensor(labels, device=device)
    if labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(
            f"sample: labels must be a list of integers [B], got {labels.dtype} {list(labels.shape)}"
        )
    labels = labels.long()
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) <= config.num_classes):
        raise ValueError(
            f"sample: labels must lie in 0..{config.num_classes} ({config.num_classes} is the null label)"
        )
    if steps < 1:
        raise ValueError(f"sample: steps must be at least 1, got {steps}")
    batch = len(labels)
    shape = (batch, config.channels, config.image_size, config.image_size)
    if noise is None:
        source = generator.device if generator is not None else torch.device("cpu")
        noise = config.noise_scale * torch.randn(shape, generator=generator, device=source)
    elif tuple(noise.shape) != shape:
        raise ValueError(f"sample: noise must be {list(shape)}, got {list(noise.shape)}")
    prediction = prediction or XPrediction()
    preconditioner = preconditioner or NoPreconditioner()
    t_min, t_max = config.sample_interval if interval is None else interval
    omega = config.sample_omega if omega is None else omega
    if not 0 <= t_min <= t_max <= 1:
        raise ValueError(f"sample: interval must be 0 <= t_min <= t_max <= 1, got {t_min} and {t_max}")
    if isinstance(omega, (int, float)) and not omega >= 1:
        raise ValueError(f"sample: omega must be at least 1 (1 is no guidance), got {omega}")

    z = noise.to(device, dtype)
    omegas, starts, ends = (
        torch.as_tensor(value, device=device, dtype=dtype).expand(batch) for value in (omega, t_min, t_max)
    )
    for i in range(steps, 0, -1):
        t = z.new_full((batch,), i / steps)
        h = z.new_full((batch,), 1 / steps)
        condition = Condition(h, omegas, starts, ends, labels)
        raw = model(preconditioner.input(z, t), condition, heads="u").u.to(dtype)
        z = z - over_pixels(h) * prediction.velocity(z, preconditioner.output(z, raw, t), t)
    return z
