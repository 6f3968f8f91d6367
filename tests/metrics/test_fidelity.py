"""Inception, FID and Inception Score against torch-fidelity's; accumulated sums against the whole set."""

import importlib
import importlib.util
import os
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pmf.metrics import InceptionScore, InceptionV3, Moments, frechet_distance, frechet_of_moments
from pmf.metrics.inception import CLASSES, FEATURES, resize_as_tensorflow_1

_schemas = torch.library.Library("torchvision", "FRAGMENT")  # its definitions live as long as it does


def torch_fidelity(module: str) -> types.ModuleType:
    """It imports torchvision, which lacks two operators with CPU builds of torch: define them first."""
    for package in ("torchvision", "torch_fidelity"):
        if importlib.util.find_spec(package) is None:
            missing = pytest.fail if os.environ.get("PMF_PEERS") == "required" else pytest.skip
            missing(f"{package} is not installed")
    for name in ("nms", "qnms"):
        if f"torchvision::{name}" not in torch._C._dispatch_get_all_op_names():
            _schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(f"torch_fidelity.{module}")


def random_features(count: int, width: int, seed: int) -> Tensor:
    """Correlated and non-negative, like features after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.relu(torch.randn(count, width, generator=generator) @ mixing + 0.3)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.fixture(scope="module")
def inception() -> InceptionV3:
    """Random weights that preserve the features' scale through all layers, with non-trivial norms."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = InceptionV3()
    network = network.to_empty(device="cpu").eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.8, 1.2)
            module.running_var.uniform_(0.8, 1.2)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.num_batches_tracked.zero_()
    network.fc.bias.normal_(0, 0.1)
    return network


@pytest.mark.parametrize("side", [32, 320])
def test_inception_equals_torch_fidelitys(inception: InceptionV3, tmp_path: Path, side: int) -> None:
    extractor = torch_fidelity("feature_extractor_inceptionv3")
    torch.save(inception.state_dict(), tmp_path / "weights.pth")
    theirs = extractor.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    for ours, other in zip(inception(pixels), theirs(pixels), strict=True):
        assert relative_error(ours, other) < 1e-5


def test_inception_has_the_sizes_and_names_of_the_published_file(inception: InceptionV3) -> None:
    weights = inception.state_dict()
    kept = {name: x for name, x in weights.items() if not name.endswith("num_batches_tracked")}
    # 94 convolutions, each with the four tensors of its norm, and the classifier.
    assert len(kept) == 94 * 5 + 2
    assert sum(x.numel() for x in kept.values()) == 23_885_392
    assert weights["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert (weights["fc.weight"].shape, weights["fc.bias"].shape) == ((CLASSES, FEATURES), (CLASSES,))


def test_inception_refuses_other_images(inception: InceptionV3) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\], got torch.float32 \[1, 3, 8, 8\]"):
        inception(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got torch.uint8 \[1, 1, 8, 8\]"):
        inception(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def test_the_resize_equals_tensorflows() -> None:
    """Corners are aligned: enlarging by two interpolates between i and i + 1 and repeats the last pixel."""
    row = torch.tensor([0.0, 4.0, 8.0])
    image = row.expand(1, 1, 3, 3)
    assert resize_as_tensorflow_1(image, 6)[0, 0, 0].tolist() == [0, 2, 4, 6, 8, 8]
    assert resize_as_tensorflow_1(image.mT, 6)[0, 0, :, 0].tolist() == [0, 2, 4, 6, 8, 8]
    large = torch.arange(64.0).expand(1, 1, 64, 64)
    assert resize_as_tensorflow_1(large, 16)[0, 0, 0].tolist() == list(range(0, 64, 4))  # no antialiasing


def test_moments_of_batches_and_processes_equal_those_of_the_whole() -> None:
    x = 50 + random_features(301, 6, seed=0)
    parts = Moments(6), Moments(6)
    for i, batch in enumerate(x.split(40)):
        parts[i % 2].add(batch)
    for total, other in zip(parts[0].tensors().values(), parts[1].tensors().values(), strict=True):
        total += other
    mean, covariance = parts[0].mean_and_covariance()
    assert relative_error(mean, x.double().mean(0)) < 1e-14
    assert relative_error(covariance, torch.cov(x.double().T)) < 1e-11
    with pytest.raises(ValueError, match=r"features must be \[B, 6\], got \[3, 5\]"):
        parts[0].add(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="two samples or more, got 0"):
        Moments(6).mean_and_covariance()


@pytest.mark.parametrize(("width", "count"), [(24, 400), (40, 30)])  # fewer samples than features too
def test_frechet_distance_equals_torch_fidelitys(width: int, count: int) -> None:
    fid = torch_fidelity("metric_fid")
    a, b = (
        random_features(count, width, 0).double(),
        1.1 * random_features(count + 7, width, 1).double() + 0.1,
    )
    statistics = [fid.fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    streamed = []
    for x in (a, b):
        moments = Moments(width)
        for batch in x.split(64):
            moments.add(batch)
        streamed += moments.mean_and_covariance()
    assert frechet_of_moments(*streamed) == pytest.approx(theirs, rel=1e-6)


def test_frechet_of_moments_refuses_what_does_not_fit() -> None:
    mean, covariance = torch.zeros(3), torch.eye(3)
    assert frechet_of_moments(mean, covariance, mean + 1, 4 * covariance) == pytest.approx(3 + 3)
    with pytest.raises(ValueError, match=r"\[3\], \[3, 3\], \[4\], \[4, 4\]"):
        frechet_of_moments(mean, covariance, torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="finite"):
        frechet_of_moments(mean, covariance, mean, covariance * float("nan"))


def streamed_score(logits: Tensor, splits: int) -> tuple[float, float]:
    score = InceptionScore(len(logits), logits.shape[1], splits)
    for indices in torch.randperm(len(logits)).split(17):  # the order of counting changes nothing
        score.add(logits[indices], indices)
    return score.score()


@pytest.mark.parametrize(("count", "splits"), [(203, 10), (50, 1)])
def test_inception_score_equals_torch_fidelitys(count: int, splits: int) -> None:
    isc = torch_fidelity("metric_isc")
    logits = 3 * torch.randn(count, 20, generator=torch.Generator().manual_seed(0))
    theirs = isc.isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=2020)
    mean, deviation = streamed_score(logits, splits)
    assert mean == pytest.approx(theirs[isc.KEY_METRIC_ISC_MEAN], rel=1e-9)
    assert deviation == pytest.approx(theirs[isc.KEY_METRIC_ISC_STD], rel=1e-6, abs=1e-9)


def test_inception_score_of_certain_and_of_uniform_guesses() -> None:
    labels = torch.arange(1000) % 10
    sure = 1000 * torch.eye(10)[labels]
    assert streamed_score(sure, 1) == pytest.approx((10, 0), abs=1e-9)
    assert streamed_score(torch.zeros(1000, 10), 10) == pytest.approx((1, 0), abs=1e-9)
    with pytest.raises(ValueError, match="splits must lie between 1 and the 5 images, got 10"):
        InceptionScore(5, 10)
    with pytest.raises(ValueError, match="not counted"):
        InceptionScore(20, 10).score()
    for indices in (torch.arange(19), torch.tensor([*range(20), 5])):  # no part is empty
        score = InceptionScore(20, 10)
        score.add(torch.zeros(len(indices), 10), indices)
        with pytest.raises(ValueError, match="not counted, or more than once"):
            score.score()
