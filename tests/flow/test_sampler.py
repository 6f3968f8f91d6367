"""Sampling in one step and in several."""

import pytest
import torch

from pmf.flow import sample
from pmf.models import PixelMeanFlow, create_model
from pmf.nn import Condition


@pytest.fixture(scope="module")
def model() -> PixelMeanFlow:
    torch.manual_seed(0)
    model = create_model(
        num_classes=4, image_size=8, patch_size=4, channels=1, hidden_size=16, depth=2, head_depth=1,
        num_heads=2, noise_scale=3.0, v_head=False, sample_omega=2.5, sample_interval=(0.2, 0.9),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("steps", [1, 3])
def test_takes_equal_steps_from_1_to_0(model: PixelMeanFlow, steps: int) -> None:
    noise, labels = 3 * torch.randn(2, 1, 8, 8), torch.tensor([1, 4])
    z = noise
    for i in reversed(range(steps)):
        t, r = (i + 1) / steps, i / steps
        condition = Condition(*(torch.full((2,), s) for s in (t - r, 2.0, 0.1, 0.6)), labels)
        with torch.no_grad():
            x = model(z, condition).u
        z = z - (t - r) * (z - x) / max(t, 0.05)
    images = sample(model, labels, steps, omega=2.0, interval=(0.1, 0.6), noise=noise)
    torch.testing.assert_close(images, z)
    assert not images.requires_grad


def test_one_step_returns_the_image_the_network_predicts(model: PixelMeanFlow) -> None:
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 3])
    condition = Condition(*(torch.full((2,), s) for s in (1.0, 2.5, 0.2, 0.9)), labels)
    torch.testing.assert_close(sample(model, labels, noise=noise), model(noise, condition).u.detach())


def test_guidance_defaults_to_the_models_own_and_may_vary_by_sample(model: PixelMeanFlow) -> None:
    noise = torch.randn(2, 1, 8, 8)
    default = sample(model, [1, 2], noise=noise)
    assert torch.equal(default, sample(model, [1, 2], omega=2.5, interval=(0.2, 0.9), noise=noise))
    mixed = sample(model, [1, 2], omega=torch.tensor([2.5, 7.0]), noise=noise)
    torch.testing.assert_close(mixed[0], default[0])
    assert (mixed[1] - default[1]).abs().max() > 1e-4


def test_noise_comes_from_the_generator_times_noise_scale(model: PixelMeanFlow) -> None:
    drawn = sample(model, [0, 1], generator=torch.Generator().manual_seed(3))
    noise = 3 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, sample(model, torch.tensor([0, 1]), noise=noise))


def test_samples_do_not_depend_on_their_neighbours(model: PixelMeanFlow) -> None:
    noise, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    together = sample(model, labels, noise=noise)
    for i in range(3):
        torch.testing.assert_close(sample(model, labels[i : i + 1], noise=noise[i : i + 1])[0], together[i])
    assert sample(model, labels[:0]).shape == (0, 1, 8, 8)


def test_a_bfloat16_model_gives_float32_images(model: PixelMeanFlow) -> None:
    half = PixelMeanFlow(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    noise = torch.randn(2, 1, 8, 8)
    images = sample(half, [0, 1], noise=noise)
    exact = sample(model, [0, 1], noise=noise)
    assert images.dtype == torch.float32
    assert (images - exact).norm() < 8 * torch.finfo(torch.bfloat16).eps * exact.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [5]}, "labels must lie in 0..4"),
        ({"labels": [-1]}, "labels must lie in 0..4"),
        ({"labels": [0.5]}, "labels must be a list of integers"),
        ({"labels": [[1]]}, "labels must be a list of integers"),
        ({"labels": [1], "steps": 0}, "steps must be at least 1, got 0"),
        ({"labels": [1], "omega": 0.5}, r"omega must be at least 1 \(1 is no guidance\), got 0.5"),
        ({"labels": [1], "omega": float("nan")}, "omega must be at least 1"),
        (
            {"labels": [1], "interval": (0.9, 0.1)},
            "interval must be 0 <= t_min <= t_max <= 1, got 0.9 and 0.1",
        ),
        ({"labels": [1], "interval": (0.0, float("nan"))}, "interval must be"),
        (
            {"labels": [1], "noise": torch.zeros(2, 1, 8, 8)},
            r"noise must be \[1, 1, 8, 8\], got \[2, 1, 8, 8\]",
        ),
    ],
)
def test_bad_arguments_are_refused(model: PixelMeanFlow, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(model, **arguments)
