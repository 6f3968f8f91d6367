"""rms_norm at pMF-B's width."""

from collections.abc import Iterator

import torch

from pmf import ops, reference
from pmf.bench.harness import Planned, Setting
from pmf.bench.pairs import BATCH, TOKENS, Pair, pair_cases

WIDTH = 768


def cases(setting: Setting) -> Iterator[Planned]:
    shape = (BATCH[setting.scale], TOKENS[setting.scale], WIDTH)

    def draw(dtype: torch.dtype) -> Pair:
        inputs = setting.normal(shape, (WIDTH,), dtype=dtype)
        return Pair(ops.rms_norm, ops.rms_norm_jvp, reference.rms_norm, inputs, (), 1)

    yield from pair_cases("rms_norm", setting, draw, shape)
