"""Perceptual distances between images from frozen networks, in plain torch.nn.

    perceptual = pmf.perceptual.build("lpips", weights=["vgg16-397923af.pth"])
    objective = pmf.flow.Objective(perceptual=perceptual)

Or use a single network: ``load_lpips()(a, b)`` is LPIPS-VGG of images in [-1, 1], ``load_lite0()(images)``
returns features.
"""

from .convnext import ConvNeXtV2
from .crop import crop_and_resize, draw_crops
from .lite0 import EfficientNetLite0
from .losses import CHOICES, CroppedDistances, FeatureDistance, build
from .lpips import LPIPS
from .networks import load_convnext, load_lite0, load_lpips

__all__ = [
    "CHOICES",
    "ConvNeXtV2",
    "CroppedDistances",
    "EfficientNetLite0",
    "FeatureDistance",
    "LPIPS",
    "build",
    "crop_and_resize",
    "draw_crops",
    "load_convnext",
    "load_lite0",
    "load_lpips",
]
