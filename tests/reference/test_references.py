"""The references against PyTorch: values by its functions, tangents by its forward mode."""

import pytest
import torch
import torch.nn.functional as F
from helpers.ops import CASES
from helpers.tolerance import assert_close

import pmf.reference as reference

EXACT = 1e-13


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(CASES))
def test_tangent_is_that_of_forward_mode(name):
    """The _jvp form is written by hand; torch.func.jvp of the plain form is independent of it."""
    case = CASES[name]
    tangents = case.directions()
    full = [torch.zeros_like(x) for x in case.args]
    for i, tangent in zip(case.tangents, tangents, strict=True):
        full[i] = tangent
    values, expected = torch.func.jvp(case.plain(reference), case.args, tuple(full))
    values, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (values, expected))
    assert_close(case.jvp(reference)(*case.args, *tangents), (*values, *expected), EXACT)


@pytest.mark.parametrize("name", sorted(CASES))
def test_tangent_can_be_trained_through(name):
    case = CASES[name]
    inputs = [x.clone().requires_grad_() for x in (*case.args, *case.directions())]
    assert torch.autograd.gradcheck(case.jvp(reference), inputs)


def test_attention_equals_torchs():
    query, key, value = random(2, 4, 5, 3), random(2, 4, 7, 3), random(2, 4, 7, 6)
    boolean, additive = torch.rand(5, 7) > 0.3, random(4, 5, 7)
    boolean[:, 0] = True
    for mask in (None, boolean, additive):
        expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.7)
        assert_close(reference.attention(query, key, value, mask, scale=0.7), expected, EXACT)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert_close(reference.attention(query, key, value, is_causal=True), expected, EXACT)
    few = key[:, :2], value[:, :2]
    expected = F.scaled_dot_product_attention(query, *few, enable_gqa=True)
    assert_close(reference.attention(query, *few, enable_gqa=True), expected, EXACT)


def test_attention_rows_without_keys_and_their_gradients_are_zero():
    inputs = [random(1, 1, 3, 2).requires_grad_() for _ in range(6)]
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    out, out_t = reference.attention_jvp(*inputs, mask)
    assert (out[..., 1, :] == 0).all() and (out_t[..., 1, :] == 0).all()
    grads = torch.autograd.grad(out.sum() + out_t.sum(), inputs)
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][..., 1, :] == 0).all() and (grads[3][..., 1, :] == 0).all()
    empty = reference.attention(inputs[0], inputs[1][..., :0, :], inputs[2][..., :0, :])
    assert empty.shape == (1, 1, 3, 2) and (empty == 0).all()


def test_elementwise_values_equal_torchs():
    x, y, weight = random(2, 3, 8), random(2, 3, 8), random(8)
    assert_close(reference.rms_norm(x, weight), F.rms_norm(x, (8,), weight, eps=1e-6), EXACT)
    assert_close(reference.swiglu(x, y), F.silu(x) * y, EXACT)
    assert_close(reference.gated_residual(x, y, weight), torch.addcmul(x, weight, y), EXACT)


def test_rotation_is_multiplication_of_complex_numbers():
    query, key, angles, one = (
        random(2, 3, 5, 8),
        random(2, 1, 5, 8),
        random(4, 4),
        torch.ones(8, dtype=torch.float64),
    )
    q, k = reference.rotary_qk_norm(query, key, one, one, angles.cos(), angles.sin())
    for x, turned in ((query, q), (key, k)):
        n = F.rms_norm(x, (8,), eps=1e-6)
        expected = n.clone()
        pairs = torch.view_as_complex(n[..., 1:, :].unflatten(-1, (4, 2)).contiguous())
        expected[..., 1:, :] = torch.view_as_real(
            pairs * torch.polar(torch.ones_like(angles), angles)
        ).flatten(-2)
        assert_close(turned, expected, EXACT)


def test_patch_embed_is_two_convolutions():
    images, down, up = random(2, 3, 6, 4), random(5, 3, 2, 2), random(7, 5)
    bias_down, bias_up, position, prefix = random(5), random(7), random(6, 7), random(2, 3, 7)
    hidden = F.conv2d(images, down, bias_down, stride=2)
    tokens = F.conv2d(hidden, up[:, :, None, None], bias_up).flatten(2).mT + position
    actual = reference.patch_embed(images, down, bias_down, up, bias_up, position, prefix)
    assert_close(actual, torch.cat((prefix, tokens), 1), EXACT)
    everywhere = random(9, 7)
    actual = reference.patch_embed(images, down, bias_down, up, bias_up, everywhere, prefix)
    assert_close(actual, torch.cat((prefix, tokens - position), 1) + everywhere, EXACT)
