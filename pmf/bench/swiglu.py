"""swiglu at pMF-B's MLP width."""

from collections.abc import Iterator

import torch

from pmf import ops, reference
from pmf.bench.harness import Case
from pmf.bench.pairs import DTYPES, copy_case, pair_cases

BATCH, TOKENS, WIDTH = 8, 276, 2048


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield copy_case(dtype)
        gate, up = torch.randn(2, BATCH, TOKENS, WIDTH).to(dtype)
        yield from pair_cases(
            "swiglu", ops.swiglu, ops.swiglu_jvp, reference.swiglu, (gate, up), (), 2, dtype
        )
