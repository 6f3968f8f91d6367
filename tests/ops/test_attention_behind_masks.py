"""Values hidden by a mask have no effect, even if they are NaN: padding is often uninitialised memory.

The result must be bit-identical to that with finite numbers in the hidden places.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.attention import DTYPES, Problem, Shape, gradients, gradients_of_both, problem
from helpers.levels import CPU_LEVELS, at_level
from helpers.tolerance import assert_close, tolerance
from torch import Tensor

from pmf import ops, reference

QUERIES, KEYS = 131, 150  # more than one panel and tile at every level; an odd number leaves half a pair
SHAPE = Shape(2, 4, 2, QUERIES, KEYS, 24, 40)
GARBAGE = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e4])


@pytest.fixture(params=CPU_LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param):
        yield request.param


def padded() -> Tensor:
    """A padding mask with a different length per sample: [B, 1, 1, Nk]."""
    return (torch.arange(KEYS) < torch.tensor([[97], [130]]))[:, None, None]


def some_rows_see_nothing() -> Tensor:
    keep = torch.rand(2, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[:, :, 40:60] = False
    keep[1] = False
    return keep & padded()


MASKS: dict[str, Callable[[], dict]] = {
    "causal, more keys than queries": lambda: {"is_causal": True},
    "boolean [B, 1, 1, Nk]": lambda: {"attn_mask": padded()},
    "additive [B, 1, 1, Nk]": lambda: {
        "attn_mask": torch.zeros(2, 1, 1, KEYS).masked_fill(~padded(), -torch.inf)
    },
    "boolean [Nq, Nk]": lambda: {"attn_mask": torch.arange(KEYS).expand(QUERIES, KEYS) % 7 > 2},
    "rows that see nothing": lambda: {"attn_mask": some_rows_see_nothing()},
    "rows that see nothing, causal": lambda: {"attn_mask": some_rows_see_nothing(), "is_causal": True},
}


def seen(attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """[B, 1, Nq, Nk]"""
    keep = torch.ones(2, 1, QUERIES, KEYS, dtype=torch.bool)
    if attn_mask is not None:
        keep = keep & (attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf)
    return keep.tril() if is_causal else keep


def spoiled(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, H, N, D] with garbage in `rows` [B, 1, N]: in a whole row, or in one element."""
    g = torch.Generator().manual_seed(3)
    garbage = GARBAGE[torch.randint(len(GARBAGE), x.shape, generator=g)].to(x.dtype)
    few = torch.rand(x.shape, generator=g) < 0.1
    few[..., 0] = True
    whole = torch.arange(x.shape[2])[:, None] % 2 == 0
    return torch.where(rows[..., None] & (whole | few), garbage, x)


def everything(module, p: Problem, **options) -> list[Tensor]:
    both = module.attention_jvp(*p[:6], **options)
    return [*both, *gradients(module, p, **options), *gradients_of_both(module, p, **options)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_keys_hidden_from_all_queries_have_no_effect(level, mask, dtype):
    options = MASKS[mask]()
    p = problem(SHAPE).to(dtype)
    keep = seen(**options)
    if options.get("attn_mask") is not None and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    hidden, idle = ~keep.any(-2), ~keep.any(-1)
    assert hidden.any()
    dirty = Problem(*(spoiled(x, idle if x.shape[1:3] == p.query.shape[1:3] else hidden) for x in p))
    assert not all(bool(x.isfinite().all()) for x in dirty)
    clean, actual = (everything(ops, x, enable_gqa=True, **options) for x in (p, dirty))
    for a, c in zip(actual, clean, strict=True):
        assert torch.equal(a, c)
    for grad in (actual[3], actual[4], actual[6], actual[7], actual[9], actual[10]):
        assert (grad[hidden.expand(2, 2, KEYS)] == 0).all()


def packed() -> Tensor:
    """Packed sequences of 50 as a mask: [Nq, Nk]."""
    which = torch.arange(KEYS) // 50
    return which[:QUERIES, None] == which


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(1, 6))
@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_seen_by_some_queries_affect_only_those(level, which, is_causal, dtype):
    """A key of the second sequence is NaN, which must not affect queries of other sequences."""
    if which == 3:
        return  # the tangent of a query
    options = {"attn_mask": packed(), "is_causal": is_causal, "enable_gqa": True}
    p = problem(SHAPE).to(dtype)
    dirty = p._replace(**{p._fields[which]: p[which].clone()})
    dirty[which][:, :, 70, 3] = torch.nan
    out, out_t = ops.attention_jvp(*p[:6], **options)
    actual, actual_t = ops.attention_jvp(*dirty[:6], **options)
    hit = packed()[:, 70] & (torch.arange(QUERIES) >= 70 if is_causal else True)
    assert torch.equal(actual[:, :, ~hit], out[:, :, ~hit])
    assert torch.equal(actual_t[:, :, ~hit], out_t[:, :, ~hit])
    assert actual_t[:, :, hit].isnan().any(-1).all()
    assert actual[:, :, hit].isnan().any(-1).all() == (which < 3)
    limit = tolerance("attention gradient", dtype)
    clean, both = gradients_of_both(ops, p, **options), gradients_of_both(ops, dirty, **options)
    for a, c, rows in zip(both, clean, (hit, packed()[70], packed()[70]) * 2, strict=True):
        assert_close(a[:, :, ~rows[: a.shape[2]]], c[:, :, ~rows[: a.shape[2]]], limit)
    assert both[0][:, :, hit].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_queries_with_zero_gradients_have_no_effect(level, dtype):
    """Self-attention over padding: queries are NaN there too, and the loss ignores their outputs."""
    p = problem(Shape(2, 4, 4, KEYS, KEYS, 24, 24)).to(dtype)
    padding = ~padded()[:, 0]
    grads = [x.masked_fill(padding[..., None], 0) for x in p[6:]]
    p = Problem(*p[:6], *grads)
    dirty = Problem(*(spoiled(x, padding) for x in p[:6]), *grads)
    clean, actual = (everything(ops, x, attn_mask=padded())[2:] for x in (p, dirty))
    assert_close(actual, clean, tolerance("attention gradient", dtype))


def test_reference_and_its_gradients():
    """The paths that the kernels do not cover (a mask's gradient, second-order gradients) behave the same."""
    for mask in MASKS.values():
        options = mask()
        keep = seen(**options)
        p = problem(SHAPE)
        hidden, idle = ~keep.any(-2), ~keep.any(-1)
        dirty = Problem(*(spoiled(x, idle if x.shape[1:3] == p.query.shape[1:3] else hidden) for x in p))
        clean, actual = (everything(reference, x, enable_gqa=True, **options) for x in (p, dirty))
        for a, c in zip(actual, clean, strict=True):
            assert torch.equal(a, c)


def test_a_masks_gradient_behind_it():
    p = problem(SHAPE)
    mask = torch.zeros(2, 1, 1, KEYS, dtype=torch.float64).masked_fill(~padded(), -torch.inf).requires_grad_()
    dirty = Problem(*(spoiled(x, ~padded()[:, 0]) if x.shape[2] == KEYS else x for x in p))
    clean, actual = (
        torch.autograd.grad(ops.attention(*x[:3], mask, enable_gqa=True), mask, p.grad)[0] for x in (p, dirty)
    )
    assert torch.equal(actual, clean)
    assert actual.isfinite().all()
