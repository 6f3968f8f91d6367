"""attention: mask gradients, broadcasting of masks, and the surrounding code under torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerance import assert_close, tolerance

import pmf.ops as ops
import pmf.reference as reference

EXACT = 1e-12


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def energy(module, mask, *inputs):
    return module.attention(*inputs, mask).square().sum()


def test_additive_mask_gets_its_gradient():
    inputs, mask = (random(2, 3, 4, 5), random(2, 3, 6, 5), random(2, 3, 6, 5)), random(3, 1, 6)
    expected = torch.func.grad(lambda m: energy(reference, m, *inputs))(mask)
    leaf = mask.clone().requires_grad_()
    energy(ops, leaf, *inputs).backward()
    assert_close(leaf.grad, expected, EXACT)
    assert_close(torch.func.grad(lambda m: energy(ops, m, *inputs))(mask), expected, EXACT)
    compiled = torch.compile(lambda m: energy(ops, m, *inputs), fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(leaf), leaf), expected, EXACT)


def test_additive_mask_gets_its_gradient_where_vmap_hides_that_it_needs_one():
    """A batched tensor reports requires_grad=False even if an outer torch.func.grad differentiates it."""
    inputs, masks = (random(1, 1, 4, 5), random(1, 1, 6, 5), random(1, 1, 6, 5)), random(3, 4, 6)
    actual, expected = (
        torch.func.grad(lambda m, f=f: torch.func.vmap(lambda one: energy(f, one, *inputs))(m).sum())(masks)
        for f in (ops, reference)
    )
    assert_close(actual, expected, EXACT)


def test_additive_mask_gets_its_tangent():
    inputs, mask = (random(1, 2, 4, 5), random(1, 2, 6, 5), random(1, 2, 6, 5)), random(4, 6)
    tangent = random(4, 6)
    actual, expected = (
        torch.func.jvp(lambda m, f=f: f.attention(*inputs, m), (mask,), (tangent,))[1]
        for f in (ops, reference)
    )
    assert_close(actual, expected, EXACT)


def test_jvp_op_with_a_mask_that_needs_a_gradient():
    inputs = [random(1, 2, 4, 5) for _ in range(6)]
    for detach in (False, True):
        mask = random(4, 4).requires_grad_()
        out, out_t = ops.attention_jvp(*inputs, mask, detach_tangent=detach)
        assert out_t.requires_grad is not detach
        expected = reference.attention_jvp(*inputs, mask)
        assert_close((out, out_t), expected, EXACT)
        loss = out.square().sum() + (0 if detach else out_t.square().sum())
        value = expected[0].square().sum() + (0 if detach else expected[1].square().sum())
        assert_close(torch.autograd.grad(loss, mask), torch.autograd.grad(value, mask), EXACT)


@pytest.mark.parametrize(
    ("query", "key", "gqa"),
    [
        ((5, 4), (7, 4), False),
        ((3, 5, 4), (3, 7, 4), False),
        ((3, 5, 4), (1, 7, 4), False),
        ((1, 3, 5, 4), (2, 3, 7, 4), False),
        ((2, 1, 5, 4), (2, 3, 7, 4), False),
        ((2, 4, 5, 4), (2, 2, 7, 4), True),
        ((2, 1, 4, 5, 4), (1, 3, 2, 7, 4), True),
        ((2, 3, 2, 4, 5, 4), (2, 3, 2, 4, 7, 4), False),
    ],
)
def test_leading_dimensions_broadcast_as_in_torch(query, key, gqa):
    inputs = [random(*query).requires_grad_(), random(*key).requires_grad_(), random(*key).requires_grad_()]
    tangents = [random(*x.shape) for x in inputs]
    out = ops.attention(*inputs, enable_gqa=gqa)
    expected = reference.attention(*inputs, enable_gqa=gqa)
    assert_close(out, expected, EXACT)
    assert_close(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        EXACT,
    )
    assert_close(
        ops.attention_jvp(*inputs, *tangents, enable_gqa=gqa),
        reference.attention_jvp(*inputs, *tangents, enable_gqa=gqa),
        EXACT,
    )
    if len(query) == 4 and query[:2] == key[:2]:
        assert_close(out, F.scaled_dot_product_attention(*inputs), EXACT)


def test_output_keeps_the_memory_order_of_the_query():
    """The model's [B, N, H, D] buffers, viewed as [B, H, N, D], give outputs that flatten without a copy."""
    query = torch.randn(2, 7, 3, 8).transpose(1, 2)
    assert ops.attention(query, query, query).transpose(1, 2).is_contiguous()
    assert ops.attention(*[query.contiguous()] * 3).is_contiguous()


