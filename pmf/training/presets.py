"""Training presets: the authors' recipe at six sizes, one size of our own, digits and emoji."""

from typing import Any

from pmf.errors import UserError
from pmf.training.building import model_config
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


def _imagenet(
    model: str, kimg: float, mean: float, max_t: float = 0.8, beta: float = 1.0, uniform: float = 0.0
) -> TrainConfig:
    """The paper's recipe: batch 1024, Muon and Adam at 1e-3, three averages, LPIPS and ConvNeXt."""
    return TrainConfig(
        preset=model,
        data=DataSettings(data="imagenet"),
        model=ModelSettings(model=model),
        objective=ObjectiveSettings(
            time_mean=mean,
            omega_beta=beta,
            uniform_fraction=uniform,
            perceptual="both",
            perceptual_max_t=max_t,
        ),
        run=RunSettings(steps=_IMAGENET_STEPS, checkpoint_every=5000),
        sampling=SamplingSettings(sample_every=5000, sample_ema=kimg),
    )


PRESETS: dict[str, TrainConfig] = {
    "digits": TrainConfig(
        preset="digits",
        data=DataSettings(data="digits", batch_size=128),
        model=ModelSettings(model="digits"),
        # Sampling starts at t = 1, so the times must reach it (the paper's rarely exceed 0.97). Almost no
        # guidance: these classes need none, and it costs diversity. A high rate that decays to 0 within the
        # budget.
        objective=ObjectiveSettings(time_mean=1.2, time_std=1.4, uniform_fraction=0.3, max_omega=1.5),
        optimizer=OptimizerSettings(lr=7e-3, cooldown=0.7, ema_half_lives=(3.0, 10.0, 30.0)),
        run=RunSettings(minutes=4.0, checkpoint_every=2000),
        sampling=SamplingSettings(
            sample_every=1000, sample_ema=10.0, sample_omega=1.0, sample_interval=(0.0, 1.0)
        ),
    ),
    # The categories of an emoji package at 32 pixels (pmf/data/emoji.py), sized for two hours on two
    # processor cores. The perceptual loss takes almost half of them.
    "emoji": TrainConfig(
        preset="emoji",
        data=DataSettings(data="package", batch_size=128),
        model=ModelSettings(model="emoji"),
        objective=ObjectiveSettings(
            time_mean=0.8,
            time_std=1.2,
            uniform_fraction=0.3,
            max_omega=4.0,
            perceptual="stlpips-vgg",
            perceptual_size=32,
        ),
        optimizer=OptimizerSettings(lr=4e-3, cooldown=0.5, ema_half_lives=(10.0, 30.0, 100.0)),
        run=RunSettings(minutes=120.0, checkpoint_every=250),
        sampling=SamplingSettings(
            sample_every=250, sample_ema=30.0, sample_omega=2.0, sample_interval=(0.0, 1.0)
        ),
    ),
    # Fashion-MNIST in large patches, half a minute per core: the base of `pmf ablate`.
    "fashion": TrainConfig(
        preset="fashion",
        data=DataSettings(data="fashion-mnist", batch_size=64),
        model=ModelSettings(
            image_size=28,
            patch_size=14,
            channels=1,
            hidden_size=96,
            depth=4,
            head_depth=2,
            num_heads=3,
            condition_tokens=(2, 1, 1, 1, 1),
            bottleneck=32,
            mlp_width=256,
        ),
        objective=ObjectiveSettings(time_mean=1.2, time_std=1.4, uniform_fraction=0.3, max_omega=1.5),
        optimizer=OptimizerSettings(lr=5e-3, cooldown=0.5, ema_half_lives=(1.0, 3.0)),
        run=RunSettings(steps=500),
        sampling=SamplingSettings(sample_ema=3.0, sample_omega=1.0, sample_interval=(0.0, 1.0)),
    ),
    "pmf-b/16": _imagenet("pmf-b/16", 2000, mean=0.8),
    "pmf-b/32": _imagenet("pmf-b/32", 2000, mean=0.8),
    "pmf-l/16": _imagenet("pmf-l/16", 1000, mean=0.8, beta=2.0),
    "pmf-l/32": _imagenet("pmf-l/32", 2000, mean=0.0, max_t=0.6),
    "pmf-h/16": _imagenet("pmf-h/16", 1000, mean=0.0, max_t=0.6, uniform=0.1),
    "pmf-h/32": _imagenet("pmf-h/32", 500, mean=0.0, max_t=0.6, uniform=0.1),
    "pmf-b/64": _imagenet("pmf-b/64", 2000, mean=0.8),
}


def get_preset(name: str, **overrides: Any) -> TrainConfig:
    """A preset with settings replaced by name: ``get_preset("digits", minutes=10, seed=1)``."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name].with_settings(**overrides)


def quick(config: TrainConfig, ranks: int = 1) -> TrainConfig:
    """A smoke test: two steps of a small network with all other settings as given, to check command and data.

    Two blocks of width 32, one of them in each head, and at most 8 images per micro-batch.
    """
    model_config(config, 1)  # raises UserError as the long run would
    most = 8 * ranks * config.data.accumulate
    return config.with_settings(
        steps=2,
        minutes=None,
        log_every=1,
        batch_size=min(config.data.batch_size, most),
        hidden_size=32,
        depth=2,
        head_depth=1,
        num_heads=2,
        mlp_width=64,
    )
