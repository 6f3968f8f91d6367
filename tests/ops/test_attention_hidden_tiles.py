"""Masked values have no effect in the CUDA kernels, although tensor cores multiply them by zero.

The tests of test_attention_behind_masks.py at sizes that take the emulator seconds.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.attention import Problem, Shape, gradients, gradients_of_both, problem
from helpers.levels import LEVELS, at_level
from helpers.tolerance import assert_close, tolerance
from torch import Tensor

from pmf import ops, reference

QUERIES, KEYS = 45, 70
SPLIT = 30  # two sequences, one after the other
BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


@pytest.fixture(params=[name for name in LEVELS if name in ("emulated", "cuda")])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param):
        yield request.param


def hiding(kind: str, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """Options of the op, and the keys that each query attends to."""
    seen = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    if kind == "causal":
        return {"is_causal": True}, seen.tril()
    seen[:, 50:] = False
    seen[: QUERIES // 2, 7] = False  # hidden from only some queries
    if kind == "boolean":
        return {"attn_mask": seen}, seen
    return {"attn_mask": torch.zeros(QUERIES, KEYS, dtype=dtype).masked_fill(~seen, -torch.inf)}, seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["boolean", "additive", "causal"])
@pytest.mark.parametrize("which", ["key", "value", "key_t", "value_t"])
def test_forward(level, which, kind, bad, dtype):
    """0 times NaN in P V, H V and P tV: outputs of queries that do not see it keep their bits."""
    p = problem(Shape(1, 2, 2, QUERIES, KEYS, 64, 64)).to(dtype)
    options, seen = hiding(kind, dtype)
    clean, clean_t = ops.attention_jvp(*p[:6], **options)
    key = 30 if kind == "causal" else 7
    dirty = p._replace(**{which: getattr(p, which).clone()})
    getattr(dirty, which)[:, :, [key, 60], 3] = BAD[bad]
    out, out_t = ops.attention_jvp(*dirty[:6], **options)
    hit = seen[:, key] | seen[:, 60]
    assert torch.equal(out[:, :, ~hit], clean[:, :, ~hit])
    assert torch.equal(out_t[:, :, ~hit], clean_t[:, :, ~hit])
    assert not out_t[:, :, hit].isfinite().all(-1).any()  # visible values do have an effect
    if which == "value":
        exact = reference.attention(*dirty.to(torch.float64)[:3], **options | {"attn_mask": seen})
        assert torch.equal(out.isfinite(), exact.isfinite())
        assert_close(out[exact.isfinite()], exact[exact.isfinite()], tolerance("attention", dtype))


def spoiled(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, H, N, D] with garbage in the named rows [N]: all of a row, or a single number."""
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e4], dtype=x.dtype)
    result = x.clone()
    for i in rows.nonzero()[:, 0].tolist():
        result[:, :, i, : x.shape[-1] if i % 2 else 1] = garbage[i // 2 % 4]
    return result


def everything(p: Problem, **options) -> list[Tensor]:
    return [*gradients(ops, p, **options), *gradients_of_both(ops, p, **options)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_of_hidden_keys_and_blind_queries(level, is_causal, dtype):
    """Garbage in keys, values and tangents, and in queries and gradients of rows that attend to nothing."""
    p = problem(Shape(1, 4, 2, QUERIES, KEYS, 24, 40)).to(dtype)
    seen = torch.arange(KEYS) % 7 > 2
    mask = seen.expand(QUERIES, KEYS).clone()
    mask[20:28] = False
    options = {"attn_mask": mask, "is_causal": is_causal, "enable_gqa": True}
    keep = mask.tril() if is_causal else mask
    dirty = Problem(*(spoiled(x, ~keep.any(-1) if x.shape[2] == QUERIES else ~keep.any(0)) for x in p))
    for actual, clean in zip(everything(dirty, **options), everything(p, **options), strict=True):
        assert torch.equal(actual, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["key", "value", "key_t", "value_t"])
def test_gradients_of_the_other_sequence(level, which, dtype):
    """A key of the second sequence is NaN, which must not affect the first."""
    p = problem(Shape(1, 2, 2, QUERIES, KEYS, 64, 64)).to(dtype)
    place = torch.arange(KEYS) >= SPLIT
    options = {"attn_mask": place[:QUERIES, None] == place}
    dirty = p._replace(**{which: getattr(p, which).clone()})
    getattr(dirty, which)[:, :, 40, 3] = torch.nan
    actual, clean = (gradients_of_both(ops, x, **options) for x in (dirty, p))
    for a, c in zip(actual, clean, strict=True):
        assert_close(a[:, :, :SPLIT], c[:, :, :SPLIT], tolerance("attention gradient", dtype))
    assert actual[0][:, :, SPLIT:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_queries_without_a_gradient_have_no_effect(level, dtype):
    """Self-attention over padding: queries are NaN there too, and the loss ignores their outputs."""
    p = problem(Shape(1, 2, 2, KEYS, KEYS, 64, 64)).to(dtype)
    padding = torch.arange(KEYS) >= 50
    grads = [x.masked_fill(padding[:, None], 0) for x in p[6:]]
    dirty = Problem(*(spoiled(x, padding) for x in p[:6]), *grads)
    mask = {"attn_mask": ~padding.expand(KEYS, KEYS)}
    actual, clean = (everything(x, **mask) for x in (dirty, Problem(*p[:6], *grads)))
    assert_close(actual, clean, tolerance("attention gradient", dtype))
