"""patch_velocity against float64: levels, dtypes, sizes, few tangents, the clip, saved tensors, bad input."""

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
    normal,
)
from helpers.levels import CPU_LEVELS, EVERYWHERE, LEVELS, at_level
from helpers.tolerance import assert_close, tolerance
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pmf import reference
from pmf.ops import patch_velocity, patch_velocity_jvp
from pmf.reference.patch_velocity import to_images


def inputs(
    batch: int, channels: int, patch: int, rows: int, columns: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, images and times inside the clip's bounds, where the derivative is continuous."""
    tokens, images, t = normal(
        (batch, rows * columns, patch * patch * channels),
        (batch, channels, rows * patch, columns * patch),
        (batch,),
        seed=seed,
    )
    return tokens, images, 0.1 + 0.8 * torch.sigmoid(t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    x, x_t = ([y.to(dtype) for y in inputs(3, 3, 16, 4, 4, seed)] for seed in (0, 2))
    check(name, "patch_velocity", x, x_t, terms=2)  # the gradient of t has three entries


@few_examples
@given(st.sampled_from(LEVELS), dtypes(), *[st.integers(1, 4)] * 5)
def test_sizes(level, dtype, batch, channels, patch, rows, columns) -> None:
    x, x_t = ([y.to(dtype) for y in inputs(batch, channels, patch, rows, columns, seed)] for seed in (0, 2))
    check(level, "patch_velocity", x, x_t, terms=FEW_TERMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_16_bit_tokens_with_float32_images(name: str, dtype: torch.dtype) -> None:
    tokens, images, t = inputs(3, 3, 4, 2, 2)
    tokens_t, images_t, t_t = inputs(2, 3, 4, 2, 2, seed=2)
    tokens, tokens_t = tokens.to(dtype), tokens_t.to(dtype)
    images, t, images_t, t_t = (x.float() for x in (images, t, images_t, t_t))
    leaf = tokens.clone().requires_grad_()
    with at_level(name):
        found = patch_velocity_jvp(leaf, images, t, tokens_t, images_t, t_t, detach_tangent=True)
        (gradient,) = torch.autograd.grad(found[0], leaf, images)
    wide = [x.double() for x in (tokens, images, t, tokens_t, images_t, t_t)]
    assert found[0].dtype == found[1].dtype == torch.float32 and gradient.dtype == dtype
    assert_close(found, reference.patch_velocity_jvp(*wide), tolerance("elementwise", torch.float32))
    wide[0].requires_grad_()
    (expected,) = torch.autograd.grad(reference.patch_velocity(*wide[:3]), wide[0], images.double())
    assert_close(gradient, expected, tolerance("elementwise", dtype))


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize(
    ("dtype", "image_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_gradients_of_tokens_and_images_for_fixed_times(
    name: str, dtype: torch.dtype, image_dtype: torch.dtype
) -> None:
    """Those of the kernel: if times have gradients, all come from the reference."""
    tokens, images, t = inputs(3, 3, 4, 2, 2)
    (grad,) = normal(images.shape, seed=1)
    t = torch.cat((t[:1], t.new_tensor([0.01, 1.2])))  # also outside the clip
    given = [tokens.to(dtype), images.to(image_dtype)]
    with at_level(name):
        leaves = [x.clone().requires_grad_() for x in given]
        found = torch.autograd.grad(patch_velocity(*leaves, t), leaves, grad.to(image_dtype))
    exact = [x.double().requires_grad_() for x in given]
    expected = torch.autograd.grad(
        reference.patch_velocity(*exact, t.double(), 0.05), exact, grad.to(image_dtype).double()
    )
    for one, other, x in zip(found, expected, given, strict=True):
        assert one.dtype == x.dtype
        assert_close(one, other, tolerance("elementwise", x.dtype))


def test_strides(level: str) -> None:
    """Any strides, including an expanded image tangent without memory, and unaligned memory."""
    tokens, images, t = (x.float() for x in inputs(2, 3, 8, 3, 2))
    strided = tokens.mT.contiguous().mT, images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), t
    assert torch.equal(patch_velocity(*strided), patch_velocity(tokens, images, t))
    shifted = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in (tokens, images)]
    assert torch.equal(patch_velocity(*shifted, t), patch_velocity(tokens, images, t))
    zero = torch.zeros(()).expand_as(images)
    found = patch_velocity_jvp(*strided, tokens, zero, t)[1]
    assert torch.equal(found, patch_velocity_jvp(tokens, images, t, tokens, None, t)[1])


@pytest.mark.parametrize("patch", [1, 16])  # one pixel at a time, and vectors
@pytest.mark.parametrize("name", CPU_LEVELS)
def test_rounding_to_bfloat16(name: str, patch: int) -> None:
    """Around every bfloat16 and every tie, to nearest, ties to even; denormals may become zero."""
    high, low = torch.arange(-(1 << 15), 1 << 15) << 16, torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    images = (high | low[:, None]).int().view(torch.float32).view(1, 1, -1, 512)
    pixels = images.view(-1, patch, 512 // patch, patch).transpose(1, 2).reshape(1, -1, patch**2)
    tokens, t = torch.zeros_like(pixels, dtype=torch.bfloat16).requires_grad_(), torch.ones(1)
    with at_level(name):
        (found,) = torch.autograd.grad(patch_velocity(tokens, images, t), tokens, images)
    want = -pixels.bfloat16()
    flushed = (pixels.abs() < torch.finfo(torch.float32).tiny) & (found == 0)
    torch.testing.assert_close(found[~flushed], want[~flushed], rtol=0, atol=0, equal_nan=True)


def test_first_samples() -> None:
    check_first_samples("patch_velocity", inputs(4, 2, 2, 2, 3), inputs(4, 2, 2, 2, 3, seed=2), shared=set())


def test_bitwise_repeatable(threads: None) -> None:
    x, x_t = ([y.float() for y in inputs(8, 3, 16, 8, 8, seed)] for seed in (0, 2))
    check_repeatable("patch_velocity", x, x_t)


def test_times_outside_the_clip_have_no_derivative() -> None:
    tokens, images, _ = inputs(4, 1, 2, 1, 1)
    t = torch.tensor([0.0, 0.05, 1.0, 1.5]).double()
    one, zero = torch.ones_like(t), torch.zeros_like(images)
    v, v_t = patch_velocity_jvp(tokens, images, t, torch.zeros_like(tokens), zero, one)
    x = to_images(tokens, 1, 2, 2)
    clipped = torch.tensor([0.05, 0.05, 1.0, 1.0]).double()[:, None, None, None]
    torch.testing.assert_close(v, (images - x) / clipped)
    torch.testing.assert_close(v_t[1:3], (-v / clipped)[1:3])
    assert not v_t[[0, 3]].any()


def test_backward_saves_only_times() -> None:
    tokens, images, t = (x.float().requires_grad_(i == 0) for i, x in enumerate(inputs(4, 3, 4, 2, 2)))
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        patch_velocity(tokens, images, t)
        patch_velocity_jvp(tokens, images, t, tokens[:2], images[:2], t[:2], detach_tangent=True)
    assert kept and all(x.numel() <= len(t) for x in kept)


@pytest.mark.parametrize("batch", [0, 2])
def test_empty(batch: int) -> None:
    tokens, images, t = torch.zeros(batch, 4, 12), torch.zeros(batch, 3, 4, 4), torch.ones(batch)
    v, v_t = patch_velocity_jvp(tokens, images, t, tokens[:0], images[:0], t[:0])
    assert v.shape == images.shape and len(v_t) == 0


@pytest.mark.parametrize(
    ("tokens", "images", "t", "message"),
    [
        ((2, 4, 12), (2, 3, 4), (2,), r"tokens must be \[B, N, p p C\] and images \[B, C, H, W\]"),
        ((2, 4, 13), (2, 3, 4, 4), (2,), "are not .* for patches of images"),
        ((2, 5, 12), (2, 3, 4, 4), (2,), "are not .* for patches of images"),
        ((2, 4, 12), (2, 3, 5, 4), (2,), "are not .* for patches of images"),
        ((3, 4, 12), (2, 3, 4, 4), (2,), "must have the same batch size, got 3 and 2"),
        ((2, 4, 12), (2, 3, 4, 4), (3,), r"t must be \[2\], got \[3\]"),
    ],
)
def test_bad_input(tokens, images, t, message: str) -> None:
    with pytest.raises(ValueError, match="patch_velocity: .*" + message):
        patch_velocity(torch.zeros(tokens), torch.zeros(images), torch.ones(t))


def test_bad_dtype_floor_and_tangent() -> None:
    tokens, images, t = torch.zeros(2, 4, 12), torch.zeros(2, 3, 4, 4), torch.ones(2)
    with pytest.raises(ValueError, match="patch_velocity: images must have the dtype of tokens"):
        patch_velocity(tokens, images.double(), t)
    with pytest.raises(ValueError, match="patch_velocity: floor must be positive, got 0"):
        patch_velocity(tokens, images, t, 0.0)
    with pytest.raises(ValueError, match="patch_velocity_jvp: tokens_t must have the shape of"):
        patch_velocity_jvp(tokens, images, t, tokens[:, :2], images, t)
