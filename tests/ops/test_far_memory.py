"""Elements more than 2^31 from the first: no offset is computed in 32 bits.

The tensors are views of one buffer of which only a few pages are touched; the rest takes no memory. Results
equal those of dense copies, bit for bit.
"""

from typing import Any

import pytest
import torch
from helpers.attention import Problem, Shape, gradients, gradients_of_both, problem
from helpers.elementwise import normal, results
from torch import Tensor

from pmf import ops

FAR = 2**31
ROOM = 2**16  # for one tensor, were it dense
ALIGNED = 64  # elements: strides that every kernel treats as it does dense ones


class Far:
    """Copies of small tensors whose last entry along a dimension lies past element FAR."""

    def __init__(self, axis: int) -> None:
        self._buffer = torch.empty(FAR + FAR // 8, dtype=torch.bfloat16)
        self._axis, self._used = axis, 0

    def __call__(self, x: Tensor) -> Tensor:
        assert x.numel() < ROOM and x.shape[self._axis] > 1
        strides = list(x.contiguous().stride())
        strides[self._axis] = (FAR // (x.shape[self._axis] - 1) // ALIGNED + 1) * ALIGNED
        view = self._buffer.as_strided(x.shape, strides, self._used)
        self._used += ROOM
        return view.copy_(x)


def assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("axis", [0, 1])
def test_elementwise(level: str, axis: int) -> None:
    x, y, x_t, y_t = normal(*[(3, 4, 40)] * 4)
    query, key, query_t, key_t = normal(*[(2, 3, 4, 8)] * 4)
    weight, head_weight, angles = normal((40,), (8,), (4, 4))
    calls = (
        ("swiglu", (x, y), (x_t, y_t), 0),
        ("rms_norm", (x, weight), (x_t, weight), 0),
        ("gated_residual", (x, y, weight), (x_t, y_t, weight), 0),
        (
            "rotary_qk_norm",
            (query, key, head_weight, head_weight, angles.cos(), angles.sin()),
            (query_t, key_t),
            2,
        ),
    )
    far = Far(axis)
    for name, inputs, tangents, constants in calls:
        near = [[x.bfloat16() for x in given] for given in (inputs, tangents)]
        away = [[far(x) if x.dim() > 2 else x for x in given] for given in near]
        found, expected = (results(ops, name, *given, torch.bfloat16, constants) for given in (away, near))
        for what, tensors in expected.items():
            assert_same(found[what], tensors)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_attention(level: str, axis: int) -> None:
    p = problem(Shape(2, 4, 2, 17, 33, 8, 8)).to(torch.bfloat16)
    mask = normal((2, 4, 17, 33))[0].bfloat16()
    far = Far(axis)
    passes = []
    for given, bias in ((p, mask), (Problem(*map(far, p)), far(mask))):
        options = {"attn_mask": bias, "enable_gqa": True}
        values = ops.attention_jvp(*given[:6], **options)
        both = gradients_of_both(ops, given, **options)
        passes.append((*values, *gradients(ops, given, **options), *both))
    assert_same(*passes)


def embedded(images: Tensor, images_t: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (images, images_t, down, up)]
    tokens = ops.patch_embed_jvp(leaves[0], leaves[2], None, leaves[3], None, None, None, leaves[1])
    return *tokens, *torch.autograd.grad(tokens, leaves, [x.detach() for x in tokens])


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_images(level: str, axis: int) -> None:
    shapes = (2, 3, 8, 8), (2, 3, 8, 8), (8, 3, 4, 4), (16, 8)
    images, images_t, down, up = (x.bfloat16() for x in normal(*shapes))
    far = Far(axis)
    assert_same(embedded(far(images), far(images_t), down, up), embedded(images, images_t, down, up))
    tokens, t = normal((2, 4, 48))[0].bfloat16(), torch.tensor([0.3, 0.7])
    found, expected = (
        ops.patch_velocity_jvp(tokens, z, t, tokens, z_t, None)
        for z, z_t in ((far(images), far(images_t)), (images, images_t))
    )
    assert_same(found, expected)