@pytest.mark.parametrize("grad", [True, False])
def test_outputs_may_be_modified_in_place(grad):
    """Also token-major ones, which are transposed memory, and packed ones."""
    cuts = torch.tensor([0, 2, 4], dtype=torch.int32)

    def token_major(x):
        return ops.attention(*[x.transpose(1, 2)] * 3).transpose(1, 2)

    def with_tangent(x):
        return ops.attention_jvp(*[x.transpose(1, 2)] * 6)[0]

    def packed(x):
        return ops.attention_varlen(*[x[0]] * 3, cuts, cuts)

    x, factor = random(2, 4, 3, 8).requires_grad_(grad), random(8).requires_grad_()
    for function in (token_major, with_tangent, packed):
        expected = torch.autograd.grad((function(x) * factor.detach()).square().sum(), x) if grad else None
        found = function(x).mul_(factor)
        assert_close(found, function(x) * factor, EXACT)
        if grad:
            assert_close(torch.autograd.grad(found.square().sum(), x), expected, EXACT)
    with torch.no_grad():
        out = ops.attention(*[x.transpose(1, 2)] * 3)
    assert out.mul_(factor).requires_grad


def test_compiled_by_inductor_with_its_gradients():
    inputs = [torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(6)]

    def loss(*args):
        out, out_t = ops.attention_jvp(*(x * 1.5 for x in args))
        return (out.sin() + out_t.cos()).sum()

    compiled = torch.compile(loss, fullgraph=True)
    assert_close(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), 1e-5
    )


def test_residuals_of_a_detached_tangent_are_those_of_the_plain_op():
    """A backward that ignores the tangent must not keep the tangent's inputs alive."""
    saved = []
    inputs = [torch.randn(1, 1, 4, 4, requires_grad=True) for _ in range(3)]
    tangents = [torch.randn(1, 1, 4, 4) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        ops.attention_jvp(*inputs, *tangents, detach_tangent=True)
    assert {x.data_ptr() for x in inputs} <= set(saved)
    assert not {x.data_ptr() for x in tangents} & set(saved)
    assert len(saved) == 4  # query, key, value and log-sum-exp


def test_fake_tensors_keep_the_memory_order():
    """opcheck compares strides: token-major inputs, as in the model, give token-major outputs."""
    args = [torch.randn(2, 7, 3, 8).transpose(1, 2) for _ in range(6)]
    torch.library.opcheck(torch.ops.pmf.attention_forward.default, (*args[:3], None, False, 0.5))
    torch.library.opcheck(torch.ops.pmf.attention_jvp_forward.default, (*args, None, False, 0.5))


def test_autocast_leaves_the_reference_in_float32():
    """A mask that requires a gradient uses plain PyTorch code, whose products autocast would round."""
    inputs, mask = (
        [torch.randn(1, 2, 64, 16).bfloat16() for _ in range(3)],
        torch.randn(64, 64, requires_grad=True),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.attention(*inputs, mask)
    exact = reference.attention(*(x.double() for x in inputs), mask.double())
    assert_close(out.detach(), exact.detach(), tolerance("attention", torch.bfloat16))
