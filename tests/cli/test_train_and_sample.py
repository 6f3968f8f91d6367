"""A user's workflow: train, interrupt, resume, sample, convert."""

import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pmf_process import TINY, environment, run_in
from PIL import Image

from pmf import checkpoint
from pmf.checkpoint import ours
from pmf.cli import main, sample


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    done = run_in(folder, "train", "--steps", "3", *TINY)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "00000-digits"


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A finished run that a test may modify."""
    return shutil.copytree(trained_once, tmp_path / "runs" / "00000-digits")


def test_train_sample_convert(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(trained / "samples.png") as picture:
        assert picture.width == picture.height >= 400  # ten classes by ten samples of 8x8, enlarged
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(trained), "--classes", "7", "3", "--seeds", "0-2,9", "--out", "drawn"]) == 0
    names = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert names == {f"class000{c}_seed000{s}.png" for c in (3, 7) for s in (0, 1, 2, 9)} | {"grid.png"}

    assert main(["convert", str(trained), "one.safetensors", "--ema", "none"]) == 0
    assert re.search(
        r"one\.safetensors: 0\.\d M parameters from .*weights\.safetensors", capsys.readouterr().out
    )
    again = ["sample", "one.safetensors", "--classes", "3", "--seeds", "9", "--steps", "2", "--omega", "1.5"]
    assert main([*again, "--interval", "0.2", "0.8", "--out", "again"]) == 0
    assert (tmp_path / "again" / "class0003_seed0009.png").is_file()


def test_a_seed_gives_the_same_picture_in_any_batch(trained: Path, tmp_path: Path) -> None:
    main(["sample", str(trained), "--seeds", "0-4", "--batch-size", "7", "--out", str(tmp_path / "many")])
    main(["sample", str(trained), "--seeds", "4", "--classes", "6", "--out", str(tmp_path / "one")])
    pictures = []
    for folder in ("many", "one"):
        with Image.open(tmp_path / folder / "class0006_seed0004.png") as image:
            pictures.append(np.asarray(image).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # products of other batch sizes round differently


def test_a_batch_is_written_and_freed_before_the_next_is_sampled(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, drawn = sample._draw, []

    def spy(*arguments: object) -> torch.Tensor:
        assert all(pictures() is None for pictures in drawn)
        assert len(list(tmp_path.glob("out/class*.png"))) == 4 * len(drawn)
        drawn.append(weakref.ref(pictures := draw(*arguments)))
        return pictures

    monkeypatch.setattr(sample, "_draw", spy)
    monkeypatch.setattr(sample, "_GRID_SIDE", 24)  # three images of 8 x 8
    words = ["sample", str(trained), "--classes", "all", "--seeds", "5,0-2"]
    assert main([*words, "--batch-size", "4", "--out", str(tmp_path / "out")]) == 0
    assert len(drawn) == 10 and len(list(tmp_path.glob("out/class*.png"))) == 40
    assert "grid of 3 x 3 of 10 x 4 images:" in capsys.readouterr().out
    with (
        Image.open(tmp_path / "out" / "grid.png") as grid,
        Image.open(tmp_path / "out" / "class0002_seed0000.png") as third_row_second_column,
    ):
        step = grid.width // 26 * 9  # 8 + gap of 1, enlarged
        place = grid.crop((step, 2 * step, step + step // 9 * 8, 2 * step + step // 9 * 8))
        small = place.resize((8, 8), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(small), np.asarray(third_row_second_column))


def test_ctrl_c_while_sampling_loses_nothing_written(trained: Path, tmp_path: Path) -> None:
    words = ["sample", str(trained), "--seeds", "0-999999999999", "--classes", "7", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pmf", *words],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out/*.png"))) < 40 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    files = list((tmp_path / "out").iterdir())
    assert err == f"interrupted: {len(files)} of 1000000000000 images are in out\n"  # no bar: no terminal
    for file in files:
        with Image.open(file) as image:
            image.load()


def test_sampling_never_reads_the_v_head(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    honest = ours.read_tensors

    def spy(*arguments: object, **options: object) -> object:
        tensors, header = honest(*arguments, **options)
        read.extend(tensors)
        return tensors, header

    monkeypatch.setattr(ours, "read_tensors", spy)
    assert main(["sample", str(trained), "--seeds", "1", "--out", str(tmp_path / "out")]) == 0
    assert "u_final.linear.weight" in read and not [name for name in read if name.startswith("v_")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_of_sampling(
    trained: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", str(trained), "--seeds", "1", "--classes", "4", "--out", str(tmp_path / "out")]
    assert main([*words, "--precision", precision]) == 0
    assert f"1 images in {precision} from" in capsys.readouterr().out


def test_ctrl_c_saves_and_resume_continues(tmp_path: Path) -> None:
    flags = [*TINY, "--steps", "1000000", "--log-every", "1", "--out", "run"]
    command = [sys.executable, "-m", "pmf", "train", *flags]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (step,) = re.findall(r"stopped at step (\d+); checkpoint: run/checkpoints/step-\d+", out)
    assert "Traceback" not in err
    assert checkpoint.newest_checkpoint(tmp_path / "run").name == f"step-{int(step):08d}"
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", str(int(step) + 2)]) == 0
    assert checkpoint.newest_checkpoint(tmp_path / "run").name == f"step-{int(step) + 2:08d}"


KILL_WHILE_SAVING = """
import os, signal
honest = os.fsync
def fsync(descriptor):
    honest(descriptor)
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith("FATAL"):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
"""


@pytest.mark.parametrize("fatal", ["/.step-00000004.partial/state.safetensors", "/.step-00000004.partial"])
def test_a_kill_in_the_middle_of_saving_loses_nothing_saved(tmp_path: Path, fatal: str) -> None:
    flags = [*TINY, "--steps", "4", "--checkpoint-every", "2", "--out", "run"]
    killed = run_in(tmp_path, "train", *flags, before=KILL_WHILE_SAVING.replace("FATAL", fatal))
    assert killed.returncode == -signal.SIGKILL
    folders = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == [".step-00000004.partial", "step-00000002"]
    assert checkpoint.load_checkpoint(tmp_path / "run").position.isfinite().all()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert checkpoint.newest_checkpoint(tmp_path / "run").name == "step-00000004"
    assert not (tmp_path / "run" / "checkpoints" / ".step-00000004.partial").exists()


def test_a_full_disk_is_named_and_loses_nothing_saved(trained: Path, tmp_path: Path) -> None:
    size = (checkpoint.newest_checkpoint(trained) / "weights.safetensors").stat().st_size
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))"
    full = run_in(tmp_path, "train", "--resume", str(trained), "--steps", "5", before=limit)
    assert full.returncode == 2
    error = full.stderr.splitlines()[-1]
    assert re.match(
        r"error: cannot save the checkpoint of step 5 to .*: File too large; the last good", error
    ), error
    assert "step-00000003" in error and f"--resume {trained}" in error
    assert [path.name for path in (trained / "checkpoints").iterdir()] == ["step-00000003"]
    assert main(["train", "--resume", str(trained), "--steps", "5"]) == 0
