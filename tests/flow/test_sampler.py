"""Sampling in one step and in several."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from pmf import sample
from pmf.devices import has_bf16_products
from pmf.flow import Sampler
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


def deep_model() -> PixelMeanFlow:
    """As deep as pMF-B and wide enough for "auto" to choose bfloat16; its images are about 1."""
    torch.manual_seed(1)
    model = create_model(
        num_classes=4, image_size=8, patch_size=2, channels=3, hidden_size=256, depth=16, head_depth=8,
        num_heads=4, bottleneck=32, mlp_width=256,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_scale"):
                parameter.normal_(0, 0.3)
        model.u_final.linear.weight.normal_(0, 256**-0.5)
    return model


def test_bfloat16_products_stay_50_decibels_from_float32() -> None:
    model, noise, labels = deep_model(), torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    exact = sample(model, labels, noise=noise, precision="fp32")
    assert 0.5 < exact.square().mean() < 2
    decibels = {}
    for name, network in {"bf16": model, "bf16 everywhere": PixelMeanFlow(model.config).bfloat16()}.items():
        if network is not model:
            network.load_state_dict(model.state_dict())
        error = sample(network, labels, noise=noise, precision="bf16" if network is model else "auto") - exact
        decibels[name] = float(10 * torch.log10(4 / error.square().mean()))  # the range of the images is 2
    assert decibels["bf16"] > 50, decibels
    assert decibels["bf16"] > decibels["bf16 everywhere"] + 3, decibels


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_one_sampler_serves_many_batches(precision: str) -> None:
    model, noise = deep_model(), torch.randn(2, 3, 8, 8)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    sampler = Sampler(model, precision)
    weights = [(weight, weight.data_ptr()) for weight in sampler.network.parameters()]
    first = sampler([0, 1], noise=noise)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    with torch.no_grad():
        model.position.add_(1)
    assert torch.equal(sampler([0, 1], noise=noise), first)  # a copy, and the same at every call
    assert [(w, w.data_ptr()) for w in sampler.network.parameters()] == weights
    assert not sampler.network.config.v_head
    assert sum(w.numel() for w in sampler.network.parameters()) < sum(w.numel() for w in model.parameters())


def test_the_prepared_network_is_the_same_function() -> None:
    """The gates of its blocks are folded into its matrices: values and gradients must not change."""
    model = deep_model().double()
    network = Sampler(model, "fp32").network
    images, labels = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3])
    found = []
    for candidate, dtype in ((network, torch.float32), (model, torch.float64)):
        x = images.to(dtype).requires_grad_()
        condition = Condition(*(torch.full((2,), s, dtype=dtype) for s in (1.0, 2.5, 0.2, 0.9)), labels)
        u = candidate(x, condition).u
        (gradient,) = torch.autograd.grad(u.square().sum(), x)
        found += [(u.double(), gradient.double())]
    for actual, expected in zip(*found, strict=True):
        assert (actual - expected).norm() < 1e-5 * expected.norm()
    noise = torch.randn(1, 3, 8, 8)
    again, first = (Sampler(m, "fp32")([0], noise=noise) for m in (network, model))
    assert torch.equal(again, first)  # although the network no longer has scales
    assert Sampler(network, "bf16")([0]).isfinite().all()


def test_what_a_copy_of_the_weights_would_lose_is_evaluated_itself() -> None:
    """Compilation in place, hooks and a subclass's forward; parametrized and tied weights have copies."""

    class Doubled(PixelMeanFlow):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            return found._replace(u=2 * found.u)

    noise = torch.randn(1, 3, 8, 8)
    seen: list[int] = []
    hooked, compiled = deep_model(), deep_model()
    hooked.shared_blocks[0].register_forward_hook(lambda *args: seen.append(1))
    compiled.compile(backend="eager")
    doubled = Doubled(hooked.config)
    doubled.load_state_dict(hooked.state_dict())
    for model in (hooked, compiled, doubled):
        assert Sampler(model, "fp32").network is model
    sample(hooked, [0], noise=noise, precision="fp32")
    assert seen

    tied = deep_model()
    first, second = tied.shared_blocks[0].attn, tied.shared_blocks[1].attn
    second.out_proj.weight = first.out_proj.weight
    parametrized = deep_model()
    weight_norm(parametrized.shared_blocks[0].mlp.w2)
    for model in (tied, parametrized):
        exact = sample(model.double(), [0], noise=noise.double())
        for precision, error in (("fp32", 1e-5), ("bf16", 0.05)):
            found = sample(model.float(), [0], noise=noise, precision=precision)
            assert (found - exact).norm() < error * exact.norm(), precision


