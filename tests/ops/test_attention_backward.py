"""Gradients of attention, and of attention_jvp through both outputs, against float64 at every level."""

import functools
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
    Problem,
    Shape,
    gradients,
    gradients_of_both,
    hard,
    masked,
    problem,
    scattered,
    shaped,
    smaller_if_emulated,
)
from helpers.levels import CPU_LEVELS, LEVELS, at_level
from helpers.memory import peak_bytes
from helpers.tolerance import assert_close, spread, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from pmf import ops, reference


def limit(dtype: torch.dtype) -> float:
    return tolerance("attention gradient", dtype)


def assert_right(solved, **options) -> None:
    """All nine gradients: three of attention, six of attention_jvp."""
    p, _, plain, both = solved
    actual = gradients(ops, p, **options)
    assert [g.dtype for g in actual] == [p.query.dtype] * 3
    # Three standard deviations of the smallest gradient's error: it has the fewest entries.
    few = 1 + 3 * (max(map(spread, plain)) - 1)
    assert_close(actual, plain, few * limit(p.query.dtype))
    assert_close(gradients_of_both(ops, p, **options), both, few * limit(p.query.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lengths_and_widths(level, shape, dtype):
    assert_right(shaped(shape, dtype), enable_gqa=True)


@pytest.mark.parametrize("shape", EMPTY)
def test_nothing_to_attend_gives_zeros(level, shape):
    p = problem(shape).to(torch.float32)
    for x, grad in zip((*p[:3], *p[:6]), (*gradients(ops, p), *gradients_of_both(ops, p)), strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_key_has_a_gradient_only_for_its_value(level, dtype):
    """Its probability is 1 whatever the scores."""
    p = problem(Shape(1, 4, 4, 65, 1, 24, 24)).to(dtype)
    wide = p.to(torch.float64)
    dq, dk, dv, dq_t, dk_t, dv_t = gradients_of_both(ops, p)
    for zero in (dq, dk, dq_t, dk_t):
        assert zero.abs().max() <= limit(dtype)
    assert_close((dv, dv_t), (wide.grad.sum(2, keepdim=True), wide.grad_t.sum(2, keepdim=True)), limit(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(level, mask, dtype):
    solved, options = masked(mask, dtype)
    assert_right(solved, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_keys_and_keys_without_queries_have_zero_gradients(level, dtype):
    (p, *_), options = masked("rows that attend nothing", dtype)
    dq, dk, dv, dq_t, dk_t, dv_t = gradients_of_both(ops, p, **options)
    plain_dq, plain_dk, plain_dv = gradients(ops, p, **options)
    rows = ~options["attn_mask"].any(-1)
    assert rows.any()
    for grad in (dq, dq_t, plain_dq):
        assert (grad[rows] == 0).all()
        assert (grad[~rows] != 0).any()
    for grad in (dk, dv, dk_t, dv_t, plain_dk, plain_dv):
        assert (grad[:, :, 7] == 0).all()
        assert (grad[:, :, 8] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", HARD_SHAPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_cases(level, name, shape, dtype):
    if level == "emulated" and (dtype != torch.bfloat16 or shape != HARD_SHAPES[1]):
        pytest.skip("one dtype and one shape in the emulator")
    assert_right(hard(name, smaller_if_emulated(shape, level), dtype), enable_gqa=True)


@pytest.mark.parametrize("keys", [1000, 4000])
def test_error_does_not_grow_with_the_number_of_equal_scores(level, keys):
    """A single float32 sum over all keys would round every equal term the same way."""
    p = problem(Shape(1, 1, 1, 16, keys, 16, 16)).to(torch.float32)
    p = p._replace(query=torch.zeros_like(p.query))
    exact = gradients_of_both(reference, p.to(torch.float64))
    assert_close(gradients_of_both(ops, p), exact, limit(torch.float32))


PRESENT = [x for x in itertools.product([False, True], repeat=3) if any(x)]


@functools.cache
def with_tangents(present: tuple[bool, ...], dtype: torch.dtype) -> tuple[Problem, Problem, tuple, tuple]:
    p = problem(Shape(1, 2, 1, 65, 130, 40, 24)).to(dtype)
    zeros = p._replace(
        **{n: torch.zeros_like(getattr(p, n)) for n, g in zip(p._fields[3:6], present, strict=True) if not g}
    )
    absent = p._replace(**{n: None for n, g in zip(p._fields[3:6], present, strict=True) if not g})
    exact = gradients_of_both(reference, zeros.to(torch.float64), enable_gqa=True)
    kept = tuple(g for g, there in zip(exact, (True, True, True, *present), strict=True) if there)
    return zeros, absent, exact, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("present", PRESENT)
def test_absent_tangents_are_zero(level, present, dtype):
    zeros, absent, exact, kept = with_tangents(present, dtype)
    assert_close(gradients_of_both(ops, zeros, enable_gqa=True), exact, limit(dtype))
    assert_close(gradients_of_both(ops, absent, enable_gqa=True), kept, limit(dtype))


def of_one_output(module, p: Problem, output: int, leaves: list[int]) -> tuple[torch.Tensor, ...]:
    inputs = [x.detach().requires_grad_(i in leaves) for i, x in enumerate(p[:6])]
    outputs = module.attention_jvp(*inputs, enable_gqa=True)
    return torch.autograd.grad(outputs[output], [inputs[i] for i in leaves], p[6 + output])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("output", "leaves"),
    [(0, [0, 1, 2]), (1, [0, 1, 2, 3, 4, 5]), (0, [1]), (1, [2]), (1, [0, 3]), (1, [5])],
)
def test_gradients_of_one_output_for_some_inputs(level, output, leaves, dtype):
    p = shaped(Shape(1, 4, 2, 65, 130, 40, 24), dtype).problem
    exact = of_one_output(reference, p.to(torch.float64), output, leaves)
    assert_close(of_one_output(ops, p, output, leaves), exact, limit(dtype))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detached_tangent_leaves_the_gradients_of_attention(level, count, dtype):
    p = problem(Shape(2, 4, 2, 65, 70, 24, 24)).to(dtype)
    leaves = [x.detach().requires_grad_() for x in p[:3]]
    out, out_t = ops.attention_jvp(
        *leaves, *(t[:count] for t in p[3:6]), enable_gqa=True, detach_tangent=True
    )
    assert not out_t.requires_grad
    actual = torch.autograd.grad(out, leaves, p.grad)
    plain = gradients(ops, p, enable_gqa=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_head(level, dtype):
    p = problem(Shape(2, 4, 4, 65, 65, 16, 16)).to(dtype)
    clean = gradients(ops, p) + gradients_of_both(ops, p)
    for i in (0, 2, 4, 6, 7):
        poisoned = p._replace(**{p._fields[i]: p[i].clone()})
        poisoned[i][1, 2, 5, 3] = torch.nan
        hit = torch.zeros(2, 4, dtype=torch.bool)
        hit[1, 2] = True
        dirty = gradients(ops, poisoned) + gradients_of_both(ops, poisoned)
        assert all(torch.equal(d[~hit], c[~hit]) for d, c in zip(dirty, clean, strict=True))
        assert dirty[3][hit].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 1), (4, 2), (3, 3)])
def test_two_runs_agree_bitwise_and_a_head_may_be_shared_by_threads(level, heads, dtype):
    """For example one head and five threads: each has a share of the queries, and its own sums."""
    solved = shaped(Shape(1, *heads, 150, 65, 24, 24), dtype)
    for count in (1, 2, 5) if level in CPU_LEVELS else (1,):
        torch.set_num_threads(count)
        assert_right(solved, enable_gqa=True)
        runs = [gradients_of_both(ops, solved.problem, enable_gqa=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_keep_the_memory_order_of_their_inputs(level):
    """The model's [B, N, H, D] buffers: gradients flatten to [B, N, H D] without a copy."""
    p = problem(Shape(2, 4, 2, 65, 33, 24, 40)).to(torch.float32)
    turned = p.map(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    for grad in gradients(ops, turned, enable_gqa=True) + gradients_of_both(ops, turned, enable_gqa=True):
        assert grad.transpose(1, 2).is_contiguous()
    exact = gradients_of_both(reference, p.to(torch.float64), enable_gqa=True)
    assert_close(gradients_of_both(ops, turned, enable_gqa=True), exact, limit(torch.float32))


@pytest.mark.parametrize("find", [gradients, gradients_of_both])
def test_memory_is_linear_in_the_length(find):
    def used(length: int) -> int:
        p = problem(Shape(1, 2, 2, length, length, 16, 16)).to(torch.float32)
        return peak_bytes(lambda: find(ops, p))

    short, long = used(1024), used(2048)
    assert long <= 2.1 * short
    assert long < 4 * 2048 * 2048  # one float for each score


ORDERS = st.permutations(range(4)).map(tuple)
# Not 0 along the tokens: if all keys are equal, score gradients are zero and relative errors meaningless.
STEPS = st.tuples(*[st.sampled_from([1, 1, 2, 3, 0])] * 2, *[st.sampled_from([1, 1, 2])] * 2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    level=st.sampled_from(LEVELS),
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(*[st.integers(1, 3)] * 3, *[st.integers(8, 80)] * 2, *[st.integers(8, 40)] * 2),
    layouts=st.tuples(*[st.tuples(ORDERS, STEPS)] * 8),
    is_causal=st.booleans(),
)
def test_any_shape_and_strides(level, dtype, sizes, layouts, is_causal):
    """There is NaN between the elements, and some strides are 0."""
    batch, key_heads, group, queries, keys, width, value_width = sizes
    p = problem(Shape(batch, group * key_heads, key_heads, queries, keys, width, value_width)).to(dtype)
    p = Problem(*(scattered(x, *layout) for x, layout in zip(p, layouts, strict=True)))
    options = {"is_causal": is_causal, "enable_gqa": True}
    with at_level(level):
        plain, both = gradients(ops, p, **options), gradients_of_both(ops, p, **options)
    wide = p.to(torch.float64)
    # Only a few numbers: single errors do not average out.
    assert_close(plain, gradients(reference, wide, **options), 3 * limit(dtype))
    assert_close(both, gradients_of_both(reference, wide, **options), 3 * limit(dtype))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("magnitude", [1e7, 1e9, 1e12, 1e30])
def test_huge_scores_choose_one_key(level, magnitude, is_causal):
    """For such scores lse is too coarse to stay in exp's range: gradients were NaN."""
    p = problem(Shape(1, 2, 2, 40, 130, 16, 16)).to(torch.float32)
    leaves = [x.clone().requires_grad_() for x in (p[0] * magnitude**0.5, p[1] * magnitude**0.5, p[2])]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    grad = torch.randn(1, 2, 40, 16)
    got = torch.autograd.grad(ops.attention(*leaves, is_causal=is_causal), leaves, grad)
    want = torch.autograd.grad(reference.attention(*exact, is_causal=is_causal), exact, grad.double())
    assert_close(got[2], want[2], limit(torch.float32))
    assert all(bool(x.isfinite().all()) for x in got)
