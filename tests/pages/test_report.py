"""``pmf report``: one self-contained file about a finished or unfinished run, which it does not modify."""

import io
import json
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import browser as browsers
from helpers.pmf_process import TINY, run_in
from PIL import Image

from pmf.cli import main

FLAGS = "--steps 6 --log-every 1 --checkpoint-every 3 --lr 0.002".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = run_in(folder, "train", *FLAGS, "--sample-every", "2", *TINY, "--out", "a <run>")
    assert done.returncode == 0, done.stderr
    return folder / "a <run>"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "runs" / finished.name)


def content(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    }


class _Links(HTMLParser):
    """What a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")
        ]


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S))


def test_a_finished_run_in_one_self_contained_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(run)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs/a <run>"]) == 0
    assert capsys.readouterr().out == "report: a <run>-report.html\n"
    assert content(run) == before
    page = (tmp_path / "a <run>-report.html").read_text()

    links = _Links()
    links.feed(page)
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in links.targets)
    assert not {"script", "link", "iframe", "object"} & set(links.tags)
    assert "@import" not in page and not re.findall(r"url\((?!#)", page)
    assert links.tags.count("svg") == 4 and links.tags.count("img") == 4  # samples.png and steps 2, 4, 6

    text = text_of(page)
    for words in (
        "a &lt;run&gt; Finished after 6 steps.", "classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9", "images 8 x 8, grey",
        "newest checkpoint step-00000006", "images seen 48", "images per second", "peak memory", "step 4",
        "processor", "torch 2.", "device cpu", "--data-proportion 0.5",
    ):  # fmt: skip
        assert words in text, words
    assert '<tr class="changed"><td>--lr</td><td>0.002</td></tr>' in page
    assert "<tr><td>--data</td><td>digits</td></tr>" in page


def test_in_a_browser_it_requests_nothing_and_shows_every_picture(run: Path, tmp_path: Path) -> None:
    if (reason := browsers.why_not()) is not None:
        pytest.skip(reason)
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    url = (tmp_path / "report.html").as_uri()
    with browsers.browser(tmp_path / "profile") as window:
        window.requests()  # the browser's own start page
        window.open(url)
        widths = window.run("return [...document.querySelectorAll('img, svg')].map(x => x.clientWidth)")
        assert len(widths) == 8 and min(widths) > 100
        assert min(window.run("return [...document.images].map(x => x.naturalWidth)")) > 0
        asked = [x for x in window.requests() if not x.startswith(("chrome://", "data:"))]
    assert asked == [url]


def test_the_best_distance_is_that_of_the_evaluation_as_it_is_set_now(run: Path, tmp_path: Path) -> None:
    def best() -> str | None:
        assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
        found = re.search(r"best distance (.*?) at step", text_of((tmp_path / "report.html").read_text()))
        return found and found[1]

    step = int(max((run / "checkpoints").iterdir()).name.removeprefix("step-"))
    with (run / "log.jsonl").open("a") as log:
        for distance in (0.1, 12.5):  # the first in other features
            row = {"step": step, "images": 8 * step, "seconds": 1.0, "frechet_distance": distance}
            log.write(json.dumps(row) + "\n")
    assert best() is None
    (run / "best.json").write_text(json.dumps({"step": step, "frechet_distance": 12.5}))
    assert best() == "12.5"
    (run / "best.json").write_text(json.dumps({"step": step + 1, "frechet_distance": 12.5}))
    assert best() is None  # its checkpoint is gone
    (run / "best.json").write_text("{}")
    assert best() is None
    (run / "best.json").write_text(json.dumps({"step": step, "frechet_distance": 12.5}))
    config = json.loads((run / "config.json").read_text())
    config["evaluation"]["evaluate_images"] += 1
    (run / "config.json").write_text(json.dumps(config))
    assert best() is None  # measured with another number of samples


def test_what_an_unfinished_run_lacks_is_reported(run: Path, tmp_path: Path) -> None:
    for name in ("samples", "checkpoints"):
        shutil.rmtree(run / name)
    for name in ("samples.png", "environment.json"):
        (run / name).unlink()
    log = run / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]) + b'{"step": 4, "ima\xff')
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    text = text_of(out.read_text())
    assert "Not finished: 50% done at step 3, the last in the log." in text
    assert "No samples yet: the first grid is drawn at step 2 or at the end." in text
    assert "newest checkpoint none yet" in text
    assert "The machine was not recorded: environment.json is missing." in text
    log.unlink()
    (run / "samples").mkdir()
    (run / "samples" / "00000002.png").write_bytes(b"not a picture")
    whole, text = io.BytesIO(), b"zTXt" + b"a\0\1"  # compressed in a way that does not exist: SyntaxError
    Image.new("L", (8, 8)).save(whole, format="PNG")
    after = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (run / "samples" / "00000004.png").write_bytes(whole.getvalue()[:-12] + after + whole.getvalue()[-12:])
    assert main(["report", str(run), "--out", str(out)]) == 0
    text = text_of(out.read_text())
    assert "Not finished: 0% done at step 0" in text and "00000002.png cannot be read" in text
    assert "00000004.png cannot be read" in text
    assert "The log is empty: its first entry is at step 1." in text


def test_a_run_that_stopped_just_before_its_end_is_not_100_percent_done(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["run"]["steps"] = 6001
    (run / "config.json").write_text(json.dumps(config))
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    (run / "log.jsonl").write_text(json.dumps({**last, "step": 6000}) + "\n")
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert "Not finished: 99% done at step 6,000" in text_of((tmp_path / "report.html").read_text())


def test_many_large_grids_are_few_small_pictures(run: Path, tmp_path: Path) -> None:
    for step in range(100, 130):
        Image.effect_noise((1500, 1500), 90).save(run / "samples" / f"{step:08d}.png")
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = out.read_text()
    assert page.count("<img") == 9 and out.stat().st_size < 4e6
    assert "step 2<" in page and "step 129<" in page


def test_each_start_of_a_run_is_recorded(run: Path, tmp_path: Path) -> None:
    assert main(["train", "--resume", str(run), "--steps", "7"]) == 0
    assert [entry["step"] for entry in json.loads((run / "environment.json").read_text())] == [0, 6]
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert "From step 6" in text_of((tmp_path / "report.html").read_text())


def test_bad_input_is_one_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(run)
    (tmp_path / "file").touch()
    for words, sentence in (
        ([str(tmp_path / "none")], "there is no run folder"),
        ([str(tmp_path)], "is not a run: it has no config.json"),
        ([str(run), "--out", str(run / "report.html")], "lies inside the run, which is not modified"),
        ([str(run), "--out", str(tmp_path / "file" / "report.html")], "cannot write"),
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    monkeypatch.chdir(run)
    assert main(["report", "."]) == 2
    assert "lies inside the run" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", str(run)]) == 2
    assert "pmf report needs matplotlib, which is not installed: pip install" in capsys.readouterr().err
    assert content(run) == before
