"""One random resized crop per sample, shared by two images: a resampling matrix for rows, one for columns.

Resizing is separable: a crop resized to `size` pixels is  R image C^T  with R [size, H] and C [size, W] for
each sample: exact, differentiable, and one batched product for samples with different crops. The kernel is
Keys' cubic with a = -0.5, widened by the scale when downsampling (antialiasing). Pixels outside the crop
contribute where the kernel reaches them, as in `jax.image.scale_and_translate`, which the authors call, and
in Pillow's ``resize(box=...)``.

Source: R. G. Keys 1981, "Cubic convolution interpolation for digital image processing".
"""

import math

import torch
from torch import Tensor

from pmf.defaults import uniform, without_autocast
from pmf.sizes import Size, height_and_width

__all__ = ["crop_and_resize", "draw_crops", "resampling_matrix"]

AREA = (0.08, 1.0)
"""Smallest and largest fraction of the image's area."""
ASPECT = (3 / 4, 4 / 3)
"""Smallest and largest aspect ratio (width / height); its logarithm is uniform."""


def draw_crops(batch: int, image_size: Size, generator: torch.Generator | None = None) -> Tensor:
    """Draw boxes (top, left, height, width) in pixels, int64 [batch, 4] on the host, inside the image.

    image_size: a number for squares, or (height, width). Sides are rounded and clamped to the image; there is
    no rejection sampling.
    """
    rows, columns = height_and_width(image_size)
    area, aspect, top, left = uniform(4, batch, generator=generator, dtype=torch.float64)
    area = (AREA[0] + (AREA[1] - AREA[0]) * area) * rows * columns
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = torch.exp(low + (high - low) * aspect)
    height = (area / aspect).sqrt().round().clamp(1, rows)
    width = (area * aspect).sqrt().round().clamp(1, columns)
    top = (top * (rows - height + 1)).floor()
    left = (left * (columns - width + 1)).floor()
    return torch.stack((top, left, height, width), dim=1).long()


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Resize the boxes [B, 4] of images [B, C, H, W] to [size, size]; differentiable in the images."""
    top, left, height, width = boxes.unbind(1)
    rows = resampling_matrix(top, height, images.shape[-2], size, images.dtype)
    columns = resampling_matrix(left, width, images.shape[-1], size, images.dtype)
    with without_autocast(images):
        return rows[:, None] @ images @ columns[:, None].mT


def resampling_matrix(start: Tensor, length: Tensor, pixels: int, size: int, dtype: torch.dtype) -> Tensor:
    """[B, size, pixels]: resample the part [start, start + length) of a line of `pixels` to `size` samples.

    Sample i lies at start + (i + 1/2) length / size and weights pixel j, at j + 1/2, by k(distance / max(1,
    length / size)); each row is normalised to sum 1.
    """
    scale = (length.double() / size)[:, None, None]
    sample = torch.arange(size, device=start.device, dtype=torch.float64)[:, None] + 0.5
    pixel = torch.arange(pixels, device=start.device, dtype=torch.float64) + 0.5
    distance = (start.double()[:, None, None] + scale * sample - pixel).abs() / scale.clamp(min=1)
    weight = _keys(distance)
    return (weight / weight.sum(-1, keepdim=True)).to(dtype)


def _keys(x: Tensor) -> Tensor:
    """Keys' cubic kernel, a = -0.5, for distances x >= 0."""
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
