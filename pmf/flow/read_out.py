"""Convert the network's tokens to a velocity."""

import torch
from torch import Tensor

from pmf import ops
from pmf.reference.patch_velocity import to_images

from .path import T_FLOOR
from .preconditioner import NoPreconditioner, Preconditioner
from .prediction import Prediction, XPrediction

__all__ = ["read_velocity", "read_velocity_jvp"]


def read_velocity(
    prediction: Prediction, preconditioner: Preconditioner, z: Tensor, tokens: Tensor, t: Tensor
) -> Tensor:
    """The velocity [B, C, H, W] at (z, t) given by a head's tokens [B, N, p p C], in z's dtype.

    In general through images, which the preconditioner and the prediction turn into a velocity. The paper's
    choice, an image as the prediction without preconditioner, is a single kernel.
    """
    tokens = _beside(z, tokens)
    if _is_papers(prediction, preconditioner):
        return ops.patch_velocity(tokens, z, t, T_FLOOR)
    return prediction.velocity(z, preconditioner.output(z, _images(tokens, z), t), t)


def read_velocity_jvp(
    prediction: Prediction,
    preconditioner: Preconditioner,
    z: Tensor,
    tokens: Tensor,
    t: Tensor,
    z_t: Tensor,
    tokens_t: Tensor,
    t_t: Tensor,
) -> tuple[Tensor, Tensor]:
    """`read_velocity` and its tangent, a constant for autograd; tangents are of the first n samples."""
    tokens, tokens_t = _beside(z, tokens), _beside(z, tokens_t)
    if _is_papers(prediction, preconditioner):
        tangents = tokens_t, z_t, t_t
        return ops.patch_velocity_jvp(tokens, z, t, *tangents, floor=T_FLOOR, detach_tangent=True)
    raw = _images(tokens, z)
    output = preconditioner.output(z, raw, t)
    with torch.no_grad():
        n = len(z_t)
        first = z[:n], raw[:n], t[:n]
        output_t = preconditioner.output_tangent(*first, z_t, _images(tokens_t, z), t_t)
        v_t = prediction.velocity_tangent(z[:n], output[:n], t[:n], z_t, output_t, t_t)
    return prediction.velocity(z, output, t), v_t


def _is_papers(prediction: Prediction, preconditioner: Preconditioner) -> bool:
    return type(prediction) is XPrediction and type(preconditioner) is NoPreconditioner


def _beside(z: Tensor, tokens: Tensor) -> Tensor:
    """Tokens in a dtype the kernel accepts with z: z's, or 16-bit beside float32."""
    narrow = z.dtype == torch.float32 and tokens.element_size() == 2
    return tokens if narrow else tokens.to(z.dtype)


def _images(tokens: Tensor, z: Tensor) -> Tensor:
    return to_images(tokens, *z.shape[1:]).to(z.dtype)
