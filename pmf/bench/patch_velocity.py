"""patch_velocity at pMF-B/16: 256 tokens of 16 x 16 x 3 pixels to a 256 x 256 velocity, and its gradient."""

from collections.abc import Iterator

import torch

from pmf import ops, reference
from pmf.bench.harness import Planned, Setting
from pmf.bench.pairs import BATCH, Pair, pair_cases

CHANNELS, PATCH = 3, 16
SIZE = {"tiny": 32, "cpu": 256, "quick": 256, "full": 256}


def cases(setting: Setting) -> Iterator[Planned]:
    batch, size = BATCH[setting.scale], SIZE[setting.scale]
    tokens = (size // PATCH) ** 2
    shape = (batch, CHANNELS, size, size)

    def draw(dtype: torch.dtype) -> Pair:
        shown, images = setting.normal((batch, tokens, PATCH * PATCH * CHANNELS), shape, dtype=dtype)
        t = torch.linspace(0.1, 0.9, batch, device=images.device)
        return Pair(
            ops.patch_velocity,
            lambda x, z, t, x_t, z_t: ops.patch_velocity_jvp(x, z, t, x_t, z_t, None),
            reference.patch_velocity,
            (shown, images),
            (t,),
            2,
            differentiated=1,  # as in training: noisy images are data
            linear=2,
        )

    yield from pair_cases("patch_velocity", setting, draw, shape)
