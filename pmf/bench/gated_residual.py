"""gated_residual at pMF-B's width."""

from collections.abc import Iterator

import torch

from pmf import ops, reference
from pmf.bench.harness import Case
from pmf.bench.pairs import DTYPES, copy_case, pair_cases

BATCH, TOKENS, WIDTH = 8, 276, 768


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield copy_case(dtype)
        x, branch = torch.randn(2, BATCH, TOKENS, WIDTH).to(dtype)
        gate = torch.randn(WIDTH).to(dtype)
        yield from pair_cases(
            "gated_residual",
            ops.gated_residual,
            ops.gated_residual_jvp,
            reference.gated_residual,
            (x, branch, gate),
            (),
            2,
            dtype,
        )