def test_auto_precision_is_bfloat16_where_it_pays(
    model: PixelMeanFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = deep_model()
    assert Sampler(wide).precision == ("bf16" if has_bf16_products(torch.device("cpu")) else "fp32")
    for has, found in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("pmf.flow.sampler.has_bf16_products", lambda device, has=has: has)
        assert (Sampler(wide).precision, Sampler(model).precision) == (found, "fp32")
    assert Sampler(wide.double()).precision == "float64"
    assert sample(wide, [1], precision="fp32").dtype == torch.float32
    with pytest.raises(ValueError, match="precision must be one of auto, bf16, fp32, got 'fp8'"):
        sample(model, [1], precision="fp8")


def test_images_may_be_trained_on(model: PixelMeanFlow) -> None:
    images = sample(model, [0, 1])
    weight = torch.ones(8, requires_grad=True)
    (images * weight).sum().backward()
    torch.testing.assert_close(weight.grad, images.sum((0, 1, 2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [5]}, "labels must lie in 0..4"),
        ({"labels": [-1]}, "labels must lie in 0..4"),
        ({"labels": [0.5]}, "labels must be a list of integers"),
        ({"labels": [[1]]}, "labels must be a list of integers"),
        ({"labels": [1], "steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"labels": None}, "labels must be a list of integers"),
        ({"labels": "12"}, "labels must be a list of integers"),
        ({"labels": 3}, "labels must be a list of integers"),
        ({"labels": [1], "steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
        ({"labels": [1], "steps": True}, "steps must be a whole number"),
        ({"labels": [1], "times": 3}, "times must be a list of numbers from 1 to 0, got 3"),
        ({"labels": [1], "times": "10"}, "times must be a list of numbers from 1 to 0, got '10'"),
        ({"labels": [1], "omega": 0.5}, r"omega must be finite and at least 1 \(1 is no guidance\), got 0.5"),
        ({"labels": [1], "omega": float("nan")}, "omega must be a finite number"),
        ({"labels": [1], "omega": float("inf")}, "omega must be a finite number"),
        ({"labels": [1], "omega": "7"}, "omega must be a finite number"),
        ({"labels": [1, 2], "omega": torch.tensor([2.0, 0.5])}, "omega must be finite and at least 1"),
        ({"labels": [1, 2], "omega": torch.tensor([2.0, float("inf")])}, "omega must be finite"),
        ({"labels": [1, 2], "omega": [2.0, 3.0, 4.0]}, "omega must be one number or one for each of the 2"),
        (
            {"labels": [1], "interval": (0.9, 0.1)},
            r"interval must be two numbers 0 <= t_min <= t_max <= 1, got \(0.9, 0.1\)",
        ),
        ({"labels": [1], "interval": (1,)}, "interval must be two numbers"),
        ({"labels": [1], "interval": 0.5}, "interval must be two numbers"),
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


def test_arguments_may_be_arrays(model: PixelMeanFlow) -> None:
    noise = torch.randn(2, 1, 8, 8)
    expected = sample(
        model, [2, 1], omega=[2.0, 3.0], interval=(0.25, 0.5), noise=noise, times=[1.0, 0.5, 0.0]
    )
    for kind in (np.array, torch.tensor):
        found = sample(
            model,
            np.arange(1, 3)[::-1],
            omega=kind([2.0, 3.0]),
            interval=kind([0.25, 0.5]),
            noise=noise,
            times=kind([1.0, 0.5, 0.0]),
        )
        assert torch.equal(found, expected)
    assert torch.equal(sample(model, range(2), noise=noise), sample(model, [0, 1], noise=noise))
    with pytest.raises(TypeError, match=r"noise must be a tensor \[1, 1, 8, 8\], got ndarray"):
        sample(model, [0], noise=np.zeros((1, 1, 8, 8)))


def test_other_networks_are_rejected(model: PixelMeanFlow) -> None:
    with pytest.raises(TypeError, match="must be a PixelMeanFlow, got Linear: pmf.flow.MeanFlow and"):
        sample(torch.nn.Linear(2, 2), [0])
    with pytest.raises(TypeError, match="got AveragedModel: give its .module"):
        sample(torch.optim.swa_utils.AveragedModel(model), [0])


def test_explicit_times(model: PixelMeanFlow) -> None:
    noise, labels = 3 * torch.randn(2, 1, 8, 8), torch.tensor([1, 4])
    equal = sample(model, labels, 3, noise=noise)
    assert torch.equal(sample(model, labels, noise=noise, times=[1.0, 2 / 3, 1 / 3, 0.0]), equal)
    z = noise
    for t, r in ((1.0, 0.3), (0.3, 0.0)):
        condition = Condition(*(torch.full((2,), s) for s in (t - r, 2.5, 0.2, 0.9)), labels)
        with torch.no_grad():
            x = model(z, condition).u
        z = z - (t - r) * (z - x) / max(t, 0.05)
    torch.testing.assert_close(sample(model, labels, noise=noise, times=(1, 0.3, 0)), z)


@pytest.mark.parametrize(
    "times",
    [[], [1.0], [0.5, 0.0], [1.0, 0.5], [1.0, 0.2, 0.4, 0.0], [1.0, 1.0, 0.0], [1.0, float("nan"), 0.0]],
)
def test_times_must_descend_from_1_to_0(model: PixelMeanFlow, times: list[float]) -> None:
    with pytest.raises(ValueError, match="^sample: times must "):
        sample(model, [1], times=times)


def test_times_and_contradictory_steps_are_rejected(model: PixelMeanFlow) -> None:
    with pytest.raises(ValueError, match="2 steps, not 4"):
        sample(model, [1], steps=4, times=[1.0, 0.5, 0.0])
