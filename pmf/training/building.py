"""Build the network, objective and optimizer from a configuration."""

import dataclasses

import torch

from pmf import flow, models, optim, perceptual
from pmf.errors import UserError
from pmf.training.config import TrainConfig


def model_config(config: TrainConfig, num_classes: int) -> models.ModelConfig:
    """The model configuration: the model preset, with the given settings replaced."""
    given = {name: value for name, value in vars(config.model).items() if value is not None}
    preset = given.pop("model", None)
    for name in ("sample_omega", "sample_interval"):
        if (value := getattr(config.sampling, name)) is not None:
            given[name] = value
    if not config.objective.guidance:  # such a network is trained at omega = 1 only
        given.update(sample_omega=1.0, sample_interval=(0.0, 1.0))
    if preset is not None and preset not in models.CONFIGS:
        raise UserError(f"there is no model preset {preset!r}: choose one of {', '.join(models.CONFIGS)}")
    base = models.CONFIGS[preset] if preset else models.ModelConfig()
    try:
        return dataclasses.replace(base, num_classes=num_classes, **given)
    except ValueError as error:
        raise UserError(str(error)) from error


def build_objective(config: TrainConfig, noise_scale: float) -> flow.Objective:
    """Build the objective from a configuration."""
    settings = config.objective
    plane = flow.PlaneTimes(
        mean=settings.time_mean,
        std=settings.time_std,
        data_proportion=settings.data_proportion,
        uniform_fraction=settings.uniform_fraction,
    )
    try:
        guided = flow.IntervalGuidance(max_omega=settings.max_omega, beta=settings.omega_beta)
    except ValueError as error:  # from omega_beta, since only that range depends on another setting
        raise UserError(str(error)) from error
    return flow.Objective(
        noise_scale=noise_scale,
        row_multiple=config.run.row_multiple,
        norm_p=settings.norm_p,
        norm_eps=settings.norm_eps,
        class_dropout=settings.class_dropout,
        v_head=config.model.v_head,
        times=plane if settings.times == "plane" else flow.LineTimes(plane, settings.times),
        guidance=guided if settings.guidance else flow.NoGuidance(),
        perceptual=perceptual.build(
            settings.perceptual,
            lpips_lambda=settings.lpips_lambda,
            convnext_lambda=settings.convnext_lambda,
            max_t=settings.perceptual_max_t,
            size=settings.perceptual_size,
            weights=settings.perceptual_weights,
            compute_dtype=torch.bfloat16 if config.run.precision == "bf16" else torch.float32,
        ),
    )


def build_optimizer(config: TrainConfig, model: models.PixelMeanFlow, replicated: bool = False) -> optim.Muon:
    """Build the optimizer from a configuration: Muon with Adam, or Adam for every parameter.

    replicated: every rank holds all parameters and computes gradients of its own samples.
    """
    settings = config.optimizer
    adam_alone = settings.optimizer == "adam"
    everything = [{"params": list(model.named_parameters()), "algorithm": "adam"}]
    return optim.Muon(
        everything if adam_alone else model,
        lr=settings.lr,
        adam_lr=settings.adam_lr,
        preset="pmf",
        compute_dtype=torch.bfloat16 if config.run.precision == "bf16" and not adam_alone else None,
        process_group=torch.distributed.group.WORLD if replicated else None,
    )
