"""The table of training presets: the authors' recipe at six sizes, one size of our own, and the digits."""

from typing import Any

from pmf.errors import UserError
from pmf.training.config import (
    DataSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunSettings,
    SamplingSettings,
    TrainConfig,
)

_IMAGENET_STEPS = 400_000  # 320 epochs of 1,281,167 images in batches of 1024


def _imagenet(model: str, kimg: float, mean: float, beta: float = 1.0, uniform: float = 0.0) -> TrainConfig:
    """The recipe of the paper: batch 1024, Muon and Adam at 1e-3, three moving averages."""
    return TrainConfig(
        preset=model,
        data=DataSettings(data="imagenet"),
        model=ModelSettings(model=model),
        objective=ObjectiveSettings(time_mean=mean, omega_beta=beta, uniform_fraction=uniform),
        run=RunSettings(steps=_IMAGENET_STEPS, checkpoint_every=5000),
        sampling=SamplingSettings(sample_every=5000, sample_ema=kimg),
    )


PRESETS: dict[str, TrainConfig] = {
    "digits": TrainConfig(
        preset="digits",
        data=DataSettings(data="digits", batch_size=128),
        model=ModelSettings(model="digits"),
        objective=ObjectiveSettings(time_mean=0.0, time_std=1.0),
        optimizer=OptimizerSettings(ema_half_lives=(25.0, 50.0, 100.0)),
        run=RunSettings(minutes=4.0, checkpoint_every=2000),
        sampling=SamplingSettings(
            sample_every=1000, sample_ema=50.0, sample_omega=2.0, sample_interval=(0.1, 0.9)
        ),
    ),
    "pmf-b/16": _imagenet("pmf-b/16", 2000, mean=0.8),
    "pmf-b/32": _imagenet("pmf-b/32", 2000, mean=0.8),
    "pmf-l/16": _imagenet("pmf-l/16", 1000, mean=0.8, beta=2.0),
    "pmf-l/32": _imagenet("pmf-l/32", 2000, mean=0.0),
    "pmf-h/16": _imagenet("pmf-h/16", 1000, mean=0.0, uniform=0.1),
    "pmf-h/32": _imagenet("pmf-h/32", 500, mean=0.0, uniform=0.1),
    "pmf-b/64": _imagenet("pmf-b/64", 2000, mean=0.8),
}


def get_preset(name: str, **overrides: Any) -> TrainConfig:
    """A preset of the table with settings replaced by name: ``get_preset("digits", minutes=10, seed=1)``."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name].with_settings(**overrides)
