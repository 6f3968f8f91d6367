"""Every layer's tangent, for the first n of B samples, against central differences in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pmf.nn import (
    AttentionBranch,
    Block,
    Condition,
    ConditionTokens,
    FinalLayer,
    MlpBranch,
    PatchEmbedding,
    RMSNorm,
    ScalarEmbedder,
    rotary_tables,
)

HIDDEN, HEADS, SIDE, PREFIX, BATCH = 16, 2, 2, 3, 4
TOKENS = PREFIX + SIDE * SIDE
STEP = 1e-4
# Central differences have errors of STEP^2 times third derivatives, and of rounding / STEP.
TOLERANCE = 1e-6

Layer = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def random(module: nn.Module) -> nn.Module:
    """The module in float64 with random weights: none of its parameters is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def layers() -> dict[str, tuple[tuple[int, ...], Layer]]:
    """Name -> shape of one sample's input, and the layer as a function of value and tangent."""
    cos, sin = rotary_tables(SIDE, HIDDEN // HEADS, dtype=torch.float64)
    attention, mlp, norm = (
        random(layer) for layer in (AttentionBranch(HIDDEN, HEADS), MlpBranch(HIDDEN, 24), RMSNorm(HIDDEN))
    )
    gate = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    block = random(Block(HIDDEN, HEADS, 24))
    patch = random(PatchEmbedding(3, 2, 5, HIDDEN))
    position, prefix = torch.randn(TOKENS, HIDDEN).double(), torch.randn(BATCH, PREFIX, HIDDEN).double()

    def embed(x: Tensor, x_t: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return patch(
            x,
            position[None],
            prefix[: len(x)],
            x_t,
            None if x_t is None else torch.zeros_like(prefix[: len(x_t)]),
        )

    return {
        "rms norm": ((TOKENS, HIDDEN), random(RMSNorm(HIDDEN))),
        "mlp": ((TOKENS, HIDDEN), lambda x, x_t: mlp(x, norm, gate, x_t)),
        "attention": ((TOKENS, HIDDEN), lambda x, x_t: attention(x, norm, gate, cos, sin, x_t)),
        "block": ((TOKENS, HIDDEN), lambda x, x_t: block(x, cos, sin, x_t)),
        "block, last tokens": ((TOKENS, HIDDEN), lambda x, x_t: block(x, cos, sin, x_t, SIDE * SIDE)),
        "final": ((SIDE * SIDE, HIDDEN), random(FinalLayer(HIDDEN, 2, 3))),
        "patch embedding": ((3, 2 * SIDE, 2 * SIDE), embed),
        "scalar embedder": ((ScalarEmbedder.features,), random(ScalarEmbedder(HIDDEN))),
    }


LAYERS = layers()


@pytest.mark.parametrize("n", [1, 2, BATCH])
@pytest.mark.parametrize("name", LAYERS)
def test_tangent_is_the_directional_derivative(name: str, n: int) -> None:
    shape, layer = LAYERS[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)
    x_t = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    y, y_t = layer(x, x_t)
    alone, nothing = layer(x, None)
    assert nothing is None
    torch.testing.assert_close(y, alone)
    assert y.requires_grad and not y_t.requires_grad
    with torch.no_grad():
        ahead, behind = layer(x[:n] + STEP * x_t, None)[0], layer(x[:n] - STEP * x_t, None)[0]
    torch.testing.assert_close(y_t, (ahead - behind) / (2 * STEP), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", LAYERS)
def test_carrying_a_tangent_changes_no_gradient(name: str) -> None:
    shape, layer = LAYERS[name]
    x = torch.randn(BATCH, *shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(layer(x, None)[0])
    (plain,) = torch.autograd.grad((layer(x, None)[0] * weight).sum(), x)
    (carried,) = torch.autograd.grad((layer(x, torch.randn_like(x[:2]))[0] * weight).sum(), x)
    torch.testing.assert_close(carried, plain)


def condition(h: Tensor) -> Condition:
    full = torch.full_like
    return Condition(h, full(h, 3.0), full(h, 0.2), full(h, 0.9), torch.arange(len(h)) % 4)


def test_condition_tokens_move_with_h_only() -> None:
    tokens = random(ConditionTokens(3, HIDDEN, (2, 1, 1, 2, 3)))
    h, h_t = torch.rand(BATCH).double(), torch.tensor([1.0, -0.5]).double()
    y, y_t = tokens(condition(h), h_t)
    assert y.shape == (BATCH, 9, HIDDEN) and y_t.shape == (2, 9, HIDDEN)
    with torch.no_grad():
        ahead, behind = (tokens(condition(h[:2] + sign * STEP * h_t))[0] for sign in (1, -1))
    torch.testing.assert_close(y_t, (ahead - behind) / (2 * STEP), rtol=TOLERANCE, atol=TOLERANCE)
    assert not y_t[:, :6].any() and y_t[:, 6:].any()


def test_condition_tokens_are_in_the_papers_order() -> None:
    tokens = random(ConditionTokens(3, HIDDEN, (2, 1, 1, 2, 3)))
    base = condition(torch.full((1,), 0.5).double())
    changed = {
        "labels": (base._replace(labels=base.labels + 1), [0, 1]),
        "omega": (base._replace(omega=base.omega + 1), [2]),
        "t_min": (base._replace(t_min=base.t_min + 0.1), [3]),
        "t_max": (base._replace(t_max=base.t_max - 0.1), [4, 5]),
        "h": (base._replace(h=base.h + 0.1), [6, 7, 8]),
    }
    for name, (other, moved) in changed.items():
        difference = (tokens(other)[0] - tokens(base)[0]).abs().amax(-1)[0]
        assert difference.nonzero().flatten().tolist() == moved, name


def test_sinusoid_is_cosines_then_sines_of_falling_frequency() -> None:
    features = ScalarEmbedder.sinusoid(torch.tensor([0.7]).double())[0]
    frequency = 1e4 ** (-torch.arange(128).double() / 128)
    torch.testing.assert_close(features[:128], torch.cos(0.7 * frequency))
    torch.testing.assert_close(features[128:], torch.sin(0.7 * frequency))


def test_final_layer_puts_pixels_where_they_belong() -> None:
    final = FinalLayer(HIDDEN, 2, 3).double()
    side, p, channels = 2, 2, 3
    with torch.no_grad():
        final.linear.bias.copy_(torch.arange(p * p * channels))
    image = final(torch.zeros(1, side * side, HIDDEN).double())[0][0]
    for row in range(side * p):
        for column in range(side * p):
            for channel in range(channels):
                assert image[channel, row, column] == ((row % p) * p + column % p) * channels + channel
    # One token affects one patch: token 1 is row 0, column 1.
    with torch.no_grad():
        final.linear.bias.zero_()
        final.linear.weight.fill_(1.0)
    x = torch.zeros(1, side * side, HIDDEN).double()
    x[0, 1] = 1.0
    lit = final(x)[0][0, 0]
    assert lit[:2, 2:].all() and not lit[:, :2].any() and not lit[2:].any()
