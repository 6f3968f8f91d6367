"""patch_embed: accuracy in every dtype, shapes and strides, tangents of the first samples, gradients."""

import pytest
import torch
from helpers import levels
from helpers.elementwise import FEW_TERMS
from helpers.levels import at_level
from helpers.tolerance import assert_close, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import pmf.ops as ops
import pmf.reference as reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# On the CPU the op uses torch's GEMM, the same at all levels.
EVERYWHERE = tuple(name for name in levels.EVERYWHERE if name not in levels.CPU_LEVELS[:-1])


def inputs(batch=3, channels=3, rows=4, columns=4, patch=4, rank=32, width=48, prefix=5, dtype=torch.float64):
    """The op's seven arguments, the weights scaled as layers are initialised."""
    generator = torch.Generator().manual_seed(0)

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    down = r(rank, channels, patch, patch) / (channels * patch * patch) ** 0.5
    up = r(width, rank) / rank**0.5
    images, tokens = r(batch, channels, rows * patch, columns * patch), rows * columns
    args = (images, down, r(rank), up, r(width), r(prefix + tokens, width), r(batch, prefix, width))
    return tuple(x.to(dtype) for x in args)


def jvp(module, args, images_t, prefix_t, **options):
    return module.patch_embed_jvp(*args, images_t, prefix_t, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", EVERYWHERE)
@pytest.mark.parametrize("sizes", [{}, {"rows": 9, "columns": 17, "patch": 2, "rank": 136, "width": 200}])
def test_values_tangents_and_gradients(sizes, level, dtype):
    """In 16 bits each GEMM rounds its result once: the down product before the up product reads it."""
    args = [x.requires_grad_() for x in inputs(**sizes, dtype=dtype)]
    images_t, prefix_t = (torch.randn_like(args[i]).requires_grad_() for i in (0, 6))
    exact = [x.detach().double().requires_grad_() for x in (*args, images_t, prefix_t)]
    with at_level(level):
        actual = jvp(ops, args, images_t, prefix_t)
        cotangents = [torch.randn_like(y) for y in actual]
        found = torch.autograd.grad(actual, [*args, images_t, prefix_t], cotangents)
    expected = jvp(reference, exact[:7], *exact[7:])
    assert_close([x.detach() for x in actual], [x.detach() for x in expected], tolerance("gemm", dtype))
    wanted = torch.autograd.grad(expected, exact, [c.double() for c in cotangents])
    assert_close(found, wanted, 1.5 * tolerance("gemm", dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", EVERYWHERE)
@pytest.mark.parametrize("sizes", [{}, {"rows": 3, "columns": 5, "patch": 3, "rank": 20, "width": 30}])
def test_float32_pixels_with_16_bit_weights(sizes, level, dtype):
    images, *args = inputs(**sizes)
    args = [x.to(dtype).requires_grad_() for x in args]
    images, images_t = (x.float().requires_grad_() for x in (images, torch.randn_like(images)))
    prefix_t = torch.randn_like(args[-1]).requires_grad_()
    given = [images, *args, images_t, prefix_t]
    exact = [x.detach().double().requires_grad_() for x in given]
    with at_level(level):
        actual = jvp(ops, given[:7], images_t, prefix_t)
        cotangents = [torch.randn_like(y) for y in actual]
        found = torch.autograd.grad(actual, given, cotangents)
        assert torch.equal(actual[0], ops.patch_embed(*given[:7]))
    expected = jvp(reference, exact[:7], *exact[7:])
    wanted = torch.autograd.grad(expected, exact, [c.double() for c in cotangents])
    assert [y.dtype for y in actual] == [dtype, dtype]
    assert [g.dtype for g in found] == [x.dtype for x in given]
    limit = 1.5 * tolerance("gemm", dtype)  # the pixels are rounded too
    assert_close([y.detach() for y in actual], [y.detach() for y in expected], limit)
    assert_close(found, wanted, limit)


@pytest.mark.parametrize("level", EVERYWHERE)
@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (17, 64), (63, 72), (64, 80), (65, 96), (276, 128)])
def test_lengths_and_widths(tokens, width, level):
    args = inputs(1, 3, 1, tokens, 2, 16, width, 4, torch.bfloat16)
    images_t, prefix_t = torch.randn_like(args[0]), torch.randn_like(args[6])
    leaves = [x.requires_grad_() for x in args]
    exact = [x.detach().double().requires_grad_() for x in args]
    with at_level(level):
        actual = jvp(ops, leaves, images_t, prefix_t)
        cotangents = [torch.randn_like(y) for y in actual]
        found = torch.autograd.grad(actual, leaves, cotangents)
    expected = jvp(reference, exact, images_t.double(), prefix_t.double())
    wanted = torch.autograd.grad(expected, exact, [c.double() for c in cotangents])
    limit = 1.5 * tolerance("gemm", torch.bfloat16)
    assert_close([x.detach() for x in actual], [x.detach() for x in expected], limit)
    assert_close(found, wanted, limit)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    channels=st.sampled_from((1, 3)),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    patch=st.integers(1, 5),
    rank=st.integers(1, 9),
    width=st.integers(1, 9),
    prefix=st.integers(0, 3),
    layout=st.sampled_from(("contiguous", "channels last", "flipped sizes", "cropped")),
    which=st.sampled_from(("all tokens", "image tokens", "none")),
    biases=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    level=st.sampled_from([name for name in EVERYWHERE if name not in levels.PTX]),
)
def test_any_shape_and_layout(
    batch, channels, rows, columns, patch, rank, width, prefix, layout, which, biases, dtype, level
):
    args = list(inputs(batch, channels, rows, columns, patch, rank, width, prefix, dtype))
    if layout == "channels last":
        args[0] = args[0].contiguous(memory_format=torch.channels_last)
    elif layout == "flipped sizes":
        args[0] = args[0].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    elif layout == "cropped":
        args[0] = torch.nn.functional.pad(args[0], (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    if not biases:
        args[2] = args[4] = None
    if which != "all tokens":
        args[5] = args[5][prefix:] if which == "image tokens" else None
    if prefix == 0:
        args[6] = None
    images_t = torch.randn_like(args[0])
    prefix_t = None if prefix == 0 else torch.randn_like(args[6])
    exact = [None if x is None else x.double() for x in (*args, images_t, prefix_t)]
    with at_level(level):
        tokens, both = ops.patch_embed(*args), jvp(ops, args, images_t, prefix_t)
    limit = FEW_TERMS * tolerance("gemm", dtype)
    assert tokens.is_contiguous()
    assert_close(tokens, reference.patch_embed(*exact[:7]), limit)
    assert_close(both, jvp(reference, exact[:7], *exact[7:]), limit)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_tangents_of_the_first_samples(count):
    args = inputs()
    images_t, prefix_t = torch.randn_like(args[0]), torch.randn_like(args[6])
    tokens, tokens_t = jvp(ops, args, images_t[:count], prefix_t[:count], detach_tangent=True)
    expected, expected_t = jvp(reference, args, images_t, prefix_t)
    assert_close((tokens, tokens_t), (expected, expected_t[:count]), 1e-12)


def test_images_that_need_no_gradient_cost_none():
    """In training the images are data: their gradient, as costly as the forward, is not computed."""
    wanted = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.pmf.patch_embed_backward.default:
                wanted.append(args[-1])
            return function(*args, **(kwargs or {}))

    for images_need_gradient in (False, True):
        args = [x.requires_grad_() for x in inputs()]
        args[0].requires_grad_(images_need_gradient)
        given = [x for x in args if x.requires_grad]
        with Spy():
            found = torch.autograd.grad(ops.patch_embed(*args).square().sum(), given)
        assert_close(found, torch.autograd.grad(reference.patch_embed(*args).square().sum(), given), 1e-12)
    assert wanted == [False, True]


def test_an_empty_batch():
    args = list(inputs(batch=1))
    args[0], args[6] = args[0][:0], args[6][:0]
    assert ops.patch_embed(*args).shape == (0, 21, 48)
