"""rotary_qk_norm on the query and key views of pMF-B: 276 tokens, of which the last 256 rotate."""

from collections.abc import Iterator
from typing import Any

import torch

from pmf import ops, reference
from pmf.bench.harness import Planned, Setting
from pmf.bench.pairs import BATCH, TOKENS, Pair, pair_cases

HEADS, WIDTH, FIXED = 12, 64, 20


def plain(*arguments: Any) -> Any:
    """As in a plain model: the tables have the dtype of the tensors they rotate."""
    query, key, query_weight, key_weight, cos, sin = arguments
    tables = cos.to(query.dtype), sin.to(query.dtype)
    return reference.rotary_qk_norm(query, key, query_weight, key_weight, *tables)


def cases(setting: Setting) -> Iterator[Planned]:
    batch, tokens = BATCH[setting.scale], TOKENS[setting.scale]
    shape = (batch, HEADS, tokens, WIDTH)

    def draw(dtype: torch.dtype) -> Pair:
        memory = (batch, tokens, HEADS, WIDTH)
        query, key, *weights = setting.normal(memory, memory, (WIDTH,), (WIDTH,), dtype=dtype)
        (angles,) = setting.normal((max(1, tokens - FIXED), WIDTH // 2), seed=1)
        inputs = (query.transpose(1, 2), key.transpose(1, 2), *weights)
        tables = (angles.cos(), angles.sin())
        return Pair(ops.rotary_qk_norm, ops.rotary_qk_norm_jvp, plain, inputs, tables, 2)

    yield from pair_cases("rotary_qk_norm", setting, draw, shape)
