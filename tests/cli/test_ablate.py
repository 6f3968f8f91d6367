"""``pmf ablate`` from the command line: table, resuming, and errors for bad input."""

import json
from pathlib import Path

import pytest
from helpers.pmf_process import TINY, run_in
from PIL import Image

from pmf.ablation import SUITES, decimals
from pmf.cli import main

QUICK = [
    "ablate",
    "--quick",
    "--samples",
    "24",
    "--judge-steps",
    "2",
    *TINY,
    "--steps",
    "2",
    "--out",
    "study",
]


def test_two_variants_become_a_table_and_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICK, "--variant", "base=", "--variant", "adam=optimizer=adam,adam-lr=0.01,no-guidance,no-ema"]
    done = run_in(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "study"
    record = json.loads((study / "record.json").read_text())
    base, adam = record["variants"]
    assert (base["variant"], base["settings"]) == ("base", {})
    assert adam["settings"] == {"optimizer": "adam", "adam_lr": 0.01, "guidance": False, "ema": False}
    assert (record["steps"], record["runs"], base["seeds"], record["data"]) == (2, 2, [0], "digits")
    assert record["command"] == "pmf " + " ".join(words)
    for name in ("frechet", "frechet_pixels", "recognised", "seconds"):
        assert base[name]["mean"] == base[name]["each"][0] and base[name]["sd"] is None
    assert base["frechet"]["mean"] > 5 * record["metric"]["real_images"]["frechet"] > 0
    assert base["frechet"]["mean"] != adam["frechet"]["mean"]

    table = (study / "table.md").read_text()
    digits = decimals(min(base["frechet"]["mean"], adam["frechet"]["mean"]))
    assert f"| base | {base['frechet']['mean']:.{digits}f} |" in table
    assert "- adam: optimizer adam, adam_lr 0.01, guidance off, ema off" in table
    assert "in the 64 features of a classifier" in table and "| variant | Frechet (classifier) |" in table
    assert table in done.stdout
    with Image.open(study / "plot.png") as plot, Image.open(study / "samples" / "adam.png") as grid:
        assert plot.width > 300 and min(grid.size) > 8

    first = (study / "runs" / "base-seed0.json").read_bytes()
    (study / "runs" / "adam-seed0.json").unlink()
    again = run_in(tmp_path, *words)
    assert "study: 1 of 2 runs are finished" in again.stdout
    assert "2/2 adam, seed 0" in again.stdout and "1/2 base" not in again.stdout
    assert (study / "runs" / "base-seed0.json").read_bytes() == first
    assert (study / "table.md").read_text().splitlines()[8:11] == table.splitlines()[8:11]

    monkeypatch.chdir(tmp_path)
    assert main([*words, "--features", "pixels"]) == 2
    assert "belongs to a run with other settings: give another --out" in capsys.readouterr().err
    assert main([*words, "--only", "base", "--features", "pixels", "--out", "pixels"]) == 0
    assert "features of `pmf evaluate --features pixels`, and in pixels" in capsys.readouterr().out
    assert main([*words, "--lr", "0.5"]) == 2
    assert "belongs to a run with other settings: give another --out" in capsys.readouterr().err
    (study / "runs" / "base-seed0.json").write_text("{")
    assert main(words) == 2
    assert "base-seed0.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is nothing to compare: give --suite, --variant or --variants"),
        (["--variant", "adam"], "--variant adam: write NAME=flag=value"),
        (["--variant", "a=speed=3"], "variant 'a': unrecognized arguments: --speed 3"),
        (["--variant", "a=optimizer=sgd"], "variant 'a': argument --optimizer: invalid choice: 'sgd'"),
        (["--variant", "a=lr=-1"], "variant 'a': --lr must be above 0"),
        (
            ["--variant", "a=prediction=u,preconditioner=scm"],
            "variant 'a': --preconditioner scm turns the network's output into images",
        ),
        (["--variant", "a=", "--image-size", "4"], "needs images of 8 pixels or more, got 4"),
        (["--variant", "a=patch-size=3"], "variant 'a': model: image_size 8 is not a multiple"),
        (["--variant", "a=steps=3"], "variant 'a' changes --steps, which all variants share"),
        (["--variant", "a=", "--variant", "a=lr=1"], "two variants would share the files of 'a'"),
        (["--variant", "a/b=", "--variant", "a b="], "two variants would share the files of 'a/b'"),
        (["--variant", "a*="], "a variant's name may contain letters"),
        (["--suite", "digits", "--only", "Eve"], "--only: there is no variant 'Eve'; there are x patch 8"),
        (["--variant", "a=", "--seed", "1"], "--seed is for a single run: use --seeds for a study"),
        (["--variant", "a=", "--minutes", "1"], "variants are compared at equal steps"),
        (
            ["--variant", "a=", "--samples", "1"],
            "--samples must lie between 2 and the 1797 images, got 1",
        ),
        (["--variant", "a=", "--judge-steps", "0"], "--judge-steps must be 1 or more"),
        (
            ["--variant", "a=lpips-lambda=0.1"],
            "variant 'a': --lpips-lambda has no effect without LPIPS in --perceptual",
        ),
        (
            ["--variant", "a=", "--variant", "b=no-ema", "--norm-p", "0", "--norm-eps", "1"],
            "--norm-eps has no effect with --norm-p 0, as in every variant: leave it out",
        ),
        (["--variant", "a=lr=1,lr=2"], "variant 'a' sets --lr twice"),
        (["--variant", "a=sample-every=1"], "variant 'a': --sample-every has no effect in a study"),
        (["--variant", "a=", "--evaluate-images", "9"], "--evaluate-images has no effect in a study"),
        (
            ["--variant", "a=", "--features", "pixels", "--device", "abacus"],
            "--device 'abacus' is not a torch device",
        ),
        (["--variants", "none.json"], "--variants none.json cannot be read as JSON"),
        (["--suite", "imagenet"], "invalid choice: 'imagenet'"),
        (["--variant", "a=", "--features", "inception"], "FID needs the weights"),
        (["--variant", "a=", "--features", "vgg"], "invalid choice: 'vgg'"),
    ],
)
def test_invalid_arguments_stop_before_anything_runs(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", "--quick", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_images_without_classes_need_another_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A classifier of one class learns nothing, and recognises everything."""
    monkeypatch.chdir(tmp_path)
    Path("flat").mkdir()
    for number in range(4):
        Image.new("L", (8, 8), 60 * number).save(f"flat/{number}.png")
    words = ["ablate", "--quick", "--variant", "a=", *TINY, "--data", "flat", "--samples", "2"]
    assert main(words) == 2
    assert "the images of flat have no classes that a classifier could learn" in capsys.readouterr().err
    assert main([*words, "--features", "pixels"]) == 0


def test_variants_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for content, sentence in (
        ([1], '--variants v.json must contain {"NAME": {"flag": value, ...}, ...}'),
        ({"a": {"lr": "fast"}}, "variant 'a': argument --lr: invalid float value: 'fast'"),
        ('{"a": {"lr": 1}, "a": {"lr": 2}}', "--variants v.json cannot be read as JSON ('a' occurs twice)"),
        ('{"a": {"lr": 1, "lr": 2}}', "('lr' occurs twice)"),
    ):
        text = content if isinstance(content, str) else json.dumps(content)
        Path("v.json").write_text(text, encoding="utf-8-sig")  # as Windows writes it
        assert main(["ablate", "--quick", "--variants", "v.json"]) == 2
        assert sentence in capsys.readouterr().err
    Path("v.json").write_text(
        json.dumps({"a": {"ema_half_lives": [1, 10], "v-head": False}, "b": {"lr": "x"}})
    )
    assert main(["ablate", *QUICK[1:], "--variants", "v.json", "--only", "none"]) == 2
    assert "variant 'b'" in capsys.readouterr().err


@pytest.mark.parametrize("name", SUITES)
def test_the_orderings_of_a_suite_name_its_variants(name: str) -> None:
    suite = SUITES[name]
    names = {variant.name for variant in suite.variants}
    for ordering in suite.orderings:
        told = [ordering.better, ordering.worse] if hasattr(ordering, "better") else sum(ordering.pairs, ())
        assert names.issuperset(told)
    assert not suite.variants[0].settings
