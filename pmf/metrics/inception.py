"""The Inception network of FID and Inception Score in plain torch.nn.

It is TensorFlow's graph of 2015-12-05 with the weight names of its PyTorch port (the files
``pt_inception-2015-12-05-6726825d.pth`` of pytorch-fid and ``weights-inception-2015-12-05-6726825d.pth`` of
torch-fidelity). It differs from torchvision's: it has 1008 classes, its pooling branches average without the
padding, the last one takes the maximum, and images are resized as in TensorFlow 1.

Sources: Szegedy et al. 2016, "Rethinking the Inception Architecture"; Heusel et al. 2017; both ports.
A test compares it with torch-fidelity's network.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CLASSES = 2048, 1008
_SIDE = 299  # side of the network's input in pixels


class Conv(NamedTuple):
    """A convolution with batch norm and ReLU; "same" padding, or none if it is strided."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1


Step = Conv | str | tuple[Conv, Conv]
"""A convolution; "average", "max" or "halve" for pooling; or two convolutions in parallel."""

_1, _3, _5 = (1, 1), (3, 3), (5, 5)
_ROW3, _COLUMN3, _ROW7, _COLUMN7 = (1, 3), (3, 1), (1, 7), (7, 1)


def _block_a(pool: int) -> list[list[Step]]:
    return [
        [Conv("branch1x1", 64, _1)],
        [Conv("branch5x5_1", 48, _1), Conv("branch5x5_2", 64, _5)],
        [Conv("branch3x3dbl_1", 64, _1), Conv("branch3x3dbl_2", 96, _3), Conv("branch3x3dbl_3", 96, _3)],
        ["average", Conv("branch_pool", pool, _1)],
    ]


def _block_c(narrow: int) -> list[list[Step]]:
    return [
        [Conv("branch1x1", 192, _1)],
        [
            Conv("branch7x7_1", narrow, _1),
            Conv("branch7x7_2", narrow, _ROW7),
            Conv("branch7x7_3", 192, _COLUMN7),
        ],
        [
            Conv("branch7x7dbl_1", narrow, _1),
            Conv("branch7x7dbl_2", narrow, _COLUMN7),
            Conv("branch7x7dbl_3", narrow, _ROW7),
            Conv("branch7x7dbl_4", narrow, _COLUMN7),
            Conv("branch7x7dbl_5", 192, _ROW7),
        ],
        ["average", Conv("branch_pool", 192, _1)],
    ]


def _block_e(pooling: str) -> list[list[Step]]:
    return [
        [Conv("branch1x1", 320, _1)],
        [
            Conv("branch3x3_1", 384, _1),
            (Conv("branch3x3_2a", 384, _ROW3), Conv("branch3x3_2b", 384, _COLUMN3)),
        ],
        [
            Conv("branch3x3dbl_1", 448, _1),
            Conv("branch3x3dbl_2", 384, _3),
            (Conv("branch3x3dbl_3a", 384, _ROW3), Conv("branch3x3dbl_3b", 384, _COLUMN3)),
        ],
        [pooling, Conv("branch_pool", 192, _1)],
    ]


_BLOCKS: dict[str, list[list[Step]]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": [
        [Conv("branch3x3", 384, _3, 2)],
        [Conv("branch3x3dbl_1", 64, _1), Conv("branch3x3dbl_2", 96, _3), Conv("branch3x3dbl_3", 96, _3, 2)],
        ["halve"],
    ],
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": [
        [Conv("branch3x3_1", 192, _1), Conv("branch3x3_2", 320, _3, 2)],
        [
            Conv("branch7x7x3_1", 192, _1),
            Conv("branch7x7x3_2", 192, _ROW7),
            Conv("branch7x7x3_3", 192, _COLUMN7),
            Conv("branch7x7x3_4", 192, _3, 2),
        ],
        ["halve"],
    ],
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max"),
}


class InceptionV3(nn.Module):
    """Images uint8 [B, 3, H, W] to features [B, 2048] and class logits [B, 1008] without bias.

    Inception Score omits the bias, as in its original code. Raises ValueError for other images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNorm(3, 32, _3, stride=2)
        self.Conv2d_2a_3x3 = _ConvNorm(32, 32, _3)
        self.Conv2d_2b_3x3 = _ConvNorm(32, 64, _3, padding=_1)
        self.Conv2d_3b_1x1 = _ConvNorm(64, 80, _1)
        self.Conv2d_4a_3x3 = _ConvNorm(80, 192, _3)
        channels = 192
        for name, branches in _BLOCKS.items():
            block = _Branches(channels, branches)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"inception: images must be uint8 [B, 3, H, W], got {pixels.dtype} {list(pixels.shape)}"
            )
        x = (resize_as_tensorflow_1(pixels.to(self.fc.weight.dtype), _SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def resize_as_tensorflow_1(images: Tensor, side: int) -> Tensor:
    """Resize [B, C, H, W] to [B, C, side, side] with TensorFlow 1's bilinear rule, without antialiasing.

    Output pixel i samples position i * size / side: image corners are aligned rather than pixel centres.
    """
    for dim in (2, 3):
        size = images.shape[dim]
        place = torch.arange(side, device=images.device, dtype=images.dtype) * (size / side)
        low = place.floor().long()
        weight = (place - low).unsqueeze(-1) if dim == 2 else place - low
        first, second = (images.index_select(dim, i) for i in (low, (low + 1).clamp_max(size - 1)))
        images = first + (second - first) * weight
    return images


class _ConvNorm(nn.Module):
    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: tuple[int, int],
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Branches(nn.Module):
    """Parallel sequences of steps on one input, with concatenated outputs."""

    def __init__(self, in_channels: int, branches: list[list[Step]]) -> None:
        super().__init__()
        self.branches, self.channels = branches, 0
        for branch in branches:
            width = in_channels
            for step in branch:
                width = sum(self._add(width, conv) for conv in _convolutions(step)) or width
            self.channels += width

    def _add(self, in_channels: int, conv: Conv) -> int:
        height, width = conv.kernel
        padding = (height // 2, width // 2) if conv.stride == 1 else (0, 0)
        self.add_module(conv.name, _ConvNorm(in_channels, conv.channels, conv.kernel, conv.stride, padding))
        return conv.channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._follow(branch, x) for branch in self.branches], 1)

    def _follow(self, branch: list[Step], x: Tensor) -> Tensor:
        for step in branch:
            if step == "average":
                x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            elif step == "max":
                x = F.max_pool2d(x, 3, stride=1, padding=1)
            elif step == "halve":
                x = F.max_pool2d(x, 3, stride=2)
            else:
                parts = [self.get_submodule(conv.name)(x) for conv in _convolutions(step)]
                x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return x


def _convolutions(step: Step) -> tuple[Conv, ...]:
    if isinstance(step, str):
        return ()
    return (step,) if isinstance(step, Conv) else step
