"""swiglu at pMF-B's MLP width."""

from collections.abc import Iterator

import torch

from pmf import ops, reference
from pmf.bench.harness import Planned, Setting
from pmf.bench.pairs import BATCH, TOKENS, Pair, pair_cases

WIDTH = 2048


def cases(setting: Setting) -> Iterator[Planned]:
    shape = (BATCH[setting.scale], TOKENS[setting.scale], WIDTH)

    def draw(dtype: torch.dtype) -> Pair:
        inputs = setting.normal(shape, shape, dtype=dtype)
        return Pair(ops.swiglu, ops.swiglu_jvp, reference.swiglu, inputs, (), 2)

    yield from pair_cases("swiglu", setting, draw, shape)
