"""What the network predicts, and the velocity that follows from it."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from pmf.models import ModelConfig

from .path import T_FLOOR, conditional_velocity, per_sample

__all__ = ["PREDICTIONS", "Prediction", "UPrediction", "XPrediction", "prediction_of"]


@runtime_checkable
class Prediction(Protocol):
    """Maps an output [B, ...] at (z, t) to a velocity, and tangents of all three to the velocity's."""

    def velocity(self, z: Tensor, output: Tensor, t: Tensor) -> Tensor: ...

    def velocity_tangent(
        self, z: Tensor, output: Tensor, t: Tensor, z_t: Tensor, output_t: Tensor, t_t: Tensor
    ) -> Tensor: ...


class XPrediction:
    """The output is an image x: u = (z - x) / clip(t, 0.05, 1), for both heads (arXiv 2601.22158)."""

    def velocity(self, z: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return conditional_velocity(z, output, t)

    def velocity_tangent(
        self, z: Tensor, output: Tensor, t: Tensor, z_t: Tensor, output_t: Tensor, t_t: Tensor
    ) -> Tensor:
        """tu = (tz - tx - u tt) / t for t >= 0.05; below, where the clip is constant, without u tt."""
        moving = (t >= T_FLOOR) & (t <= 1.0)
        clipped = t.clamp(T_FLOOR, 1.0)
        direct = (z_t - output_t) / per_sample(clipped, z)
        return direct - per_sample(t_t * moving / clipped.square(), z) * (z - output)


class UPrediction:
    """The output is the velocity itself, for both heads (MeanFlow, arXiv 2505.13447).

    It must contain the noise, which fills all dimensions of a patch, whereas images fill few.
    """

    def velocity(self, z: Tensor, output: Tensor, t: Tensor) -> Tensor:
        return output

    def velocity_tangent(
        self, z: Tensor, output: Tensor, t: Tensor, z_t: Tensor, output_t: Tensor, t_t: Tensor
    ) -> Tensor:
        return output_t


PREDICTIONS: dict[str, Prediction] = {"x": XPrediction(), "u": UPrediction()}
"""The predictions by name."""


def prediction_of(config: ModelConfig, given: Prediction | str | None = None) -> Prediction:
    """The prediction given, an object or its name; by default the one in a model's configuration."""
    chosen = config.prediction if given is None else given
    found = PREDICTIONS.get(chosen) if isinstance(chosen, str) else chosen
    if isinstance(found, type) or not isinstance(found, Prediction):
        raise ValueError(f"prediction must be {' or '.join(PREDICTIONS)}, or a Prediction, got {given!r}")
    return found
