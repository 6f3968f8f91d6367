"""The network's input at (z, t), and the velocity from its output tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from pmf import ops
from pmf.models import ModelConfig
from pmf.reference.patch_velocity import to_images

from .path import T_FLOOR
from .preconditioner import NoPreconditioner, Preconditioner, preconditioner_of
from .prediction import Prediction, XPrediction, prediction_of

__all__ = ["ReadOut"]


class ReadOut(NamedTuple):
    """The network's input at (z, t), and the velocity from its output tokens.

    z is [B, C, H, W], t [B], tokens [B, N, p p C]. In general the tokens become images, which the
    preconditioner and the prediction turn into a velocity. The paper's choice, an image as the prediction
    without a preconditioner, is a single kernel.
    """

    prediction: Prediction
    preconditioner: Preconditioner

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        prediction: Prediction | str | None = None,
        preconditioner: Preconditioner | str | None = None,
    ) -> "ReadOut":
        """The model's own read-out, except for the arguments given: objects, or names as in `ModelConfig`.

        Raises ValueError for anything else.
        """
        return cls(prediction_of(config, prediction), preconditioner_of(config, preconditioner))

    def network_input(self, z: Tensor, t: Tensor) -> Tensor:
        return self.preconditioner.input(z, t)

    def network_input_tangent(self, z: Tensor, t: Tensor, z_t: Tensor, t_t: Tensor) -> Tensor:
        """Only the tangent; tangents are of the first n samples."""
        n = len(z_t)
        return self.preconditioner.input_tangent(z[:n], t[:n], z_t, t_t)

    def velocity(self, z: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """[B, C, H, W] in z's dtype."""
        tokens = _beside(z, tokens)
        if self._has_kernel():
            return ops.patch_velocity(tokens, z, t, T_FLOOR)
        return self.prediction.velocity(z, self.preconditioner.output(z, _images(tokens, z), t), t)

    def velocity_jvp(
        self, z: Tensor, tokens: Tensor, t: Tensor, z_t: Tensor, tokens_t: Tensor, t_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`velocity` and its tangent, a constant for autograd; tangents are of the first n samples."""
        tokens, tokens_t = _beside(z, tokens), _beside(z, tokens_t)
        if self._has_kernel():
            tangents = tokens_t, z_t, t_t
            return ops.patch_velocity_jvp(tokens, z, t, *tangents, floor=T_FLOOR, detach_tangent=True)
        prediction, preconditioner = self
        raw = _images(tokens, z)
        output = preconditioner.output(z, raw, t)
        with torch.no_grad():
            n = len(z_t)
            first = z[:n], raw[:n], t[:n]
            output_t = preconditioner.output_tangent(*first, z_t, _images(tokens_t, z), t_t)
            v_t = prediction.velocity_tangent(z[:n], output[:n], t[:n], z_t, output_t, t_t)
        return prediction.velocity(z, output, t), v_t

    def _has_kernel(self) -> bool:
        return type(self.prediction) is XPrediction and type(self.preconditioner) is NoPreconditioner


def _beside(z: Tensor, tokens: Tensor) -> Tensor:
    """Tokens in a dtype the kernel accepts with z: z's, or 16-bit with float32."""
    narrow = z.dtype == torch.float32 and tokens.element_size() == 2
    return tokens if narrow else tokens.to(z.dtype)


def _images(tokens: Tensor, z: Tensor) -> Tensor:
    return to_images(tokens, *z.shape[1:]).to(z.dtype)
