"""Every bad argument gives one sentence on stderr that starts with error:, and exit status 2."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.pmf_process import TINY, run_in
from PIL import Image

import pmf
from pmf import _library
from pmf.cli import main
from pmf.training import Trainer


def image_folder(root: Path, name: str, *classes: str) -> Path:
    folder = root / name
    folder.mkdir()
    for label in classes:
        (folder / label).mkdir()
        Image.new("L", (8, 8)).save(folder / label / "a.png")
    return folder


def truncated(root: Path) -> list[str]:
    folder = image_folder(root, "cut", "cat", "dog")
    Image.effect_noise((64, 64), 90).save(folder / "dog" / "b.png")
    (folder / "dog" / "b.png").write_bytes((folder / "dog" / "b.png").read_bytes()[:900])
    return ["train", "--data", str(folder)]


def not_an_image(root: Path) -> list[str]:
    folder = image_folder(root, "words", "cat", "dog")
    (folder / "dog" / "b.png").write_text("woof")
    return ["train", "--data", str(folder)]


def broken_labels(root: Path) -> list[str]:
    folder = image_folder(root, "labels", "cat", "dog")
    (folder / "labels.csv").write_text("file,label\ncat/a.png,0\ndog/none.png,1\n")
    return ["train", "--data", str(folder)]


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no command": (lambda p: [], "COMMAND"),
    "unknown command": (lambda p: ["paint"], "invalid choice: 'paint'"),
    "unknown flag": (lambda p: ["train", "--colour", "3"], "unrecognized arguments: --colour"),
    "unknown benchmark": (lambda p: ["bench", "sorting"], "there is no benchmark 'sorting'"),
    "abbreviated flag": (lambda p: ["train", "--batch", "3"], "unrecognized arguments: --batch"),
    "no number": (lambda p: ["train", "--lr", "fast"], "--lr: invalid float value: 'fast'"),
    "nan rate": (lambda p: ["train", "--lr", "nan"], "--lr must be a finite number"),
    "infinite rate": (lambda p: ["train", "--lr", "inf"], "--lr must be a finite number"),
    "unknown preset": (lambda p: ["train", "--preset", "pmf-z"], "invalid choice: 'pmf-z'"),
    "unknown device": (lambda p: ["train", "--device", "abacus"], "--device 'abacus' is not a torch device"),
    "device without numbers": (lambda p: ["train", "--device", "meta"], "--device meta does not work"),
    "device for sampling": (lambda p: ["sample", str(p), "--device", "abacus"], "is not a torch device"),
    "no width": (lambda p: ["train", "--mlp-width", "0"], "mlp_width must be at least 1"),
    "negative width": (lambda p: ["train", "--bottleneck", "-1"], "bottleneck must be at least 1"),
    "unknown perceptual loss": (lambda p: ["train", "--perceptual", "vgg"], "invalid choice: 'vgg'"),
    "small network that hides a large one": (
        lambda p: ["train", "--quick", "--num-heads", "7"],
        "num_heads",
    ),
    "a run folder as settings": (
        lambda p: ["train", "--config", str(Path(save(p / "config.json", {})).parent)],
        "config.json",
    ),
    "a file as run folder": (
        lambda p: ["train", "--out", save(p / "file", {}) + "/below"],
        "file/below is a file, or lies below one: give a folder",
    ),
    "weights of a loss in an abbreviated home": (
        lambda p: ["train", "--perceptual", "lite0", "--perceptual-weights", "~/no.pth"],
        f"--perceptual-weights {Path.home() / 'no.pth'} does not exist",
    ),
    "no such weights": (
        lambda p: ["train", "--perceptual", "lite0", "--perceptual-weights", str(p / "no.pth")],
        "no.pth does not exist",
    ),
    "unwanted weights": (
        lambda p: ["train", "--perceptual-weights", save(p / "d.pth", {"fc": torch.ones(1)})],
        "contains weights of none of the requested networks",
    ),
    "empty name of a folder": (lambda p: ["train", "--data", ""], "--data is empty"),
    "empty path": (lambda p: ["sample", str(p), "--out", ""], "--out: must not be empty"),
    "empty source": (lambda p: ["evaluate", "--images", "", "--make-stats", "y.npz"], "empty"),
    "negative power": (lambda p: ["train", "--norm-p", "-5"], "--norm-p must be 0 or more, got -5.0"),
    "exponent below any": (lambda p: ["train", "--omega-beta", "-1e9"], "beta -1e+09 is too low"),
    "no such folder": (lambda p: ["train", "--data", str(p / "no")], "is not a folder"),
    "empty folder": (
        lambda p: ["train", "--data", str(image_folder(p, "empty"))],
        "empty contains no images",
    ),
    "no size": (lambda p: ["train", "--image-size", "8by4"], "must be a number or HEIGHTxWIDTH"),
    "no size to compare at": (
        lambda p: ["evaluate", "--images", "x", "--make-stats", "y.npz", "--image-size", "0"],
        "must be a number of at least 1",
    ),
    "size of no patches": (lambda p: ["train", "--image-size", "8x7"], "8x7 is not a multiple of patch_size"),
    "small images": (
        lambda p: ["train", "--image-size", "16", "--data", str(image_folder(p, "s", "cat", "dog"))],
        "is 8x8 pixels, smaller than the 16x16",
    ),
    "truncated image": (truncated, "b.png is truncated or damaged"),
    "not an image": (not_an_image, "b.png is not an image"),
    "broken labels": (broken_labels, "'dog/none.png', which does not exist"),
    "digits too large": (
        lambda p: ["train", "--image-size", "16"],
        "the digits are 8x8 greyscale images, but 16x16 greyscale images were",
    ),
    "impossible network": (lambda p: ["train", "--num-heads", "7"], "num_heads"),
    "resume nothing": (lambda p: ["train", "--resume", str(p / "no")], "there is no run folder"),
    "resume elsewhere": (
        lambda p: ["train", "--resume", str(p), "--out", "x"],
        "leave out --preset and --out",
    ),
    "no checkpoint": (lambda p: ["sample", str(p / "no.pth")], "there is no checkpoint"),
    "huge seed": (lambda p: ["sample", "x", "--seeds", "1" + "0" * 30], "--seeds must lie below 2^63"),
    "bad seeds": (lambda p: ["sample", "x", "--seeds", "9-0"], "--seeds must be numbers"),
    "seed twice": (lambda p: ["sample", "x", "--seeds", "0-7,9,5-6"], "--seeds contains 5 twice"),
    "unknown precision": (lambda p: ["sample", "x", "--precision", "fp8"], "invalid choice: 'fp8'"),
    "no steps": (lambda p: ["sample", "x", "--steps", "0"], "--steps and --batch-size must be 1 or more"),
    "code in checkpoint": (lambda p: ["sample", save(p / "a.pth", {"f": print})], "more than tensors"),
    "foreign weights": (lambda p: ["sample", save(p / "b.pth", {"fc": torch.ones(1)})], "fc"),
    "nameless weights": (lambda p: ["sample", save(p / "c.pth", {3: torch.ones(1)})], "named tensors only"),
    "convert suffix": (lambda p: ["convert", "x", "y.bin"], "must end in .safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_sentence_and_status_2(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, sentence = BAD[case][0](tmp_path), BAD[case][1]
    assert main(words) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ") and sentence in last, captured.err
    assert captured.err.count("error:") == 1 and "Traceback" not in captured.err
    assert captured.out.count("\n") <= 1  # at most the line with the run's folder


def test_the_status_and_the_sentence_reach_the_shell(tmp_path: Path) -> None:
    done = run_in(tmp_path, "train", "--data", str(tmp_path / "no"))
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == f"error: --data {tmp_path / 'no'} is not a folder: give 'digits' or a folder of images\n"
    )
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_diverges_names_its_step(tmp_path: Path) -> None:
    done = run_in(
        tmp_path, "train", *TINY, "--lr", "1e30", "--steps", "30", "--checkpoint-every", "1", "--out", "run"
    )
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: the ") and "at step" in error and "--lr" in error, done.stderr
    folders = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert folders and all(name.startswith("step-") for name in folders)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_a_step_that_does_not_fit_in_memory_says_what_to_give(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(self: Trainer, rate: float = 1.0) -> torch.Tensor:
        raise error

    monkeypatch.setattr(Trainer, "train_step", step)
    assert main(["train", *TINY, "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: memory ran out (") and "--batch-size, or pmf train --accumulate" in last


@pytest.mark.parametrize(
    "command", ["train", "sample", "evaluate", "convert", "flops", "toy", "bench", "check", "env"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: pmf {command}")


def test_the_version_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"pmf {pmf.__version__}\n"


def test_dry_run_prints_the_settings_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "pmf-b/16", "--data", "photos", "--dry-run", "--lr", "0.002"]) == 0
    assert '"lr": 0.002' in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_env_reports_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", "train sample demo evaluate ablate flops toy bench check".split())
def test_what_needs_the_library_says_first_that_it_is_missing(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_library, "_error", "the library is elsewhere")
    assert main([command]) == 2
    assert capsys.readouterr().err == "error: the library is elsewhere\n"
