"""Counted work against the paper's number, PyTorch's counter, and the objective as executed."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pmf import flow, models
from pmf.cli import main
from pmf.flow.plan import make_plan
from pmf.models import ModelConfig, PixelMeanFlow
from pmf.reference.network import network
from pmf.training import flops, get_preset

TINY = ModelConfig(
    num_classes=3, image_size=16, patch_size=4, hidden_size=24, depth=3, head_depth=1, num_heads=2
)


def meta_model(config: ModelConfig) -> PixelMeanFlow:
    with torch.device("meta"):
        return PixelMeanFlow(config)


def plain_count(config: ModelConfig) -> int:
    """Half of FlopCounterMode's count on the plain network, which computes every block in full."""
    model = meta_model(config)
    with torch.device("meta"):
        images = torch.empty(1, config.channels, config.image_size, config.image_size)
        scalar, labels = torch.empty(1), torch.empty(1, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(model.state_dict(), images, *[scalar] * 4, labels, num_heads=config.num_heads, head="u")
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("config", [TINY, replace(TINY, patch_size=2, mlp_width=20, bottleneck=8)])
def test_products_match_pytorchs_count(config: ModelConfig) -> None:
    assert flops.product_multiply_adds(config) == plain_count(config)


@pytest.mark.parametrize(("preset", "giga"), [("pmf-h/16", 271)])
def test_the_count_matches_the_paper(preset: str, giga: int) -> None:
    config = models.CONFIGS[preset]
    assert round(flops.paper_multiply_adds(config) / 1e9) == giga
    # All but a part in three hundred is matrix products.
    assert 0.997 < flops.product_multiply_adds(config) / flops.paper_multiply_adds(config) < 1


def test_512_and_1024_pixels_cost_nearly_the_same() -> None:
    small, *large = (
        flops.paper_multiply_adds(models.CONFIGS[name]) for name in ("pmf-b/16", "pmf-b/32", "pmf-b/64")
    )
    assert all(small < cost < 1.1 * small for cost in large)


def test_training_cost_is_that_of_the_executed_objective() -> None:
    """The counted work of a batch of the objective matches its numbers of passes and tangents."""
    training = get_preset("pmf-b/16")
    cost = flops.count_cost(TINY, training)
    model, batch = meta_model(TINY), 64
    objective = flow.Objective()
    labels = torch.zeros(batch, dtype=torch.int64)
    images = torch.empty(batch, 3, 16, 16, device="meta")
    draws = objective.draw(torch.empty(batch, 1, 1, 1), labels, torch.Generator().manual_seed(1))
    plan = make_plan(draws, objective.guidance, torch.float32)
    with FlopCounterMode(display=False) as counter:
        draws = draws._replace(noise=torch.empty_like(images))
        objective(model, images, labels.to("meta"), draws).loss.backward()
    executed = counter.get_total_flops() / 2
    # The same unit costs, with this batch's row counts instead of the mean.
    with pytest.MonkeyPatch.context() as patched:
        rows = plan.num_tangents / batch, (len(plan.conditional) + len(plan.guided)) / batch
        patched.setattr(flops, "_mean_rows", lambda _: rows)
        assert flops.count_cost(TINY, training).training * batch == pytest.approx(executed, rel=1e-12)
    assert executed / batch == pytest.approx(cost.training, rel=0.1)


def test_the_table_and_the_exact_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", "pmf-b/16"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:6] == ["pmf-b/16", "256", "118.2", "175.5", "33.4", "33.2"]
    assert [line.split()[-1] for line in table[2:]] == ["1574", "310", "1230"]
    assert main(["flops", "digits", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    cost = record["presets"]["digits"]
    assert cost["sampling_paper"] == flops.paper_multiply_adds(models.CONFIGS["digits"])
    assert cost["sampling"] < flops.product_multiply_adds(models.CONFIGS["digits"])
    assert main(["flops", "pmf-z/16"]) == 2
    assert "there is no preset 'pmf-z/16': choose one of" in capsys.readouterr().err
