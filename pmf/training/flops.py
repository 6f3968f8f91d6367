"""Multiply-adds of one-step sampling and of a training step, counted on meta tensors.

A sample is counted in two ways. `paper_multiply_adds` follows the paper: every block in full, half of all
floating-point operations, elementwise ones included; it reproduces the paper's 271 G for pMF-H/16 (matrix
products alone are 270.4 G). What this library executes is counted with PyTorch's FlopCounterMode, as half the
operations of matrix products; it is less because the last block skips the condition tokens, whose outputs are
unused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pmf.flow.plan import make_plan
from pmf.models import ModelConfig, PixelMeanFlow
from pmf.nn import Condition, ScalarEmbedder
from pmf.ops._flops import orthogonalisation_flops
from pmf.optim.routing import route
from pmf.training.building import build_objective
from pmf.training.config import TrainConfig

__all__ = ["Cost", "PEERS", "count_cost", "paper_multiply_adds", "product_multiply_adds"]

PEERS = {"StyleGAN-XL": {256: 1574e9}, "a latent model's decoder alone": {256: 310e9, 512: 1230e9}}
"""Multiply-adds per image by image size, as quoted in the paper (arXiv 2601.22158)."""

_DRAWN = 8192  # random draws averaged for the mean work of a training step
# Floating-point operations per element.
_NORM, _ROTATION, _SOFTMAX, _SWIGLU, _GATE = 4, 3, 5, 5, 2


@dataclass(frozen=True)
class Cost:
    """The cost of one preset; multiply-adds are per image, `optimizer` per step."""

    parameters_sampling: int
    parameters_training: int
    sampling_paper: float
    """A one-step sample, counted as in the paper."""
    sampling: float
    """A one-step sample, as executed."""
    training: float
    """Objective and backward, as executed, averaged over the draws of t, r and omega."""
    optimizer: float
    """Muon's orthogonalisation of all its matrices."""


def product_multiply_adds(config: ModelConfig) -> int:
    """Multiply-adds of all matrix products from image to u, every block in full.

        depth N (4 D^2 + 3 D W + 2 N D) + patches (p R + R D + D p) + 4 (256 D + D^2)

    N tokens of width D, MLP width W, p = C patch^2 pixels per patch, R the bottleneck of the embedding.
    """
    sizes = _Sizes(config)
    n, d, w = config.num_tokens, config.hidden_size, sizes.mlp_width
    blocks = config.depth * n * (4 * d * d + 3 * d * w + 2 * n * d)
    pixels, patches = config.channels * config.patch_size**2, config.num_image_tokens
    ends = patches * (pixels * sizes.bottleneck + sizes.bottleneck * d + d * pixels)
    return blocks + ends + 4 * (ScalarEmbedder.features * d + d * d)


def paper_multiply_adds(config: ModelConfig) -> float:
    """`product_multiply_adds` plus half the blocks' elementwise operations.

    An addition, multiplication, division or exponential counts as one operation: a norm takes 4 per element
    (square, sum, scale, weight), softmax 5 per score (scale, maximum, exponential, sum, quotient).
    """
    n, d, patches = config.num_tokens, config.hidden_size, config.num_image_tokens
    block = (
        4 * n * d * _NORM  # before each branch, and of queries and keys
        + 2 * patches * d * _ROTATION
        + config.num_heads * n * n * _SOFTMAX
        + n * _Sizes(config).mlp_width * _SWIGLU
        + 2 * n * d * _GATE
    )
    return product_multiply_adds(config) + (config.depth * block + patches * d * _NORM) / 2


def count_cost(config: ModelConfig, training: TrainConfig) -> Cost:
    """The cost of a model and of training it with these settings, without the perceptual networks."""
    sizes = _Sizes(config)
    model = sizes.model
    with torch.device("meta"):
        image, scalar = torch.empty(1, *config.image_shape), torch.empty(1)
        label = torch.empty(1, dtype=torch.int64)
    condition = Condition(scalar, scalar, scalar, scalar, label)
    tangents = (image, scalar)

    def train(*inputs: Any) -> None:
        out = model(image, condition, *inputs, heads="uv")
        (out.u.sum() + out.v.sum()).backward()

    with torch.no_grad():
        sampling = _count(lambda: model(image, condition))
        guidance = _count(lambda: model(image, condition, heads="v"))
    plain = _count(train)
    tangent = _count(lambda: train(*tangents)) - plain
    with_tangent, guidance_rows = _mean_rows(training)
    v_path = sum(p.numel() for name, p in model.named_parameters() if name.startswith("v_"))
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(
        parameters - v_path,
        parameters,
        paper_multiply_adds(config),
        sampling,
        plain + with_tangent * tangent + guidance_rows * guidance,
        _orthogonalisation(model),
    )


class _Sizes:
    """The model on the meta device, and the widths its configuration leaves to defaults."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            self.model = PixelMeanFlow(config)
        self.bottleneck = len(self.model.patch_embedding.weight_down)
        self.mlp_width = len(self.model.u_head.get_submodule("0").get_parameter("mlp.w1.weight"))


def _mean_rows(training: TrainConfig) -> tuple[float, float]:
    """The fraction of images with a tangent, and the guidance passes per image."""
    objective = build_objective(training.with_settings(perceptual="none"), noise_scale=1.0)
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.empty(_DRAWN, 1, 1, 1, dtype=torch.float32, device="cpu")
    draws = objective.draw(images, torch.zeros(_DRAWN, dtype=torch.int64, device="cpu"), generator)
    plan = make_plan(draws, objective.guidance, torch.float32)
    return plan.num_tangents / _DRAWN, (len(plan.conditional) + len(plan.guided)) / _DRAWN


def _orthogonalisation(model: PixelMeanFlow) -> float:
    groups = [group["params"] for group in route(model) if group["algorithm"] == "muon"]
    matrices = [matrix for group in groups for _, matrix in group]
    return sum(orthogonalisation_flops(*matrix.shape) for matrix in matrices) / 2


def _count(run: Callable[[], object]) -> float:
    """Multiply-adds: half the operations of all matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2
