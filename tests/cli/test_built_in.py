"""The checkpoint that comes with the package, and ``pmf convert --for-sampling``, which wrote it."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers.pmf_process import run_in

import pmf
from pmf import checkpoint, models
from pmf.cli import main
from pmf.training.config import TrainConfig

DIGITS = checkpoint.BUILT_IN["digits"]


def test_a_first_picture_needs_only_a_name(tmp_path: Path) -> None:
    done = run_in(tmp_path, "sample", "digits", "--classes", "all", "--seeds", "0-1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"20 images in fp32 from {DIGITS}\ngrid: samples/grid.png\n"
    assert len(list((tmp_path / "samples").iterdir())) == 21


def test_its_samples_are_digits_of_the_requested_class() -> None:
    """According to a nearest-neighbour classifier, independent of the network."""
    datasets = pytest.importorskip("sklearn.datasets")
    real = datasets.load_digits()
    labels = torch.arange(10).repeat_interleave(20)
    samples = pmf.sample(pmf.load_checkpoint("digits"), labels, generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(real.data / 8 - 1, dtype=torch.float32)
    nearest = torch.cdist(samples.flatten(1).clamp(-1, 1), pixels).argmin(1)
    assert float((torch.tensor(real.target)[nearest] == labels).float().mean()) > 0.95


def test_its_record_is_about_this_file_and_it_is_small() -> None:
    record = json.loads(DIGITS.with_suffix(".json").read_text())
    assert record["sha256"] == hashlib.sha256(DIGITS.read_bytes()).hexdigest()
    assert record["commands"][-1].startswith("pmf convert") and record["device"]
    config = TrainConfig.from_json(record["settings"])
    assert config.preset == "digits" and config.run.steps == record["steps"]
    assert DIGITS.stat().st_size < 2.5e6


def test_a_folder_of_that_name_takes_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "digits"]) == 2
    assert "digits contains no complete checkpoint" in capsys.readouterr().err
    assert main(["sample", "letters"]) == 2
    assert capsys.readouterr().err == "error: there is no checkpoint letters; built in: digits\n"


def test_for_sampling_is_half_the_size_and_gives_the_same_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = models.create_model("digits")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    full, small = tmp_path / "full.safetensors", tmp_path / "small.safetensors"
    full.write_bytes(checkpoint.weights_bytes(weights, model.config, list("0123456789")))
    assert main(["convert", str(full), str(small), "--for-sampling"]) == 0
    assert small.stat().st_size < 0.5 * full.stat().st_size
    read = checkpoint.load_checkpoint(small)
    assert read.position.dtype == torch.float32
    images = [
        pmf.sample(network, range(10), generator=torch.Generator().manual_seed(1))
        for network in (model.eval(), read)
    ]
    assert (images[0] - images[1]).abs().max() < 0.01  # a grey level is 2 / 255

    assert main(["convert", str(full), str(tmp_path / "theirs.pth"), "--for-sampling"]) == 2
    assert "--for-sampling writes .safetensors" in capsys.readouterr().err
    weights["position"] = torch.full_like(weights["position"], 1e5)
    full.write_bytes(checkpoint.weights_bytes(weights, model.config, list("0123456789")))
    assert main(["convert", str(full), str(tmp_path / "large.safetensors"), "--for-sampling"]) == 2
    assert "position of" in capsys.readouterr().err and not (tmp_path / "large.safetensors").exists()
