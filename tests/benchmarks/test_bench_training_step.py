"""The training-step benchmark detects mistakes before timing anything, and its counts are correct."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.pmf_process import environment
from plain_port import Sizes
from training_step import agreement, flops, memory, sides
from training_step.sides import SMALL, Ours, Port, draw_batch, make_model

from pmf.flow import XPrediction

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_training_step.py"


class NoTangent(XPrediction):
    """Simulates torch.func.jvp on an op without a forward mode."""

    def velocity_tangent(self, *args, **options):
        return torch.zeros_like(super().velocity_tangent(*args, **options))


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_a_zero_tangent_is_detected_in_every_precision(precision: str):
    model = make_model(SMALL)
    _, batch = next(b for b in agreement.batches(precision) if b[0] == "no flow-matching")
    ours, port = Ours(model, precision), Port(model, SMALL, precision)
    ours.objective = type(ours.objective)(prediction=NoTangent())
    errors = agreement.differences(*(agreement.evaluate(side, batch) for side in (ours, port)))
    found = agreement.row("", precision, SMALL, errors)
    assert not found["agrees"]
    assert found["loss_u"] > found["limit"] > found["loss_v"]


def test_a_gradient_that_should_be_zero_is_detected():
    zero, one = torch.zeros(3), torch.ones(3)
    assert agreement.relative_error(zero, zero) == 0
    assert (
        agreement.relative_error(one, zero) == agreement.relative_error(one * torch.nan, one) == float("inf")
    )


def test_disagreement_ends_the_run_before_anything_is_timed(monkeypatch, capsys):
    import bench_training_step

    monkeypatch.setattr(agreement, "CASES", {"batch of 1": [agreement.MEANFLOW]})
    monkeypatch.setattr(agreement, "limit", lambda precision, depth: 0.0)
    monkeypatch.setattr(sys, "argv", ["bench_training_step.py", "--quick"])
    assert bench_training_step.main() == 1
    printed = capsys.readouterr()
    assert "DISAGREES" in printed.out and "nothing was timed" in printed.err
    assert "step_time_ratio" not in printed.out


def test_the_count_is_the_derivation_by_hand_plus_its_omissions():
    """Depth 4 with heads of depth 2, one draw: every unit is accounted for."""
    sizes, batch_size = Sizes(depth=4, head_depth=2), 8
    counted = flops.count(sizes, batch_size, draws=1)["units"]
    draws = draw_batch(sizes._replace(image_size=16), batch_size, seed=0).draws
    assert torch.equal(draws.r == draws.t, torch.arange(batch_size) < 4)  # half are MeanFlow samples
    port = 12 + 12 + 18  # training pass with tangents, backward, three guidance passes of both heads
    # Beyond the blocks: embeddings and final layers, attention's tangents and recomputed scores.
    assert 1 < counted["port, without products with zero tangents"] / port < 1.08
    zero_products = counted["port"] - counted["port, without products with zero tangents"]
    assert 0.95 < zero_products / 6 < 1.05  # six blocks once more, without attention's products
    skipped = counted["port"] - counted["port, guidance by the v path alone"]
    assert 1 < skipped / 6 < 1.08  # three times two blocks of the u head
    # Guidance at least: v_c of four samples through four blocks; at most also v_u of all others.
    least, most = 6 + 2 + 12 + 2, 6 + 2 + 12 + 2 + 4
    assert least < counted["ours"] < 1.08 * most


def test_memory_is_the_growth_over_the_loaded_model():
    """With twice the batch, the optimizer's share stays the same and activations double."""
    small, large = (memory.growth("pmf", "fp32", SMALL, batch) for batch in (64, 256))
    batch_bytes = 4 * SMALL.channels * SMALL.image_size**2
    assert 192 * batch_bytes < large - small


def test_quick_run_ends_with_the_three_ratios(tmp_path: Path):
    out = tmp_path / "record.json"
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--quick",
            "--rounds",
            "1",
            "--also",
            "careful",
            "checkpointing",
            "--out",
            str(out),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    number = r"(\d+\.\d+)"
    last = done.stdout.splitlines()[-1]
    match = re.fullmatch(f"step_time_ratio={number} flops_ratio={number} peak_memory_ratio={number}", last)
    assert match and all(float(ratio) > 0 for ratio in match.groups())
    record = json.loads(out.read_text())
    assert record["command"].startswith("python benchmarks/bench_training_step.py --quick")
    parts = {row["part"] for row in record["rows"]}
    assert parts == {"agreement", "time", "flops", "memory"}
    assert all(row["agrees"] for row in record["rows"] if row["part"] == "agreement")
    contestants = {row["contestant"] for row in record["rows"] if row["part"] == "time"}
    assert contestants == {sides.OURS, sides.PORT, sides.CAREFUL, sides.CHECKPOINTING}
    cases = {(row["precision"], row["case"]) for row in record["rows"] if row["part"] == "agreement"}
    assert {(p, case) for p in ("fp64", "fp32", "bf16") for case in agreement.CASES} < cases
