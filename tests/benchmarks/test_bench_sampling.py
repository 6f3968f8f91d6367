"""The sampling benchmark compares images before timing anything."""

import json
import re
import subprocess
import sys
from pathlib import Path

import bench_sampling
import pytest
import torch
from helpers.pmf_process import environment
from training_step import flops

SCRIPT = Path(bench_sampling.__file__)


def test_psnr_of_a_known_difference():
    images = torch.zeros(2, 3, 4, 4)
    assert bench_sampling.psnr(images + 0.02, images) == pytest.approx(40.0)  # a hundredth of the range
    assert bench_sampling.psnr(images, images) == float("inf")
    assert not bench_sampling.psnr(images * torch.nan, images) >= bench_sampling.LEAST_PSNR


def test_rounds_are_compared_one_by_one():
    assert bench_sampling.median_ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


def test_images_that_differ_end_the_run_before_anything_is_timed(monkeypatch, capsys):
    plain = bench_sampling.plain_port.sample
    monkeypatch.setattr(bench_sampling.plain_port, "sample", lambda *args: 0.99 * plain(*args))
    monkeypatch.setattr(sys, "argv", ["bench_sampling.py", "--quick", "--batch-size", "2"])
    assert bench_sampling.main() == 1
    printed = capsys.readouterr()
    assert "nothing was timed" in printed.err and "images_per_second_ratio" not in printed.out


def test_products_alone_are_all_that_a_sampler_computes():
    sample = bench_sampling.make_runs(bench_sampling.QUICK, 2, torch.device("cpu"))[bench_sampling.PLAIN]
    assert flops.counted(bench_sampling.products_alone(sample)) == flops.counted(sample) > 1e6


def test_quick_run_ends_with_ratio_and_psnr(tmp_path: Path):
    out = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--batch-size", "2", "--out", str(out)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    match = re.fullmatch(r"images_per_second_ratio=(\d+\.\d+) psnr_db=(\d+\.\d+)", last)
    assert match and float(match[1]) > 0 and float(match[2]) >= bench_sampling.LEAST_PSNR
    record = json.loads(out.read_text())
    *ours, products, plain = (row["contestant"] for row in record["rows"])
    assert "(its default)" in ours[0] and "pmf, fp32" in ours[-1]
    assert (products, plain) == (bench_sampling.PRODUCTS, bench_sampling.PLAIN)
    over = {row["contestant"]: row["time_over_products"] for row in record["rows"]}
    assert over[products] == 1 and over[plain] > 0 and record["rows"][0]["images_per_second_ratio"] == 1
    assert record["float32_error"] < bench_sampling.FLOAT32_LIMIT
