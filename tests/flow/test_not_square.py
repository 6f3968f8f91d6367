"""Non-square images: model, objective and samples against the plain port."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import pmf
from pmf.flow import Objective
from pmf.models import ModelConfig, PixelMeanFlow, config_from_state_dict
from pmf.nn import Condition, rotary_tables
from pmf.perceptual import CroppedDistances
from pmf.reference.network import network
from pmf.reference.objective import objective as plain_objective

TINY = ModelConfig(
    num_classes=3,
    image_size=(4, 12),
    patch_size=2,
    channels=2,
    hidden_size=16,
    depth=3,
    head_depth=1,
    num_heads=2,
    bottleneck=6,
)
# Both sides compute the same equations in float64, in different orders.
TOLERANCE = 1e-10


def random_model(size: tuple[int, int]) -> PixelMeanFlow:
    """Random weights everywhere: initially gates and heads are zero and would hide most mistakes."""
    torch.manual_seed(0)
    model = PixelMeanFlow(replace(TINY, image_size=size)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_images(model: PixelMeanFlow, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, *model.config.image_shape, generator=generator, dtype=torch.float64) * 2 - 1
    return images, torch.arange(count) % model.config.num_classes


@pytest.mark.parametrize("size", [(4, 12), (12, 4), (2, 8)])
@pytest.mark.parametrize("head", ["u", "v"])
def test_the_network_is_the_plain_one(size: tuple[int, int], head: str) -> None:
    model = random_model(size)
    images, labels = random_images(model)
    scalars = [torch.full((len(images),), x, dtype=torch.float64) for x in (0.3, 2.0, 0.1, 0.8)]
    found = getattr(model(images, Condition(*scalars, labels), heads=head), head)
    wanted = network(dict(model.named_parameters()), images, *scalars, labels, num_heads=2, head=head)
    assert found.shape == images.shape
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("size", [(4, 12), (12, 4)])
def test_loss_and_gradients_are_the_plain_ones(size: tuple[int, int]) -> None:
    model = random_model(size)
    images, labels = random_images(model)
    objective = Objective(class_dropout=0.3)
    draws = objective.draw(images, labels, torch.Generator().manual_seed(2))
    draws = draws._replace(**{f: getattr(draws, f).double() for f in ("t", "r", "omega", "t_min", "t_max")})
    params = dict(model.named_parameters())
    plain = plain_objective(params, images, labels, **draws._asdict(), num_heads=2)
    terms = objective(model, images, labels, draws)
    torch.testing.assert_close(terms.loss, plain.loss, rtol=TOLERANCE, atol=TOLERANCE)
    expected = torch.autograd.grad(plain.loss, list(params.values()))
    actual = torch.autograd.grad(terms.loss, list(params.values()))
    for name, ours, theirs in zip(params, actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def test_rotary_angles_are_by_row_and_by_column() -> None:
    cos, sin = rotary_tables((2, 3), 8, dtype=torch.float64)
    token = 1 * 3 + 2  # row 1, column 2
    angle = torch.tensor([1.0, 0.01, 2.0, 0.02], dtype=torch.float64)
    torch.testing.assert_close(cos[token], angle.cos())
    torch.testing.assert_close(sin[token], angle.sin())
    assert len(cos) == 6


def test_samples_have_the_models_size() -> None:
    for size in ((8, 16), [16, 8]):
        model = pmf.create_model("digits", image_size=size)
        assert pmf.sample(model, [1, 2]).shape == (2, 1, *size)
        assert model.config.image_size == tuple(size)  # in the form that JSON gives it
    assert pmf.create_model("digits", image_size=(8, 8)).config.image_size == 8
    with pytest.raises(ValueError, match=r"images must be .*\[B, 1, 16, 8\], got .*\[2, 1, 8, 16\]"):
        Objective()(model, torch.zeros(2, 1, 8, 16), torch.zeros(2).long(), Objective().draw(
            torch.zeros(2, 1, 8, 16), torch.zeros(2).long()
        ))  # fmt: skip


@pytest.mark.parametrize("size", [(8, 7), (7, 8), (9, 9)])
def test_both_sides_must_be_whole_patches(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="image_size .* is not a multiple of patch_size 2"):
        replace(TINY, image_size=size)


def test_weights_alone_do_not_distinguish_wide_images_from_square_ones() -> None:
    state = pmf.create_model("digits", image_size=(4, 16)).state_dict()  # 16 tokens, as 8 x 8 images have
    assert config_from_state_dict(state, noise_scale=1.0).image_size == 8
    assert config_from_state_dict(state, noise_scale=1.0, image_size=(4, 16)).grid == (2, 8)
    with pytest.raises(ValueError, match="16 image tokens of 2x2 pixels do not match 4x8 images"):
        config_from_state_dict(state, noise_scale=1.0, image_size=(4, 8))
    state = pmf.create_model("digits", image_size=(4, 12)).state_dict()
    with pytest.raises(ValueError, match="12 image tokens .* pass the image_size"):
        config_from_state_dict(state, noise_scale=1.0)


def test_crops_of_an_objective_lie_inside_both_sides() -> None:
    objective = Objective(perceptual=CroppedDistances([]))
    images = torch.zeros(4000, 1, 8, 40)
    crop = objective.draw(images, torch.zeros(4000).long(), torch.Generator().manual_seed(0)).crop
    assert crop is not None
    top, left, height, width = crop.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + height).max() == 8 and (left + width).max() == 40
    share = (height * width)[height < 8] / (8 * 40)
    assert 0.06 < share.min() < 0.09 and height.min() >= 4  # sqrt(0.08 320 3 / 4) is 4.4
