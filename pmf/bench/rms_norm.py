"""rms_norm at pMF-B's width."""

from collections.abc import Iterator

import torch

from pmf import ops, reference
from pmf.bench.harness import Case
from pmf.bench.pairs import DTYPES, copy_case, pair_cases

BATCH, TOKENS, WIDTH = 8, 276, 768


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield copy_case(dtype)
        x, weight = torch.randn(BATCH, TOKENS, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
        yield from pair_cases(
            "rms_norm", ops.rms_norm, ops.rms_norm_jvp, reference.rms_norm, (x, weight), (), 1, dtype
        )
