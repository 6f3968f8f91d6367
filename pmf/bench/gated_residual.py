"""gated_residual at pMF-B's width."""

from collections.abc import Iterator

import torch

from pmf import ops, reference
from pmf.bench.harness import Planned, Setting
from pmf.bench.pairs import BATCH, TOKENS, Pair, pair_cases

WIDTH = 768


def cases(setting: Setting) -> Iterator[Planned]:
    shape = (BATCH[setting.scale], TOKENS[setting.scale], WIDTH)

    def draw(dtype: torch.dtype) -> Pair:
        inputs = setting.normal(shape, shape, (WIDTH,), dtype=dtype)
        return Pair(
            ops.gated_residual, ops.gated_residual_jvp, reference.gated_residual, inputs, (), 2, linear=1
        )

    yield from pair_cases("gated_residual", setting, draw, shape)
