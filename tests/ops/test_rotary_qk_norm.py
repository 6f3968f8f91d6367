"""rotary_qk_norm against float64: levels, dtypes, layouts, tangents of some samples, its invariants."""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.elementwise import (
    DTYPES,
    FEW_TERMS,
    check,
    check_first_samples,
    check_repeatable,
    dtypes,
    few_examples,
    levels,
    normal,
)
from helpers.levels import EVERYWHERE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pmf.ops import rms_norm, rotary_qk_norm, rotary_qk_norm_jvp


def _part_of_one_product(x: Tensor) -> Tensor:
    """Heads inside tokens, with other data between the tokens: a slice of [B, N, 3 H D]."""
    wide = x.new_full((x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3]), torch.nan)
    wide[:, :, 1] = x.transpose(1, 2)
    return wide[:, :, 1].transpose(1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens inside heads": lambda x: x.contiguous(),
    "heads inside tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of one product": _part_of_one_product,
    "last dimension strided": lambda x: x.mT.contiguous().mT,
    "one sample repeated": lambda x: x[:1].expand_as(x),
}


def case(
    dtype: torch.dtype, batch: int, heads: int, key_heads: int, tokens: int, rotated: int, width: int
) -> tuple[list[Tensor], list[Tensor]]:
    query, key = (batch, heads, tokens, width), (batch, key_heads, tokens, width)
    q, k, q_t, k_t, qw, kw, angles = normal(query, key, query, key, (width,), (width,), (rotated, width // 2))
    table = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [t.to(dtype) for t in (q, k, qw, kw)] + [t.to(table) for t in (angles.cos(), angles.sin())]
    return inputs, [t.to(dtype) for t in (q_t, k_t)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    inputs, tangents = case(dtype, 3, 4, 2, 43, 39, 80)
    inputs[:2] = map(LAYOUTS["heads inside tokens"], inputs[:2])
    check(name, "rotary_qk_norm", inputs, tangents, constants=2)


@few_examples
@given(
    levels(),
    dtypes(),
    *[st.sampled_from(sorted(LAYOUTS))] * 3,
    *[st.integers(1, n) for n in (3, 3, 3)],
    st.integers(1, 20),  # more than a block of rows, and not whole blocks
    st.integers(0, 20),
    st.just(32) | st.integers(1, 70),  # heads of 64 have code of their own
)
def test_shapes_and_strides(level, dtype, a, b, c, batch, heads, key_heads, tokens, rotated, pairs) -> None:
    inputs, tangents = case(dtype, batch, heads, key_heads, tokens, min(rotated, tokens), 2 * pairs)
    inputs[:2] = LAYOUTS[a](inputs[0]), LAYOUTS[b](inputs[1])
    tangents[0] = LAYOUTS[c](tangents[0])
    check(level, "rotary_qk_norm", inputs, tangents, terms=FEW_TERMS, constants=2, eps=0.5)


@pytest.mark.parametrize("layout", ["tokens inside heads", "heads inside tokens"])
def test_results_have_the_memory_layout_of_the_inputs(layout: str) -> None:
    inputs, tangents = case(torch.float32, 2, 3, 1, 7, 5, 8)
    inputs[:2] = map(LAYOUTS[layout], inputs[:2])
    tangents = list(map(LAYOUTS[layout], tangents))
    for x, y in zip(inputs[:2] + tangents, rotary_qk_norm_jvp(*inputs, *tangents), strict=True):
        assert x.stride() == y.stride()


@pytest.mark.parametrize("sizes", [(0, 2, 3, 2, 8), (1, 2, 0, 0, 8), (1, 2, 3, 2, 0)])
def test_empty(sizes: tuple[int, int, int, int, int]) -> None:
    batch, heads, tokens, rotated, width = sizes
    inputs, tangents = case(torch.float32, batch, heads, heads, tokens, rotated, width)
    leaves = [x.requires_grad_() for x in inputs[:4]]
    outputs = rotary_qk_norm_jvp(*leaves, *inputs[4:], *tangents)
    assert all(y.shape == inputs[0].shape for y in outputs)
    sum(y.sum() for y in outputs).backward()  # type: ignore[union-attr]
    assert all(x.grad is not None and torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def test_first_samples() -> None:
    inputs, tangents = case(torch.float32, 4, 3, 1, 7, 5, 34)
    check_first_samples("rotary_qk_norm", inputs, tangents, shared={2, 3, 4, 5})


def test_bitwise_repeatable(threads: None) -> None:
    inputs, tangents = case(torch.float32, 4, 3, 3, 276, 256, 32)
    check_repeatable("rotary_qk_norm", inputs, tangents, constants=2)


def test_is_rms_norm_without_rotation() -> None:
    """The first N - P tokens, and all of them for P = 0."""
    inputs, _ = case(torch.float32, 2, 3, 2, 7, 3, 34)
    q, k, qw, kw, cos, sin = inputs
    for tables, tokens in (((cos, sin), 4), ((cos[:0], sin[:0]), 7)):
        for found, x, w in zip(rotary_qk_norm(*inputs[:4], *tables), (q, k), (qw, kw), strict=True):
            assert torch.equal(found[:, :, :tokens], rms_norm(x[:, :, :tokens], w))


def test_scores_depend_on_the_difference_of_positions() -> None:
    """Its purpose: with one query and key at every token, scores are constant along diagonals."""
    (x, w), tokens = normal((8,), (8,)), 6
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.tensor([1, 0.3, 0.1, 0.03])
    same = x.expand(1, 1, tokens, 8)
    q, k = rotary_qk_norm(same, same, w, w, angles.cos(), angles.sin())
    scores = (q @ k.mT)[0, 0]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert (scores[0, 1:] - scores[0, 0]).abs().min() > 1e-3


def _with(**changes: Tensor) -> tuple[Tensor, ...]:
    names = ("query", "key", "query_weight", "key_weight", "cos", "sin")
    return tuple(
        changes.get(n, x) for n, x in zip(names, case(torch.float32, 2, 3, 1, 5, 4, 8)[0], strict=True)
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (_with(query=torch.ones(2, 5, 8)), r"query must be \[B, H, N, D\]"),
        (_with(key=torch.ones(2, 1, 6, 8)), r"key \[B, Hk, N, D\]"),
        (_with(key=torch.ones(2, 1, 5, 8).double()), "key must have the dtype"),
        (_with(key_weight=torch.ones(7)), "key_weight must be a vector"),
        (_with(cos=torch.ones(6, 4), sin=torch.ones(6, 4)), r"cos and sin must be \[P, 4\] with P <= 5"),
        (_with(sin=torch.ones(4, 3)), "cos and sin must be"),
        (case(torch.float32, 2, 3, 1, 5, 4, 7)[0], "the width D of a head must be even, got 7"),
    ],
)
def test_bad_input(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match="rotary_qk_norm: .*" + message):
        rotary_qk_norm(*inputs)


def test_bad_tangents() -> None:
    inputs, (q_t, k_t) = case(torch.float32, 3, 3, 1, 5, 4, 8)
    with pytest.raises(ValueError, match="query_t"):
        rotary_qk_norm_jvp(*inputs, q_t[:, :, :4], k_t)
    with pytest.raises(ValueError, match="samples"):
        rotary_qk_norm_jvp(*inputs, q_t[:2], k_t[:1])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory contains NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_gradients_of_keys_without_queries_are_written(poisoned: None) -> None:
    """Without query heads the kernel never ran, and the keys' gradients were uninitialised memory."""
    query, key, weight = torch.empty(2, 0, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(8)
    cos, sin, grad = torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 2, 5, 8)

    def gradients(query: Tensor) -> tuple[Tensor, Tensor]:
        k, w = key.clone().requires_grad_(), weight.clone().requires_grad_()
        out = rotary_qk_norm(query, k, weight, w, cos, sin)[1]
        return torch.autograd.grad(out, (k, w), grad)

    for got, want in zip(gradients(query), gradients(key), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
