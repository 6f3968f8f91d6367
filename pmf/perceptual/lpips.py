"""LPIPS: a weighted distance between the unit-length features of two images, for three trunks.

    d(a, b) = sum over layers of mean over positions of  w_l . (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|)^2

with w_l >= 0 learned from human judgements. "vgg" is LPIPS-VGG, version 0.1; "stlpips-vgg" and "stlpips-alex"
are shift-tolerant LPIPS, in which every strided layer is preceded by a blur. Tensor names follow the packages
`lpips` and `stlpips_pytorch`, so that their files load.

Sources: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"; Ghildyal
and Liu 2022, "Shift-tolerant Perceptual Similarity Metric".
"""

from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LPIPS", "TRUNKS"]

_LENGTH_EPS = 1e-10
Layers = list[nn.Module]


class Blur(nn.Module):
    """[1 2 1] / 4 in both directions with stride 2 and reflection padding."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filt", torch.outer(line, line).expand(channels, 1, 3, 3).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def _vgg16(shift_tolerant: bool) -> Iterator[Layers]:
    """VGG16 as five slices, each ending at an activation that is compared."""
    channels = 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers: Layers = []
        if channels != 3 and shift_tolerant:
            layers += [nn.MaxPool2d(2, 1), Blur(channels)]
        elif channels != 3:
            layers += [nn.MaxPool2d(2)]
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        yield layers


def _shift_tolerant_alexnet() -> Iterator[Layers]:
    yield [nn.Conv2d(3, 64, 11, padding=2), Blur(64), nn.ReLU()]
    yield [nn.MaxPool2d(3, 1), Blur(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()]
    yield [nn.MaxPool2d(3, 1), Blur(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()]
    yield [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()]
    yield [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]


TRUNKS = {
    "vgg": lambda: _vgg16(shift_tolerant=False),
    "stlpips-vgg": lambda: _vgg16(shift_tolerant=True),
    "stlpips-alex": _shift_tolerant_alexnet,
}


class LPIPS(nn.Module):
    """The distance between images a, b [B, 3, H, W] in [-1, 1]: [B], float32. trunk is a name in TRUNKS.

    The channels are first shifted and scaled to the trunk's training statistics, by LPIPS's own layer.
    Nothing is clipped.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: str = "vgg") -> None:
        super().__init__()
        self.register_buffer("shift", _per_channel(-0.030, -0.088, -0.188), persistent=False)
        self.register_buffer("scale", _per_channel(0.458, 0.448, 0.450), persistent=False)
        slices: OrderedDict[str, nn.Module] = OrderedDict()
        heads, first = [], 0
        for number, layers in enumerate(TRUNKS[trunk](), start=1):
            # Layers are numbered across slices, as in torchvision's `features`.
            slices[f"slice{number}"] = nn.Sequential(
                OrderedDict((str(first + i), layer) for i, layer in enumerate(layers))
            )
            first += len(layers)
            heads.append([layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)][-1])
        self.net = nn.Sequential(slices)
        for number, width in enumerate(heads):
            # "1" because a dropout preceded it in training.
            head = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{number}", nn.ModuleDict({"model": nn.ModuleDict({"1": head})}))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.normalised(a), self.normalised(b)
        distance = a.new_zeros(len(a))
        for number, layers in enumerate(self.net):
            a, b = layers(a), layers(b)
            weight = self.get_parameter(f"lin{number}.model.1.weight")[0, :, 0, 0]
            difference = (_unit_length(a) - _unit_length(b)).square().mean((2, 3))
            distance = distance + (difference * weight).sum(1)  # not a product, which autocast would round
        return distance

    def normalised(self, images: Tensor) -> Tensor:
        """The trunk's input, float32."""
        return (images.float() - self.shift) / self.scale


def _unit_length(x: Tensor) -> Tensor:
    x = x.float()  # bfloat16 under autocast
    # Unlike sqrt(sum(x^2)), vector_norm has a finite gradient, 0, where ReLU output is all zero.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _LENGTH_EPS)


def _per_channel(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)
