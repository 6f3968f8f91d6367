"""Every kernel family under other devices' plans: 99, 163 and 227 KB per block, 4 and 132 processors."""

import itertools
import os

import pytest
import torch
from helpers import emulator
from helpers.attention import Shape, gradients, gradients_of_both, shaped
from helpers.levels import PTX, at_level
from helpers.ops import CASES
from helpers.tolerance import assert_close, spread, tolerance

from pmf import _library, ops, reference

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))

DEVICES = list(itertools.product((99, 163, 227), (4, 132)))
BF16 = torch.bfloat16


@pytest.mark.parametrize(("shared_kb", "processors"), DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_ops(name: str, shared_kb: int, processors: int) -> None:
    case = CASES[name]
    args = (*case.args, *case.directions())
    plain, jvp = case.plain(reference)(*case.args), case.jvp(reference)(*args)
    with at_level("emulated"), emulator.limits(shared_kb, processors):
        found = case.plain(ops)(*(x.float() for x in case.args))
        found_jvp = case.jvp(ops)(*(x.float() for x in args))
    limit = 4 * tolerance(case.kind, torch.float32)
    assert_close(found, plain, limit)
    assert_close(found_jvp, jvp, limit)


@pytest.mark.parametrize(("shared_kb", "processors"), DEVICES)
def test_optimizer(shared_kb: int, processors: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in ((40, 60), (60, 40), (7, 200))]
    average, parameter = torch.randn(9, 5, generator=generator), torch.randn(9, 5, generator=generator)
    mean = (average.double() + parameter.double()) / 2
    with at_level("emulated"), emulator.limits(shared_kb, processors):
        found = ops.newton_schulz(matrices, compute_dtype=torch.float32)
        torch.ops.pmf.ema_update([average], [parameter], [0.5])
    assert_close(found, [reference.newton_schulz(x.double()) for x in matrices], 2e-5)
    assert_close(average, mean, tolerance("elementwise", torch.float32))


@pytest.mark.parametrize("shared_kb", [99, 163])
def test_patch_embed_in_16_bits(shared_kb: int) -> None:
    """One kernel for both products where its 112 KB fit, apart from the prefix; else one for each."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 16, 16), (32, 3, 4, 4), (32,), (48, 32), (48,), (21, 48), (2, 5, 48)
    args = [torch.randn(shape, generator=generator).to(BF16) for shape in shapes]
    before = emulator.launches()
    with at_level("emulated"), emulator.limits(shared_kb, 4):
        found = ops.patch_embed(*args)
    assert emulator.launches() - before == (2 if shared_kb > 112 else 3)
    assert_close(found, reference.patch_embed(*(x.double() for x in args)), tolerance("gemm", BF16))


@pytest.mark.parametrize(
    ("shared_kb", "processors", "hopper"), [*((*device, None) for device in DEVICES), (227, 132, False)]
)
@pytest.mark.parametrize("width", [64, 80, 128])
def test_attention(width: int, shared_kb: int, processors: int, hopper: bool | None) -> None:
    p, values, plain, both = shaped(Shape(1, 2, 1, 80, 130, width, width), BF16)
    with at_level("emulated"), emulator.limits(shared_kb, processors, hopper):
        found = ops.attention_jvp(*p[:6])
        grads, grads_of_both = gradients(ops, p), gradients_of_both(ops, p)
    assert_close(found, values, tolerance("attention", BF16) * spread(values[0]))
    limit = tolerance("attention gradient", BF16) * (1 + 3 * (max(map(spread, plain)) - 1))
    assert_close(grads, plain, limit)
    assert_close(grads_of_both, both, limit)


@pytest.mark.parametrize("backend", ["emulated", *(PTX if os.environ.get("PMF_PTX") == "all" else ())])
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize(
    ("width", "tokens", "masked"), [(64, 276, False), (80, 276, False), (128, 200, False), (64, 150, True)]
)
def test_plans_without_hopper(width: int, tokens: int, masked: bool, tangent: bool, backend: str) -> None:
    """With an H100's shared memory, tiles of 48 keys at width 64 and several blocks a multiprocessor: the
    mma.sync kernels of a newer GPU, and on an H100 those of masks."""
    heads, shared_kb, processors = 4, 227, 132
    if (plans := _library.introspection()) is not None and not masked:
        (planned,) = plans.attention_launches(
            batch=1, heads=heads, key_heads=heads, queries=tokens, keys=tokens, width=width,
            value_width=width, tangent=tangent, shared_per_block=shared_kb * 1024,
            shared_per_processor=(shared_kb + 1) * 1024, processors=processors, compute_capability=(10, 0),
        )["launches"]  # fmt: skip
        assert planned["blocks"] > heads and planned["tile"][1] == (48 if width == 64 else 32)
        assert planned["threads"] * planned["blocks_per_processor"] >= 32 * (12 if width <= 80 else 8)
    p, values, *_ = shaped(Shape(1, heads, heads, tokens, tokens, width, width), BF16)
    mask = torch.ones(tokens, tokens, dtype=torch.bool) if masked else None
    before = emulator.warpgroup_products()
    with at_level(backend), emulator.limits(shared_kb, processors, hopper=masked):
        if tangent:
            found = ops.attention_jvp(*p[:6], attn_mask=mask)
        else:
            found = (ops.attention(*p[:3], attn_mask=mask),)
    assert emulator.warpgroup_products() == before
    assert_close(found, values[: len(found)], tolerance("attention", BF16))
