"""attention against float64, at every level of the CPU kernels."""

import pytest
import torch
from helpers.attention import (
    DTYPES,
    EMPTY,
    HARD,
    HARD_SHAPES,
    MASKS,
    SHAPES,
    Shape,
    hard,
    masked,
    problem,
    scattered,
    shaped,
    smaller_if_emulated,
)
from helpers.levels import LEVELS, at_level
from helpers.memory import peak_bytes
from helpers.tolerance import assert_close, spread, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from pmf import ops, reference


def limit(dtype: torch.dtype) -> float:
    return tolerance("attention", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lengths_and_widths(level, shape, dtype):
    p, (out, _), *_ = shaped(shape, dtype)
    actual = ops.attention(*p[:3], enable_gqa=True)
    assert actual.dtype == dtype
    assert_close(actual, out, limit(dtype) * spread(out))


@pytest.mark.parametrize("shape", EMPTY)
def test_nothing_to_attend_gives_zeros(level, shape):
    p = problem(shape).to(torch.float32)
    out = ops.attention(*p[:3])
    assert out.shape == p.grad.shape
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(level, mask, dtype):
    (p, (out, _), *_), options = masked(mask, dtype)
    actual = ops.attention(*p[:3], **options)
    assert_close(actual, out, limit(dtype))
    assert (actual[out == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", HARD_SHAPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_cases(level, name, shape, dtype):
    p, (out, _), *_ = hard(name, smaller_if_emulated(shape, level), dtype)
    assert_close(ops.attention(*p[:3], enable_gqa=True), out, limit(dtype))


@pytest.mark.parametrize("keys", [15, 64, 65, 130])
def test_every_query_sees_only_its_past(level, keys):
    """Causal from the top left, whichever length is greater."""
    p = problem(Shape(1, 2, 2, 65, keys, 16, 16)).to(torch.float32)
    actual = ops.attention(*p[:3], is_causal=True)
    past = torch.ones(65, keys, dtype=torch.bool).tril()
    assert_close(actual, reference.attention(*p.to(torch.float64)[:3], past), limit(torch.float32))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0, 0.01])
def test_scale(level, scale):
    p = problem(Shape(1, 2, 2, 33, 40, 24, 24)).to(torch.float32)
    exact = reference.attention(*p.to(torch.float64)[:3], scale=scale)
    assert_close(ops.attention(*p[:3], scale=scale), exact, limit(torch.float32))


def test_scores_far_outside_the_exponentials_range(level):
    """One key dominates each row; neither the maximum nor the value subtracted from it may overflow."""
    query, key = torch.full((1, 1, 20, 8), 1e4), torch.linspace(-1e4, 1e4, 300)[:, None].expand(1, 1, 300, 8)
    value = torch.randn(1, 1, 300, 8)
    last, mean = value[:, :, -1:], value.double().mean(2, keepdim=True)
    assert_close(ops.attention(query, key, value), last.expand(1, 1, 20, 8), limit(torch.float32))
    lowest = torch.full((20, 300), torch.finfo(torch.float32).min)
    out = ops.attention(query, key, value, lowest)  # absorbs the scores: all are equal
    assert_close(out, mean.expand(1, 1, 20, 8), limit(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e7, 1e9, 1e12, 1e30, -1e30])
def test_huge_scores_choose_one_key(level, dtype, magnitude):
    """If rounding of the scores exceeds exp's range, s c - m must be 0 at the maximum: rows were NaN."""
    p = problem(Shape(1, 2, 2, 40, 90, 16, 16)).to(dtype)
    query, key = p[0] * abs(magnitude) ** 0.5, p[1] * abs(magnitude) ** 0.5
    scale = 0.25 if magnitude > 0 else -0.25
    exact = reference.attention(query.double(), key.double(), p[2].double(), scale=scale)
    assert_close(ops.attention(query, key, p[2], scale=scale), exact, limit(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_head(level, dtype):
    p = problem(Shape(2, 4, 4, 65, 65, 16, 16)).to(dtype)
    clean = ops.attention(*p[:3])
    for i in range(3):
        inputs = [x.clone() for x in p[:3]]
        inputs[i][1, 2, 5, 3] = torch.nan
        out = ops.attention(*inputs)
        hit = torch.zeros(2, 4, dtype=torch.bool)
        hit[1, 2] = True
        assert torch.equal(out[~hit], clean[~hit])
        assert out[hit].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(level, dtype):
    p = problem(Shape(1, 3, 1, 150, 65, 24, 24)).to(dtype)
    results = []
    for count in (1, 1, 2, 5):
        torch.set_num_threads(count)
        results.append(ops.attention(*p[:3], enable_gqa=True, is_causal=True))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_memory_is_linear_in_the_length():
    def used(length: int) -> int:
        q = torch.randn(1, 2, length, 16)
        return peak_bytes(lambda: ops.attention(q, q, q))

    short, long = used(2048), used(4096)
    assert long <= 2.1 * short
    assert long < 2048 * 2048  # one byte per score of the shorter one would exceed this


def test_strided_inputs_are_not_copied():
    def used(*inputs: torch.Tensor) -> int:
        return peak_bytes(lambda: ops.attention(*inputs))

    packed = torch.randn(2, 500, 3, 4, 32)
    strided = [x.transpose(1, 2) for x in packed.unbind(2)]
    repeated = [torch.randn(1, 1, 500, 32).expand(2, 4, 500, 32)] * 3
    dense = used(*(x.contiguous() for x in strided))
    assert used(*strided) == dense
    assert used(*repeated) == dense


ORDERS = st.permutations(range(4)).map(tuple)
STEPS = st.tuples(*[st.sampled_from([1, 1, 2, 3, 0])] * 3, st.sampled_from([1, 1, 2]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    level=st.sampled_from(LEVELS),
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(*[st.integers(1, 3)] * 3, *[st.integers(0, 80)] * 2, *[st.integers(1, 40)] * 2),
    layouts=st.tuples(*[st.tuples(ORDERS, STEPS)] * 3),
    is_causal=st.booleans(),
)
def test_any_shape_and_strides(level, dtype, sizes, layouts, is_causal):
    """There is NaN between the elements, and some strides are 0."""
    batch, key_heads, group, queries, keys, width, value_width = sizes
    p = problem(Shape(batch, group * key_heads, key_heads, queries, keys, width, value_width)).to(dtype)
    inputs = [scattered(x, *layout) for x, layout in zip(p[:3], layouts, strict=True)]
    with at_level(level):
        out = ops.attention(*inputs, is_causal=is_causal, enable_gqa=True)
    exact = reference.attention(*(x.double() for x in inputs), None, is_causal, enable_gqa=True)
    # Only a few numbers: single errors do not average out.
    assert_close(out, exact, 3 * limit(dtype))
