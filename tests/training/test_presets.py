"""Every number in the authors' table, and one step of each preset."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from pmf import models
from pmf.training import PRESETS, get_preset
from pmf.training.building import build_objective, model_config


class Row(NamedTuple):
    """A line of the table: image, patch, width, depth, heads; noise; P_mean, P_std; sampling; averages."""

    image: int
    patch: int
    hidden: int
    depth: int
    heads: int
    noise_scale: float
    time_mean: float
    time_std: float
    perceptual_max_t: float
    omega: float
    interval: tuple[float, float]
    kimg: float


TABLE = {
    "pmf-b/16": Row(256, 16, 768, 16, 12, 1, 0.8, 0.8, 0.8, 7.5, (0.1, 0.8), 2000),
    "pmf-b/32": Row(512, 32, 768, 16, 12, 2, 0.8, 0.8, 0.8, 6.5, (0.1, 0.7), 2000),
    "pmf-l/16": Row(256, 16, 1024, 32, 16, 1, 0.8, 0.8, 0.8, 7.0, (0.2, 0.7), 1000),
    "pmf-l/32": Row(512, 32, 1024, 32, 16, 4, 0.0, 0.8, 0.6, 7.5, (0.2, 0.6), 2000),
    "pmf-h/16": Row(256, 16, 1280, 48, 16, 2, 0.0, 0.8, 0.6, 7.0, (0.2, 0.6), 1000),
    "pmf-h/32": Row(512, 32, 1280, 48, 16, 4, 0.0, 0.8, 0.6, 5.5, (0.1, 0.6), 500),
    "pmf-b/64": Row(1024, 64, 768, 16, 12, 4, 0.8, 0.8, 0.8, 6.5, (0.1, 0.7), 2000),  # ours, as b/32
}


@pytest.mark.parametrize("name", TABLE)
def test_the_settings_match_the_authors(name: str) -> None:
    config = get_preset(name)
    network, objective = model_config(config, 1000), config.objective
    assert network == models.CONFIGS[name]
    assert TABLE[name] == Row(
        network.image_size,
        network.patch_size,
        network.hidden_size,
        network.depth,
        network.num_heads,
        network.noise_scale,
        objective.time_mean,
        objective.time_std,
        objective.perceptual_max_t,
        network.sample_omega,
        network.sample_interval,
        config.sampling.sample_ema,
    )
    assert (network.head_depth, network.condition_tokens, network.num_tokens) == (8, (8, 4, 2, 2, 4), 276)
    assert config.sampling.sample_ema in config.optimizer.ema_half_lives == (500, 1000, 2000)


@pytest.mark.parametrize("name", TABLE)
def test_the_recipe_matches_the_authors(name: str) -> None:
    config = get_preset(name)
    objective, optimizer = config.objective, config.optimizer
    assert (config.data.batch_size, optimizer.lr, optimizer.adam_lr, optimizer.cooldown) == (
        1024,
        1e-3,
        None,
        0,
    )
    assert config.run.steps == pytest.approx(320 * 1_281_167 / 1024, rel=2e-3)  # 320 epochs of ImageNet
    assert (objective.norm_p, objective.norm_eps, objective.class_dropout) == (1, 0.01, 0.1)
    assert (objective.data_proportion, objective.max_omega) == (0.5, 8)
    assert objective.omega_beta == (2 if name == "pmf-l/16" else 1)
    assert objective.uniform_fraction == (0.1 if "-h/" in name else 0)
    assert (objective.perceptual, objective.lpips_lambda, objective.convnext_lambda) == ("both", 0.4, 0.1)


def test_the_table_has_every_preset_of_the_paper() -> None:
    assert list(TABLE) == [name for name in PRESETS if name.startswith("pmf-")]


@pytest.mark.parametrize("name", TABLE)
def test_a_step_of_each_fits_together(name: str) -> None:
    """Objective and backward on meta tensors, full width, few blocks: every weight gets its gradient."""
    config = get_preset(name, perceptual="none")
    with torch.device("meta"):
        model = models.PixelMeanFlow(replace(models.CONFIGS[name], depth=2, head_depth=1))
    objective = build_objective(config, model.config.noise_scale)
    size = model.config.image_size
    images, labels = torch.empty(4, 3, size, size, device="meta"), torch.arange(4)
    draws = objective.draw(torch.empty(4, 1, 1, 1), labels, torch.Generator().manual_seed(0))
    terms = objective(model, images, labels.to("meta"), draws._replace(noise=torch.empty_like(images)))
    assert terms.u.shape == images.shape and terms.loss.shape == ()
    terms.loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
