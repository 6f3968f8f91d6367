"""patch_velocity at pMF-B/16: 256 tokens of 16 x 16 x 3 pixels to a 256 x 256 velocity."""

from collections.abc import Iterator

import torch

from pmf import ops, reference
from pmf.bench.harness import Case
from pmf.bench.pairs import DTYPES, copy_case, pair_cases

BATCH, CHANNELS, SIZE, PATCH = 8, 3, 256, 16


def cases() -> Iterator[Case]:
    tokens = (SIZE // PATCH) ** 2
    for dtype in DTYPES:
        yield copy_case(dtype)
        shown = torch.randn(BATCH, tokens, PATCH * PATCH * CHANNELS).to(dtype)
        images = torch.randn(BATCH, CHANNELS, SIZE, SIZE).to(dtype)
        t = torch.linspace(0.1, 0.9, BATCH)
        yield from pair_cases(
            "patch_velocity",
            ops.patch_velocity,
            lambda x, z, t, x_t, z_t: ops.patch_velocity_jvp(x, z, t, x_t, z_t, None),
            reference.patch_velocity,
            (shown, images),
            (t,),
            2,
            dtype,
        )
