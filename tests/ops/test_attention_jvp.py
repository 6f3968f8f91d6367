"""attention_jvp against float64, at every level of the CPU kernels."""

import itertools

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
    p, exact, *_ = shaped(shape, dtype)
    actual = ops.attention_jvp(*p[:6], enable_gqa=True)
    assert [x.dtype for x in actual] == [dtype, dtype]
    assert_close(actual, exact, limit(dtype) * spread(exact[0]))
    assert torch.equal(actual[0], ops.attention(*p[:3], enable_gqa=True))


@pytest.mark.parametrize("shape", EMPTY)
def test_nothing_to_attend_gives_zeros(level, shape):
    p = problem(shape).to(torch.float32)
    for x in ops.attention_jvp(*p[:6]):
        assert x.shape == p.grad.shape
        assert (x == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(level, mask, dtype):
    (p, exact, *_), options = masked(mask, dtype)
    actual = ops.attention_jvp(*p[:6], **options)
    assert_close(actual, exact, limit(dtype))
    assert all((a[e == 0] == 0).all() for a, e in zip(actual, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", HARD_SHAPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_cases(level, name, shape, dtype):
    p, exact, *_ = hard(name, smaller_if_emulated(shape, level), dtype)
    assert_close(ops.attention_jvp(*p[:6], enable_gqa=True), exact, limit(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=3)))
def test_absent_tangents_are_zero(level, present, dtype):
    p = problem(Shape(1, 2, 1, 65, 130, 40, 24)).to(dtype)
    absent = [t if g else None for t, g in zip(p[3:6], present, strict=True)]
    zeros = [t if g else torch.zeros_like(t) for t, g in zip(p[3:6], present, strict=True)]
    exact = reference.attention_jvp(*p.to(torch.float64)[:3], *(t.double() for t in zeros), enable_gqa=True)
    for tangents in (absent, zeros):
        out, out_t = ops.attention_jvp(*p[:3], *tangents, enable_gqa=True)
        assert_close((out, out_t), exact, limit(dtype))
        if not any(present):
            assert (out_t == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("mask", ["causal", "boolean [B, 1, 1, Nk]", "rows that attend nothing"])
def test_tangents_of_the_first_samples(level, mask, count, dtype):
    (p, exact, *_), options = masked(mask, dtype)
    tangents = (p.query_t[:count], None, p.value_t[:count])
    out, out_t = ops.attention_jvp(*p[:3], *tangents, **options, detach_tangent=True)
    assert out_t.shape == (count, *out.shape[1:])
    assert_close(out, exact[0], limit(dtype))
    wide = p.to(torch.float64)._replace(key_t=None)
    assert_close(out_t, reference.attention_jvp(*wide[:6], **options)[1][:count], limit(dtype))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_scale(level, scale):
    p = problem(Shape(1, 2, 2, 33, 40, 24, 24)).to(torch.float32)
    exact = reference.attention_jvp(*p.to(torch.float64)[:6], scale=scale)
    assert_close(ops.attention_jvp(*p[:6], scale=scale), exact, limit(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_a_tangent_leaves_values_and_other_heads_alone(level, dtype):
    p = problem(Shape(2, 4, 4, 65, 65, 16, 16)).to(dtype)
    out, out_t = ops.attention_jvp(*p[:6])
    for i in range(3):
        tangents = [x.clone() for x in p[3:6]]
        tangents[i][1, 2, 5, 3] = torch.nan
        again, again_t = ops.attention_jvp(*p[:3], *tangents)
        hit = torch.zeros(2, 4, dtype=torch.bool)
        hit[1, 2] = True
        assert torch.equal(again, out)
        assert torch.equal(again_t[~hit], out_t[~hit])
        assert again_t[hit].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(level, dtype):
    p = problem(Shape(1, 3, 1, 150, 65, 24, 24)).to(dtype)
    results = []
    for count in (1, 1, 2, 5):
        torch.set_num_threads(count)
        results.append(ops.attention_jvp(*p[:6], enable_gqa=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_is_linear_in_the_length():
    def used(length: int) -> int:
        q = torch.randn(1, 2, length, 16)
        return peak_bytes(lambda: ops.attention_jvp(q, q, q, q, q, q))

    short, long = used(2048), used(4096)
    assert long <= 2.1 * short
    assert long < 2048 * 2048


ORDERS = st.permutations(range(4)).map(tuple)
STEPS = st.tuples(*[st.sampled_from([1, 1, 2, 3, 0])] * 3, st.sampled_from([1, 1, 2]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    level=st.sampled_from(LEVELS),
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(*[st.integers(1, 3)] * 3, *[st.integers(0, 80)] * 2, *[st.integers(1, 40)] * 2),
    layouts=st.tuples(*[st.tuples(ORDERS, STEPS)] * 6),
    is_causal=st.booleans(),
)
def test_any_shape_and_strides(level, dtype, sizes, layouts, is_causal):
    """There is NaN between the elements, and some strides are 0."""
    batch, key_heads, group, queries, keys, width, value_width = sizes
    p = problem(Shape(batch, group * key_heads, key_heads, queries, keys, width, value_width)).to(dtype)
    inputs = [scattered(x, *layout) for x, layout in zip(p[:6], layouts, strict=True)]
    with at_level(level):
        actual = ops.attention_jvp(*inputs, is_causal=is_causal, enable_gqa=True)
    exact = reference.attention_jvp(*(x.double() for x in inputs), None, is_causal, enable_gqa=True)
    # Only a few numbers: single errors do not average out.
    assert_close(actual, exact, 3 * limit(dtype))


# Batch 2, 12 heads of 64; random masks that hide nine keys in ten, and thereby whole rows.
JVP_FLASH_ATTENTION = [
    (length, mask, is_causal)
    for length in (32, 64, 128, 256, 512)
    for mask, is_causal in ((None, False), (None, True), ("boolean", False), ("additive", False))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "mask", "is_causal"), JVP_FLASH_ATTENTION)
def test_shapes_of_jvp_flash_attentions_tests(length, mask, is_causal, dtype):
    """https://github.com/amorehead/jvp_flash_attention, whose lengths are multiples of 32."""
    p = problem(Shape(2, 12, 12, length, length, 64, 64)).to(dtype)
    attn_mask = None
    if mask is not None:
        attn_mask = torch.rand(2, 12, length, length, generator=torch.Generator().manual_seed(1)) > 0.9
        assert (length > 64) or not attn_mask.any(-1).all()
    if mask == "additive":
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(dtype)
    check_with_gradients(p, attn_mask, is_causal, dtype)


# Names of timm's models: patch 14 or 16 at 224 and 384 pixels, class tokens, registers; windows with a bias.
TIMM = {
    "vit_tiny_patch16_224": Shape(2, 3, 3, 197, 197, 64, 64),
    "vit_base_patch16_384": Shape(1, 2, 2, 577, 577, 64, 64),
    "vit_base_patch14_reg4_dinov2 at 224": Shape(1, 2, 2, 261, 261, 64, 64),
    "vit_so400m_patch14_siglip_224": Shape(1, 2, 2, 256, 256, 72, 72),
    "vit_giant_patch14_224": Shape(1, 2, 2, 257, 257, 88, 88),
    "attention pool, one query": Shape(2, 2, 2, 1, 197, 64, 64),
    "swin, window 7": Shape(8, 3, 3, 49, 49, 32, 32),
}
"""Batch and heads are reduced; lengths and widths are the models'."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TIMM)
def test_shapes_of_timms_models(name, dtype):
    p = problem(TIMM[name]).to(dtype)
    bias = torch.randn(1, 3, 49, 49, generator=torch.Generator().manual_seed(1)).to(dtype)
    check_with_gradients(p, bias if "swin" in name else None, False, dtype)


def check_with_gradients(p, attn_mask, is_causal, dtype):
    """Value, tangent, and the gradients of the value with a detached tangent."""
    inputs = [x.requires_grad_() for x in p[:3]]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wide_mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.double()
    tangents = [t.double() for t in p[3:6]]
    out, out_t = ops.attention_jvp(*p[:6], attn_mask, is_causal, detach_tangent=True)
    exact = reference.attention_jvp(*wide, *tangents, wide_mask, is_causal)
    assert_close((out, out_t), exact, limit(dtype) * spread(exact[0]))
    found = torch.autograd.grad(out, inputs, p.grad)
    wanted = torch.autograd.grad(exact[0], wide, p.grad.double())
    assert_close(found, wanted, tolerance("attention gradient", dtype) * spread(exact[0]))
