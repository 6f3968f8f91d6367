"""scikit-learn's handwritten digits: 1797 greyscale images of 8x8 pixels with 17 grey levels."""

import torch

from pmf.data.memory import MemoryImages
from pmf.errors import UserError


def load_digits() -> MemoryImages:
    """The digits as float32 [1797, 1, 8, 8] in [-1, 1], x / 8 - 1 for levels 0..16, with labels 0..9."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn, "
            "or give an image folder with --data"
        ) from error
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).unsqueeze(1) / 8 - 1
    return MemoryImages(images, torch.from_numpy(digits.target), [str(digit) for digit in range(10)])
