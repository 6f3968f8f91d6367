"""The whole workflow for a flat folder of wide images: train, resume, sample, evaluate, convert."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.pmf_process import TINY, run_in
from PIL import Image

from pmf.cli import main


def write_photos(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(6):
        pixels = random.integers(0, 256, (20, 44, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo {number}.2024.JPG", format="JPEG")
    (folder / "Thumbs.db").touch()


def test_train_resume_sample_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "flat")
    # The emoji preset has guidance in training and sampling: without classes it must be disabled.
    size = ["--image-size", "8x16", "--patch-size", "4"]
    preset = ["--preset", "emoji", "--perceptual", "none"]
    words = ["train", *preset, "--data", "flat", *size, *TINY, "--out", "run"]
    done = run_in(tmp_path, *words, "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "6 images without classes" in done.stdout
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: flat: left out 1 of unsupported type (Thumbs.db)",
        "note: the images have no classes: training is unconditional, guidance off",
    ]
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "run", "--steps", "3"]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["model"]["image_size"] == [8, 16] and settings["objective"]["guidance"] is False
    with Image.open("run/samples.png") as picture:
        columns, rows = 10 * 17 - 1, 8
        assert picture.width % columns == 0 and picture.size == (columns * 3, rows * 3)

    assert main(["sample", "run", "--seeds", "0-2", "--out", "drawn"]) == 0
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        *(f"class0000_seed000{seed}.png" for seed in range(3)),
        "grid.png",
    }
    with Image.open("drawn/class0000_seed0000.png") as picture:
        assert picture.size == (16, 8)
    evaluate = ["evaluate", "run", "--features", "pixels", "--reference", "flat", "--num-images", "4"]
    assert main([*evaluate, "--out", "figures"]) == 0
    assert json.loads((tmp_path / "figures" / "result.json").read_text())["frechet_distance"] > 0
    assert main([*evaluate, "--out", "kept", "--keep", "kept/images"]) == 0
    assert len(list((tmp_path / "kept" / "images" / "0000").iterdir())) == 4
    capsys.readouterr()
    for words in (["--omega", "2"], ["--interval", "0.2", "0.8"]):  # the network has never seen them
        for command in (["sample", "run"], evaluate):
            assert main([*command, *words, "--out", "unlearned"]) == 2
            said = capsys.readouterr().err
            assert f"ema-0.02.safetensors was trained without guidance: leave out {words[0]}" in said
    assert not Path("unlearned").exists()
    usual = ["--omega", "1", "--interval", "0", "1"]
    assert main(["sample", "run", *usual, "--seeds", "0", "--out", "drawn"]) == 0
    capsys.readouterr()
    assert main(["convert", "run", "one.pth"]) == 2
    assert "would take this model's 8x16 images for squares" in capsys.readouterr().err
    assert main(["convert", "run", "one.safetensors"]) == 0
    assert main(["sample", "one.safetensors", "--seeds", "0", "--out", "again"]) == 0
    assert main(["train", "--resume", "run", "--image-size", "16x8", "--steps", "4"]) == 2
    assert "was trained with --image-size 8x16, which cannot change" in capsys.readouterr().err
