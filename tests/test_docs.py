"""Every command and example in docs/ runs, in order, page by page; `--quick` reduces the sizes.

A page's Python blocks share one namespace. Its shell blocks run in a separate folder that contains what the
page's reader has: images, and nothing else. A block after an HTML comment that begins with "not run" is
skipped.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import pmf.cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
QUICK = ("train", "evaluate", "ablate", "toy")  # pmf commands that take --quick
_BLOCK = re.compile(r"(?:<!-- (?P<note>[^>]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S)


def blocks(page: Path, language: str) -> Iterator[str]:
    for match in _BLOCK.finditer(page.read_text()):
        if match["language"] == language and not (match["note"] or "").startswith("not run"):
            yield match["text"]


def commands(page: Path) -> list[str]:
    """The page's shell commands, without comments and with continuation lines joined."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"\s+#.*", "", line).strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


@pytest.fixture
def readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `photos` with a subfolder of images for each of two classes."""
    generator = torch.Generator().manual_seed(0)
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(256, (256, 256, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python"))], ids=lambda p: p.stem)
def test_examples_run(page: Path, readers_folder: Path) -> None:
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.stem)
def test_commands_run(page: Path, readers_folder: Path) -> None:
    for command in commands(page):
        words = shlex.split(command)
        if "pmf" in words and words[words.index("pmf") + 1] in QUICK:
            words.append("--quick")
        if words[0] == "pmf":
            assert pmf.cli.main(words[1:]) == 0, command
        else:
            _run(words, command)


def _run(words: list[str], command: str) -> None:
    """Run another program, found beside this Python; benchmarks come from the repository."""
    words = [str(ROOT / word) if word.startswith("benchmarks/") else word for word in words]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    titles = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))], ids=lambda p: p.stem
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in headings(linked), f"{page.name}: {target} is not a heading"
