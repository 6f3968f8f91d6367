"""model.checkpointing = "blocks": the same numbers and less memory for recomputing the values once."""

import pytest
import torch
from helpers.memory import peak_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pmf.flow import Objective
from pmf.models import ModelConfig, PixelMeanFlow

BATCH = 4
CONFIG = ModelConfig(
    num_classes=5,
    image_size=16,
    patch_size=2,
    channels=2,
    hidden_size=32,
    depth=8,
    head_depth=2,
    num_heads=2,
    condition_tokens=(2, 1, 1, 2, 3),
    bottleneck=12,
)


@pytest.fixture(scope="module")
def model() -> PixelMeanFlow:
    torch.manual_seed(0)
    model = PixelMeanFlow(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def step(model: torch.nn.Module, checkpointing: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a batch half of which has tangents."""
    inner = getattr(model, "_orig_mod", model)
    inner.checkpointing = checkpointing
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 2, 16, 16, generator=generator) * 2 - 1
    labels = torch.randint(5, (BATCH,), generator=generator)
    objective = Objective()
    draws = objective.draw(images, labels, generator)
    inner.zero_grad()
    loss = objective(model, images, labels, draws).loss
    loss.backward()
    inner.checkpointing = "none"
    return loss.detach(), {name: p.grad.clone() for name, p in inner.named_parameters()}


def test_same_bits(model: PixelMeanFlow) -> None:
    loss, gradients = step(model, "none")
    again, recomputed = step(model, "blocks")
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_compiled(model: PixelMeanFlow) -> None:
    loss, gradients = step(model, "none")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again, recomputed = step(compiled, "blocks")
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_less_memory(model: PixelMeanFlow) -> None:
    """Most of this step's memory is the saved rows of eight blocks and their heads."""
    peak = {mode: peak_bytes(lambda mode=mode: step(model, mode)) for mode in ("none", "blocks")}
    assert peak["blocks"] < 0.6 * peak["none"], peak


def test_blocks_recompute_values_once_and_no_tangents(model: PixelMeanFlow) -> None:
    flops = {}
    for mode in ("none", "blocks"):
        with FlopCounterMode(display=False) as counter:
            step(model, mode)
        flops[mode] = counter.get_total_flops()
    tokens, image, hidden = CONFIG.num_tokens, CONFIG.num_image_tokens, CONFIG.hidden_size
    width = model.u_head[0].mlp.w1.out_features

    def block(queries: int) -> int:
        """q, k, v, the scores and their product with v, the output, the MLP: for `queries` of all tokens."""
        projections = 3 * tokens * hidden * hidden + queries * hidden * hidden
        return 2 * BATCH * (projections + 2 * queries * tokens * hidden + 3 * queries * hidden * width)

    whole = CONFIG.depth - CONFIG.head_depth + 2 * (CONFIG.head_depth - 1)
    assert flops["blocks"] - flops["none"] == whole * block(tokens) + 2 * block(image)


def test_it_is_not_stored_in_checkpoints(model: PixelMeanFlow) -> None:
    assert not any("checkpointing" in name for name in model.state_dict())
    assert not hasattr(CONFIG, "checkpointing")


def test_other_values_are_rejected(model: PixelMeanFlow) -> None:
    with pytest.raises(ValueError, match="checkpointing must be 'none' or 'blocks', got 'all'"):
        model.checkpointing = "all"
    assert model.checkpointing == "none"
