"""pmf train with a settings file, and with evaluation during training."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import pmf.cli
from pmf import checkpoint
from pmf.cli.settings_file import read_settings_file
from pmf.errors import UserError

SMALL = {
    "hidden-size": 16, "depth": 2, "head-depth": 1, "num-heads": 2, "bottleneck": 4, "batch-size": 8,
    "condition-tokens": [1, 1, 1, 1, 1], "steps": 4, "precision": "fp32", "lr": "1e-3", "log-every": 2,
}  # fmt: skip


def written(folder: Path, **more: object) -> Path:
    path = folder / "settings.yaml"
    path.write_text("\n".join(f"{name}: {value}" for name, value in {**SMALL, **more}.items()))
    return path


def test_a_settings_file_supplies_what_flags_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("yaml")
    path = written(tmp_path, **{"image-size": "8x16"})
    assert pmf.cli.main(["train", "--config", str(path), "--steps", "3", "--dry-run"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["run"]["steps"], config["optimizer"]["lr"]) == (3, 1e-3)
    assert (config["model"]["image_size"], config["model"]["condition_tokens"]) == ([8, 16], [1] * 5)
    again = tmp_path / "config.json"
    again.write_text(json.dumps(config), encoding="utf-8-sig")  # as Windows writes it
    assert pmf.cli.main(["train", "--config", str(again), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == config


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        ("no-guidance: true", ["--no-guidance"]),
        ("no-v-head: false", []),
        ("image-size: [8, 16]\npatch-size: 4", ["--image-size", "8x16", "--patch-size", "4"]),
        ("ema-half-lives: 500\nsample-ema: 500", ["--ema-half-lives", "500", "--sample-ema", "500"]),
        ("perceptual-weights: vgg.pth", ["--perceptual-weights", "vgg.pth"]),
        ("steps: 1e3\nbatch-size: 64.0", ["--steps", "1000", "--batch-size", "64"]),
        ("ema-half-lives: [5e2, 1e3]\nsample-ema: 5e2", "--ema-half-lives 500 1000 --sample-ema 500".split()),
    ],
)
def test_a_settings_file_is_parsed_like_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, flags: list[str]
) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    assert pmf.cli.main(["train", "--dry-run", *flags]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert pmf.cli.main(["train", "--config", str(path), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no-guidance: 1", "--no-guidance must be true or false, got 1"),
        ("no-guidance: true\nguidance: true", "sets --guidance twice"),
        ("image-size: [8, 0]", "--image-size"),
        ("steps: 1.5", "--steps must be a whole number"),
        ("batchsize: 3", "sets 'batchsize', which is not a setting"),
        ("- 3", "must map setting names to values"),
        ("a: [", "cannot be read as YAML"),
        ("steps: 3\n? [1, 2]\n: 4", "settings.yaml cannot be read as YAML (line 2: found unhashable key)"),
        ("image-size: big", "--image-size"),
        ("batch-size: -1", "--batch-size must be 1 or more"),
        ("batch-size: many", "--batch-size must be a whole number, got 'many'"),
        ("batch-size: 8\nbatch_size: 9", "sets --batch-size twice"),
        ("batch-size: 8\nbatch-size: 9", "sets --batch-size twice"),
        ("guidance: false\nmax-omega: 3", "--max-omega has no effect with --no-guidance"),
    ],
)
def test_an_invalid_settings_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    assert pmf.cli.main(["train", "--config", str(path), "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_given_settings_replace_conflicting_preset_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The preset's cooldown ruled out every schedule, and its minutes tied --steps to the clock."""

    def settings(*flags: str) -> tuple[object, ...]:
        assert pmf.cli.main(["train", "--dry-run", *flags]) == 0
        config = json.loads(capsys.readouterr().out)
        return config["optimizer"]["cooldown"], config["run"]["steps"], config["run"]["minutes"]

    assert settings() == (0.7, None, 4.0)
    assert settings("--schedule", "cosine", "--steps", "5") == (0.0, 5, None)
    assert settings("--steps", "5", "--minutes", "2") == (0.7, 5, 2.0)
    file = tmp_path / "config.json"  # flags also take precedence over a file
    file.write_text(json.dumps({"minutes": 9.0, "cooldown": 0.5}))
    assert settings("--config", str(file)) == (0.5, None, 9.0)
    assert settings("--config", str(file), "--steps", "5", "--schedule", "cosine") == (0.0, 5, None)
    assert pmf.cli.main(["train", "--dry-run", "--schedule", "cosine", "--cooldown", "0.5"]) == 2
    assert "--cooldown ends a constant schedule" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--no-guidance --max-omega 3", "--max-omega has no effect with --no-guidance: leave it out, or"),
        ("--no-guidance --sample-interval 0 1", "--sample-interval has no effect with --no-guidance"),
        ("--sigma-data .3", "--sigma-data has no effect without a --preconditioner"),
        ("--times r=t --data-proportion 1", "--data-proportion has no effect with --times"),
        ("--norm-p 0 --norm-eps 1", "--norm-eps has no effect with --norm-p 0"),
        ("--perceptual none --perceptual-size 64", "--perceptual-size has no effect with --perceptual none"),
        ("--perceptual lite0 --lpips-lambda 1", "--lpips-lambda has no effect without LPIPS"),
        (
            "--perceptual lpips --convnext-lambda 1",
            "--convnext-lambda has no effect without ConvNeXt or lite0",
        ),
        ("--no-ema --sample-ema 10", "--sample-ema has no effect with --no-ema"),
        ("--no-ema --ema-half-lives 1", "--ema-half-lives has no effect with --no-ema"),
        (
            "--optimizer adam --lr .1 --adam-lr .2",
            "--lr has no effect with --optimizer adam and an --adam-lr: leave it out",
        ),
        ("--evaluate-images 10", "--evaluate-images has no effect without --evaluate-every"),
    ],
)
def test_a_flag_without_effect_is_named(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pmf.cli.main(["train", "--dry-run", *flags.split()]) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_presets_runs_and_files_may_hold_settings_that_a_flag_switches_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.json"
    command = ["train", "--config", str(file), "--no-guidance", "--sample-omega", "1", "--dry-run"]
    file.write_text(json.dumps({"preset": "emoji", "max-omega": 3.0}))
    assert pmf.cli.main(command) == 0
    file.write_text(capsys.readouterr().out)  # a run's config.json
    assert pmf.cli.main(command) == 0
    assert pmf.cli.main([*command, "--omega-beta", "2"]) == 2
    file.write_text('{"steps": 1, "steps": 2}')
    assert pmf.cli.main(command) == 2
    assert "settings.json cannot be read ('steps' occurs twice)" in capsys.readouterr().err


def test_a_missing_settings_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no settings file"):
        read_settings_file(tmp_path / "nothing.yaml")


def test_the_best_checkpoint_of_the_curve_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            pixels = torch.randint(256, (8, 8), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / name / f"{i}.png")
    command = ["train", "--config", str(written(tmp_path)), "--data", str(tmp_path / "photos")]
    command += ["--keep-checkpoints", "1", "--checkpoint-every", "1", "--evaluate-every", "2"]
    command += ["--evaluate-features", "pixels", "--evaluate-images", "20", "--steps", "8"]
    command += ["--evaluate-reference", str(tmp_path / "photos"), "--out", str(tmp_path / "run")]
    assert pmf.cli.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    curve = {row["step"]: row["frechet_distance"] for row in rows if "frechet_distance" in row}
    assert list(curve) == [2, 4, 6, 8] and len(set(curve.values())) > 1
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best == {"step": min(curve, key=lambda s: curve[s]), "frechet_distance": min(curve.values())}
    kept = {checkpoint.step_of(folder) for folder in checkpoint.checkpoint_folders(tmp_path / "run")}
    assert kept == {best["step"], 8}
    evaluation = ["evaluate", str(checkpoint.step_folder(tmp_path / "run", best["step"])), "--reference"]
    evaluation += [
        str(tmp_path / "photos"),
        "--features",
        "pixels",
        "--num-images",
        "20",
        "--precision",
        "fp32",
    ]
    assert pmf.cli.main([*evaluation, "--out", str(tmp_path / "evaluation")]) == 0
    apart = json.loads((tmp_path / "evaluation" / "result.json").read_text())["frechet_distance"]
    assert apart == pytest.approx(best["frechet_distance"], rel=1e-5)
    resume = ["train", "--resume", str(tmp_path / "run")]
    assert pmf.cli.main([*resume, "--steps", "10", "--evaluate-images", "2"]) == 0  # no longer comparable
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 10
    (tmp_path / "run" / "best.json").write_text('{"step": 2}')
    capsys.readouterr()
    assert pmf.cli.main([*resume, "--steps", "11"]) == 2
    assert 'best.json must hold the numbers "step" and "frechet_distance"' in capsys.readouterr().err


def test_steps_replace_the_minutes_of_a_resumed_run_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that its minutes had ended did not train a step more."""
    pytest.importorskip("yaml")
    words = ["train", "--config", str(written(tmp_path)), "--minutes", "1e-6", "--out", str(tmp_path / "run")]
    assert pmf.cli.main(words) == 0
    capsys.readouterr()
    resumed = ["train", "--resume", str(tmp_path / "run"), "--dry-run"]
    for flags, budget in (([], (4, 1e-6)), (["--steps", "9"], (9, None)), (["--minutes", "2"], (4, 2.0))):
        assert pmf.cli.main([*resumed, *flags]) == 0
        run = json.loads(capsys.readouterr().out)["run"]
        assert (run["steps"], run["minutes"]) == budget


def test_an_evaluation_needs_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pmf.cli.main(["train", "--evaluate-every", "5", "--out", str(tmp_path / "run")]) == 2
    assert "--evaluate-every and --evaluate-reference need each other" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.chdir(tmp_path)
    words = ["train", "--evaluate-every", "5", "--evaluate-reference", "no", "--evaluate-features", "pixels"]
    assert pmf.cli.main(words) == 2
    assert "there are no images no: give a folder" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
