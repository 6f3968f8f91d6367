"""Every length with every width, through all four attention passes, at every level.

The pairs of lengths form a Latin square: over the widths, each query length meets each key length.
"""

import itertools

import pytest
import torch
from helpers.attention import Shape, gradients, gradients_of_both, shaped
from helpers.tolerance import assert_close, spread, tolerance
from torch import Tensor

from pmf import ops

LENGTHS = (1, 17, 63, 64, 65, 276)
WIDTHS = (32, 64, 72, 80, 96, 128)
CASES = [
    *itertools.product((torch.bfloat16, torch.float16), WIDTHS),
    *((torch.float32, width) for width in (32, 80)),  # one kernel up to 128, and slow to emulate
]


@pytest.mark.parametrize(("dtype", "width"), CASES)
@pytest.mark.parametrize("queries", LENGTHS)
def test_all_passes(level: str, queries: int, width: int, dtype: torch.dtype) -> None:
    keys = LENGTHS[(LENGTHS.index(queries) + WIDTHS.index(width)) % len(LENGTHS)]
    p, values, plain, both = shaped(Shape(1, 1, 1, queries, keys, width, width), dtype)
    out, out_t = ops.attention_jvp(*p[:6])
    assert torch.equal(out, ops.attention(*p[:3]))
    assert_close((out, out_t), values, tolerance("attention", dtype) * spread(values[0]))
    found = gradients(ops, p), gradients_of_both(ops, p)
    if keys == 1:  # the scores then have no gradient: its remainder is compared with the value's
        found, plain, both = tuple(map(joined, found)), joined(plain), joined(both)
    limit = tolerance("attention gradient", dtype) * (1 + 3 * (max(map(spread, plain)) - 1))
    for actual, exact in zip(found, (plain, both), strict=True):
        assert_close(actual, exact, limit)


@pytest.mark.parametrize(("keys", "width"), [(276, 64), (250, 80)])
def test_heads_that_fit_in_shared_memory(level: str, keys: int, width: int) -> None:
    """On a GPU 276 tokens make one block per head, given enough heads: it keeps all keys, and its warps
    iterate over them repeatedly. An emulated device treats four heads as enough and has room for 8 tiles of
    width 80: a whole head's 276 keys fit there from 181 KB on.
    """
    p, values, *_ = shaped(Shape(1, 4, 4, 276, keys, width, width), torch.bfloat16)
    out, out_t = ops.attention_jvp(*p[:6])
    assert torch.equal(out, ops.attention(*p[:3]))
    assert_close((out, out_t), values, tolerance("attention", torch.bfloat16))


def joined(tensors: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (torch.cat([x.flatten() for x in tensors]),)
