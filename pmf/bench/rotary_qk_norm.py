"""rotary_qk_norm on the query and key views of pMF-B: 276 tokens, of which the last 256 rotate."""

from collections.abc import Iterator
from typing import Any

import torch

from pmf import ops, reference
from pmf.bench.harness import Case
from pmf.bench.pairs import DTYPES, copy_case, pair_cases

BATCH, TOKENS, ROTATED, HEADS, WIDTH = 8, 276, 256, 12, 64


def cases() -> Iterator[Case]:
    angles = torch.rand(ROTATED, WIDTH // 2) * 6
    for dtype in DTYPES:
        yield copy_case(dtype)
        query, key = (torch.randn(BATCH, TOKENS, HEADS, WIDTH).to(dtype).transpose(1, 2) for _ in range(2))
        query_weight, key_weight = torch.randn(2, WIDTH).to(dtype)

        def plain(*arguments: Any) -> Any:
            # As a plain model does it, the tables are in the dtype of what they rotate.
            query, key, query_weight, key_weight, cos, sin = arguments
            tables = cos.to(query.dtype), sin.to(query.dtype)
            return reference.rotary_qk_norm(query, key, query_weight, key_weight, *tables)

        yield from pair_cases(
            "rotary_qk_norm",
            ops.rotary_qk_norm,
            ops.rotary_qk_norm_jvp,
            plain,
            (query, key, query_weight, key_weight),
            (angles.cos(), angles.sin()),
            2,
            dtype,
        )
