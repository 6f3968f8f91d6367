"""All random numbers of one evaluation of the objective."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Draws"]


class Draws(NamedTuple):
    """The random draws; given these, the loss is a pure function of model, images and labels.

    t >= r, omega >= 1, t_min, t_max [B] float and drop [B] bool are on the CPU: they determine what to
    compute before anything runs. noise [B, C, H, W] is e itself, already multiplied by noise_scale, on the
    images' device. Samples with r = t are flow-matching samples. crop is for perceptual losses and may be
    absent.
    """

    t: Tensor
    r: Tensor
    noise: Tensor
    omega: Tensor
    t_min: Tensor
    t_max: Tensor
    drop: Tensor
    crop: Tensor | None = None
