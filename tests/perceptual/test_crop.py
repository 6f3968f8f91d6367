"""Paired random crops: their positions, the resampled values, and gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pmf.perceptual.crop import crop_and_resize, draw_crops


def test_boxes_lie_inside_and_have_the_requested_areas_and_aspects() -> None:
    top, left, height, width = draw_crops(20_000, 64, torch.Generator().manual_seed(0)).double().unbind(1)
    assert (
        (top >= 0).all() and (top + height <= 64).all() and (left >= 0).all() and (left + width <= 64).all()
    )
    whole = (height < 64) & (width < 64)  # nothing was clamped
    share, aspect = (height * width / 64**2)[whole], (width / height)[whole]
    assert 0.07 < share.min() < 0.09 and share.max() > 0.9  # 0.08, up to rounded sides
    assert 0.7 < aspect.min() < 0.76 and 1.31 < aspect.max() < 1.42
    small = share < 0.5  # none of these was clamped: the logarithm of the aspect is uniform, so its mean is 0
    assert abs(aspect[small].log().mean()) < 0.01
    assert abs(aspect[small].log().std() - math.log(16 / 9) / math.sqrt(12)) < 0.01
    room = 64 - height > 0
    assert abs((top / (64 - height))[room].mean() - 0.5) < 0.01


@pytest.mark.parametrize("size", [224, 16, 5])
@pytest.mark.parametrize("shape", [(40, 40), (24, 40)])
def test_a_crop_is_pillow_resizing_of_a_box(size: int, shape: tuple[int, int]) -> None:
    images = torch.randn(8, 2, *shape, generator=torch.Generator().manual_seed(1))
    boxes = draw_crops(8, shape, torch.Generator().manual_seed(2))
    crops = crop_and_resize(images, boxes, size)
    assert crops.shape == (8, 2, size, size) and crops.dtype == torch.float32
    for image, (top, left, height, width), crop in zip(images, boxes.tolist(), crops, strict=True):
        for channel, mine in zip(image, crop, strict=True):
            box = (left, top, left + width, top + height)
            pillow = Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BICUBIC, box=box)
            np.testing.assert_allclose(mine.numpy(), np.asarray(pillow), atol=1e-5)


@pytest.mark.parametrize("size", [64, 32, 7])
def test_the_whole_image_is_torch_antialiased_bicubic(size: int) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = torch.tensor([[0, 0, 32, 32]] * 2)
    wanted = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    torch.testing.assert_close(crop_and_resize(images, whole, size), wanted, rtol=0, atol=1e-12)


def test_gradients() -> None:
    images = torch.randn(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[1, 0, 4, 6], [2, 2, 3, 3]])
    assert torch.autograd.gradcheck(lambda x: crop_and_resize(x, boxes, 4), images)
