"""Sample images by class and seed."""

from collections.abc import Sequence

import torch

from pmf.defaults import normal
from pmf.devices import is_out_of_memory
from pmf.errors import UserError
from pmf.flow.sampler import Sampler


def draw_by_seed(
    sampler: Sampler,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    steps: int = 1,
    times: Sequence[float] | None = None,
    omega: float | None = None,
    interval: tuple[float, float] | None = None,
) -> torch.Tensor:
    """Images [B, C, H, W] around [-1, 1] on the sampler's device, each from its own seed.

    Each image's noise comes from its own generator on the CPU, so it depends on neither the batch nor the
    device. Raises UserError if guidance or labels are out of range or memory runs out.
    """
    config = sampler.network.config
    shape, generator = config.image_shape, torch.Generator("cpu")
    try:
        noise = torch.stack([normal(*shape, generator=generator.manual_seed(seed)) for seed in seeds])
        return sampler(labels, steps, omega, interval, config.noise_scale * noise, times=times)
    except (ValueError, RuntimeError) as error:
        sentence = str(error).splitlines()[0]
        if is_out_of_memory(error):
            sentence = f"{len(seeds)} images at a time do not fit in memory: give a smaller --batch-size"
        raise UserError(sentence) from error
