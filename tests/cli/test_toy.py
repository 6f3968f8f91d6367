"""``pmf toy`` from the command line: numbers, files, and errors for bad input."""

import json
import re
from pathlib import Path

import pytest
from helpers.pmf_process import run_in
from PIL import Image

from pmf.cli import main

NAMES = ("u_off_plane_512", "x_off_plane_512", "x_wasserstein_512", "x_wasserstein_2", "u_wasserstein_2")


def test_a_quick_toy_shows_the_ordering_and_records_it(tmp_path: Path) -> None:
    done = run_in(tmp_path, "toy", "--out", "toy", "--quick", "--steps", "30", "--seed", "3")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    number = r"(\d+\.\d+)"
    match = re.fullmatch(" ".join(f"{name}={number}" for name in NAMES), last)
    assert match is not None, last
    figures = dict(zip(NAMES, map(float, match.groups()), strict=True))
    assert figures["u_off_plane_512"] > 20 * figures["x_off_plane_512"] > 0
    assert figures["u_wasserstein_2"] < 0.7  # points of standard deviation 1, all of them at 0, would have 1

    record = json.loads((tmp_path / "toy" / "toy.json").read_text())
    assert record["settings"]["steps"] == 30
    assert record["command"] == "pmf toy --out toy --quick --steps 30 --seed 3"
    runs = {(run["dim"], run["prediction"]): run for run in record["runs"]}
    assert set(runs) == {(2, "x"), (2, "u"), (512, "x"), (512, "u")}
    assert round(runs[512, "u"]["off_plane"], 4) == figures["u_off_plane_512"]
    assert runs[512, "u"]["to_data"] > 20 * runs[512, "x"]["to_data"]
    assert runs[2, "x"]["off_plane"] < 1e-5
    with Image.open(tmp_path / "toy" / "toy.png") as picture:
        assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_figures_are_means_over_the_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--quick --dims 3 --steps 1 --seeds 0-1 --shape moons".split()
    assert main(["toy", "--out", str(tmp_path), *words]) == 0
    record = json.loads((tmp_path / "toy.json").read_text())
    values = [run["wasserstein"] for run in record["runs"] if run["prediction"] == "u"]
    assert len(values) == 2 and values[0] != values[1]
    (mean,) = [row["wasserstein"] for row in record["means"] if row["prediction"] == "u"]
    assert mean == pytest.approx(sum(values) / 2)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"u_wasserstein_3={mean:.4f}")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shape", "elephant"], "invalid choice: 'elephant'"),
        (["--dims", "1", "8"], "--dims must be distinct numbers from 2 to 65536, got [1, 8]"),
        (["--dims", "8", "8"], "--dims must be distinct numbers"),
        (["--dims", "two"], "invalid int value: 'two'"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--seeds", "2-0"], "--seeds must be numbers and ascending ranges"),
    ],
)
def test_invalid_arguments_get_one_sentence_and_write_nothing(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["toy", "--out", str(tmp_path / "toy"), *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert sentence in captured.err and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy").write_text("a file")
    assert main(["toy", "--out", str(tmp_path / "toy")]) == 2
    assert str(tmp_path / "toy") in capsys.readouterr().err


def test_without_matplotlib_the_toy_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["toy", "--out", str(tmp_path / "toy"), "--dims", "2", "--steps", "1"]) == 2
    assert "matplotlib, which is not installed: pip install matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
