"""Bad input to an op: one sentence that names the op, the argument and the value."""

import re

import numpy as np
import pytest
import torch

import pmf.ops as ops


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


X = zeros(2, 3, 4)
Q = zeros(2, 4, 5, 8)
IMAGES, DOWN, UP = zeros(2, 3, 8, 8), zeros(5, 3, 4, 4), zeros(6, 5)

CASES = {
    "attention: rank": (lambda: ops.attention(zeros(8), Q, Q), "query must be"),
    "attention: width": (lambda: ops.attention(*[zeros(1, 1, 2, 257)] * 3), "D <= 256, got [1, 1, 2, 257]"),
    "attention: widths differ": (lambda: ops.attention(Q, zeros(2, 4, 5, 7), Q), "the same width"),
    "attention: lengths differ": (lambda: ops.attention(Q, Q, zeros(2, 4, 6, 8)), "the same length"),
    "attention: dtypes differ": (lambda: ops.attention(Q, Q.double(), Q), "the same dtype"),
    "attention: scale tensor": (
        lambda: ops.attention(Q, Q, Q, scale=torch.ones(())),
        "scale must be a number, got a",
    ),
    "attention: scale nan": (
        lambda: ops.attention(Q, Q, Q, scale=float("nan")),
        "scale must be a finite number",
    ),
    "attention: scale text": (lambda: ops.attention(Q, Q, Q, scale=".1"), "a finite number, got '.1'"),
    "attention: causal": (lambda: ops.attention(Q, Q, Q, is_causal="no"), "is_causal must be True or False"),
    "attention: causal tensor": (
        lambda: ops.attention(Q, Q, Q, is_causal=torch.tensor(True)),
        "is_causal must be True or False",
    ),
    "attention_jvp: gqa": (
        lambda: ops.attention_jvp(Q, Q, Q, Q, Q, Q, enable_gqa="no"),
        "enable_gqa must be True or False, got 'no'",
    ),
    "attention: lse": (lambda: ops.attention(Q, Q, Q, return_lse=1), "return_lse must be True or False"),
    "attention: window": (lambda: ops.attention(Q, Q, Q, window=("a", 1)), "window must be (left, right)"),
    "swiglu_jvp: detach": (
        lambda: ops.swiglu_jvp(X, X, X, X, detach_tangent="no"),
        "detach_tangent must be True or False",
    ),
    "rms_norm: eps tensor": (
        lambda: ops.rms_norm(X, zeros(4), torch.ones((), requires_grad=True)),
        "eps must be a number, got a tensor",
    ),
    "rms_norm_jvp: eps": (
        lambda: ops.rms_norm_jvp(X, zeros(4), X, eps=-1.0),
        "eps must be a finite number, at least 0, got -1.0",
    ),
    "rms_norm: no eps": (lambda: ops.rms_norm(X, zeros(4), None), "eps must be a finite number"),
    "rotary_qk_norm: eps": (
        lambda: ops.rotary_qk_norm(Q, Q, zeros(8), zeros(8), zeros(5, 4), zeros(5, 4), float("nan")),
        "eps must be a finite number",
    ),
    "patch_velocity: floor": (
        lambda: ops.patch_velocity(zeros(2, 4, 48), IMAGES, zeros(2), torch.ones(())),
        "floor must be a number, got a tensor",
    ),
    "attention: integers": (lambda: ops.attention(*[Q.long()] * 3), "must be floating-point"),
    "attention: batches differ": (lambda: ops.attention(Q, *[zeros(3, 4, 5, 8)] * 2), "must broadcast"),
    "attention: heads differ": (lambda: ops.attention(Q, *[zeros(2, 2, 5, 8)] * 2), "enable_gqa=True"),
    "attention: odd group": (
        lambda: ops.attention(Q, *[zeros(2, 3, 5, 8)] * 2, enable_gqa=True),
        "a divisor of query's",
    ),
    "attention: dropout": (lambda: ops.attention(Q, Q, Q, dropout_p=0.1), "dropout_p must be 0"),
    "attention: mask shape": (lambda: ops.attention(Q, Q, Q, zeros(5, 6)), "attn_mask [5, 6] must broadcast"),
    "attention: mask dtype": (lambda: ops.attention(Q, Q, Q, zeros(5, 5).long()), "boolean or floating"),
    "attention_jvp: tangent": (
        lambda: ops.attention_jvp(Q, Q, Q, Q[:, :2], None, None),
        "query_t must have the shape of its value [2, 4, 5, 8]",
    ),
    "attention_jvp: samples": (lambda: ops.attention_jvp(Q, Q, Q, Q[:1], Q, None), "same first samples"),
    "attention_jvp: dtype": (lambda: ops.attention_jvp(Q, Q, Q, Q.double(), None, None), "dtype"),
    "rms_norm: weight": (lambda: ops.rms_norm(X, zeros(3)), "weight"),
    "rms_norm: dtype": (lambda: ops.rms_norm(X, zeros(4, dtype=torch.float64)), "dtype"),
    "rms_norm_jvp: tangent": (lambda: ops.rms_norm_jvp(X, zeros(4), zeros(2, 3)), "x_t must have the shape"),
    "swiglu: shapes": (lambda: ops.swiglu(X, zeros(2, 3, 5)), "must have the shape of"),
    "swiglu_jvp: tangent": (lambda: ops.swiglu_jvp(X, X, X, zeros(2, 4)), "up_t must have the shape"),
    "gated_residual: gate": (lambda: ops.gated_residual(X, X, zeros(3)), "gate"),
    "gated_residual: branch": (lambda: ops.gated_residual(X, zeros(2, 3, 5), zeros(4)), "branch"),
    "rotary_qk_norm: odd width": (
        lambda: ops.rotary_qk_norm(*[zeros(1, 1, 2, 3)] * 2, zeros(3), zeros(3), zeros(2, 1), zeros(2, 1)),
        "even",
    ),
    "rotary_qk_norm: table": (
        lambda: ops.rotary_qk_norm(Q, Q, zeros(8), zeros(8), zeros(6, 4), zeros(6, 4)),
        "cos",
    ),
    "patch_embed: size": (lambda: ops.patch_embed(zeros(2, 3, 9, 8), DOWN, None, UP, None), "patch"),
    "patch_embed: channels": (
        lambda: ops.patch_embed(zeros(2, 1, 8, 8), DOWN, None, UP, None),
        "weight_down",
    ),
    "patch_embed: rank": (lambda: ops.patch_embed(IMAGES, DOWN, None, zeros(6, 4), None), "weight_up"),
    "patch_embed: position": (lambda: ops.patch_embed(IMAGES, DOWN, None, UP, None, zeros(3, 6)), "position"),
    "patch_embed_jvp: prefix": (
        lambda: ops.patch_embed_jvp(
            IMAGES, DOWN, None, UP, None, None, None, IMAGES, prefix_t=zeros(2, 1, 6)
        ),
        "prefix_t needs a prefix",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_that_names_the_argument(name):
    call, text = CASES[name]
    with pytest.raises((ValueError, TypeError), match=re.escape(text)) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(name.split(":")[0].removesuffix("_jvp")) and "\n" not in message


def test_numbers_of_other_types_and_windows_beyond_every_key():
    flags = {"is_causal": np.bool_(False), "window": (np.int64(1), 1 << 70), "scale": np.float32(0.5)}
    query = torch.randn(1, 1, 3, 4)
    found = ops.attention(query, query, query, **flags)
    assert torch.equal(found, ops.attention(query, query, query, window=(1, None), scale=0.5))


def test_fewer_tangents_than_samples_cannot_be_trained_through():
    query = Q.clone().requires_grad_()
    with pytest.raises(ValueError, match="need detach_tangent=True"):
        ops.attention_jvp(query, Q, Q, Q[:1], None, None)
    with torch.no_grad():
        assert ops.attention_jvp(query, Q, Q, Q[:1], None, None)[1].shape[0] == 1


def test_meta_tensors_mixed_with_others_are_rejected():
    """The meta kernel ran and returned uninitialised memory."""
    x = torch.randn(2, 4, 5, 8)
    for call in (
        lambda: ops.attention(x, x.to("meta"), x),
        lambda: ops.swiglu(x, x.to("meta")),
        lambda: ops.rms_norm_jvp(x, torch.ones(8, device="meta"), x),
    ):
        with pytest.raises(ValueError, match="on the meta device"):
            call()
    assert ops.swiglu(x.to("meta"), x.to("meta")).is_meta
    matrix = x[0, 0]
    both = ops.newton_schulz([matrix.to("meta"), matrix])  # each one separately
    assert both[0].is_meta and both[0].shape == (5, 8) and torch.equal(both[1], ops.newton_schulz(matrix))
