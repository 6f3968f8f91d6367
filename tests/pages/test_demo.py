"""``pmf demo``: what the page draws, the page in a real browser, and errors."""

import base64
import importlib.util
import io
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import browser as browsers
from helpers.pmf_process import environment
from PIL import Image

from pmf import checkpoint, models
from pmf.cli import main
from pmf.flow.sampler import Sampler
from pmf.pages import demo
from pmf.pages.demo import Request, Studio, build_page
from pmf.pictures import to_uint8
from pmf.sampling import draw_by_seed

DIGITS = list("0123456789")
RIGHT = "\ue014"  # WebDriver's code of the arrow key
ONLY_THIS_MACHINE = """
import socket
connect = socket.socket.connect
def only_here(self, address):
    assert address[0] in ("127.0.0.1", "::1"), f"OUTSIDE {address}"
    return connect(self, address)
socket.socket.connect = only_here
"""


def write_model(folder: Path, names: list[str], **config: object) -> Path:
    """A checkpoint folder with a small network of random weights."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "depth": 2, "head_depth": 1, "num_heads": 2, "mlp_width": 32}
    model = models.create_model("digits", num_classes=len(names), **small, **config)
    with torch.no_grad():
        for parameter in model.parameters():  # some are initially zero, and all images would be equal
            parameter.add_(0.2 * torch.randn_like(parameter))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    folder.mkdir()
    file = folder / "weights.safetensors"
    file.write_bytes(checkpoint.weights_bytes(weights, model.config, names))
    settings = {"objective": {"max_omega": 4.0, "guidance": True}, "optimizer": {"ema": False}}
    (folder / "config.json").write_text(json.dumps({**settings, "sampling": {"sample_ema": 1.0}}))
    return folder


def studio(folder: Path) -> Studio:
    return Studio(checkpoint.load_model(folder, v_head=False), torch.device("cpu"))


def test_seeds_are_those_of_pmf_sample_and_noise_between_them_has_the_same_variance(tmp_path: Path) -> None:
    made = studio(write_model(tmp_path / "model", DIGITS))
    request = made.first()._replace(label=7, seed=3, other_seed=4, blend=1.0, omega=2.0, steps=2)
    made.fastest = 1e-3
    drawn = made.draw(request)
    sampler = Sampler(checkpoint.load_checkpoint(tmp_path / "model"))
    expected = draw_by_seed(sampler, [7, 7, *range(10)], [4, 3, *[4] * 10], steps=2, omega=2.0)
    found = torch.cat((drawn.image[None], drawn.between[:1], drawn.classes))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(drawn.between) == 9
    torch.testing.assert_close(drawn.between[8], drawn.image, rtol=1e-4, atol=1e-4)

    halfway = torch.cat([made.noise(seed, seed + 1000, [0.5]) for seed in range(100)])
    assert halfway.std().item() == pytest.approx(made.config.noise_scale, rel=0.03)  # 6400 numbers
    assert torch.equal(*made.noise(5, 5, [0.0, 0.5]))


def test_a_slow_network_draws_fewer_images(tmp_path: Path) -> None:
    made = studio(write_model(tmp_path / "model", DIGITS))
    for seconds, expected in ((0.01, (9, 10)), (0.1, (9, 0)), (0.2, (5, 0)), (7.0, (3, 0))):
        made.fastest = seconds
        assert (made.frames, made.num_classes) == expected
    made.draw(made.first())
    assert made.fastest < 7  # a machine that is busy at the start recovers


def test_guidance_is_offered_up_to_the_trained_maximum(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", DIGITS)
    assert studio(folder).is_guided and studio(folder).largest_omega == 4.0
    (folder / "config.json").unlink()
    assert studio(folder / "weights.safetensors").largest_omega == 8.0
    single = studio(write_model(tmp_path / "single", ["everything"]))
    assert not single.is_guided and single.num_classes == 0
    page = single.page(single.first())
    assert "class" not in re.sub(r"<[^>]*>", "", page)  # without classes, none is named


def test_class_names_are_text_not_markup(tmp_path: Path) -> None:
    made = studio(write_model(tmp_path / "model", ["<script>", "b & c"]))
    page = made.page(Request(label=0))
    assert "<script>" not in page and "&lt;script&gt;" in page


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Gradio leaves event loops open
@pytest.mark.parametrize(("count", "kind"), [(1, "radio"), (3, "radio"), (20, "dropdown")])
def test_pages_for_any_number_of_classes(count: int, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    made = studio(write_model(tmp_path / "model", [f"class {i}" for i in range(count)]))
    components = build_page(made, "a_b_<i>").config["components"]
    assert "<h2>a_b_&lt;i&gt;</h2>" in [x["props"].get("value") for x in components]
    parts = [x for x in components if x["type"] in ("radio", "dropdown", "slider")]
    choice, omega, *_ = parts
    assert choice["type"] == kind and len(choice["props"]["choices"]) == count
    assert choice["props"]["visible"] == omega["props"]["visible"] == (count > 1)


def test_without_a_browser_the_address_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "model", DIGITS)
    monkeypatch.setattr(demo, "build_page", lambda studio, title: None)
    monkeypatch.setattr(demo, "serve", lambda page, listener: None)
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    assert main(["demo", str(folder), "--port", "0", "--open"]) == 0
    assert re.search(
        r"no browser could be started: open http://127\.0\.0\.1:\d+ yourself\n", capsys.readouterr().out
    )


def test_in_a_browser_images_follow_the_controls(tmp_path: Path) -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("Gradio is not installed")
    if (reason := browsers.why_not()) is not None:
        pytest.skip(reason)
    folder = write_model(tmp_path / "model", DIGITS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = f"{ONLY_THIS_MACHINE}\nimport sys\nfrom pmf.cli import main\nsys.exit(main())"
    words = ["demo", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *words],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = re.findall(r"open (http://127\.0\.0\.1:\d+) in", process.stdout.readline())[0]
        with browsers.browser(tmp_path / "profile") as window:
            window.requests()  # the browser's own start page
            window.open(url)
            _check_the_page(window, folder)
            asked = [x for x in window.requests() if not x.startswith(("chrome://", "data:", "blob:"))]
            assert asked and all(x.startswith(url) for x in asked), asked
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "") and "OUTSIDE" not in err and "Traceback" not in err, err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def _check_the_page(window: browsers.Browser, folder: Path) -> None:
    caption = "return document.querySelector('.pmf figcaption')?.textContent"
    sampler = Sampler(checkpoint.load_checkpoint(folder))

    def is_drawn(expected: torch.Tensor) -> bool:
        source = window.run("return document.querySelector('.pmf img').src")
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as image:
            shown = np.asarray(image).astype(int)
        return bool(np.abs(shown - to_uint8(expected)[0, 0].numpy()).max() <= 1)

    window.until(caption, lambda text: text == "class 0, seed 0, 1 evaluation of the network")
    assert is_drawn(draw_by_seed(sampler, [0], [0]))
    window.click("input[type=radio][value='7']")
    window.until(caption, lambda text: text and text.startswith("class 7, seed 0,"))
    assert is_drawn(draw_by_seed(sampler, [7], [0]))
    window.press("input[type=range][aria-label$=' Seed']", 3 * RIGHT)
    window.until(caption, lambda text: "seed 3," in text)
    assert is_drawn(draw_by_seed(sampler, [7], [3]))
    window.press("input[type=range][aria-label$=Steps]", RIGHT)
    window.until(caption, lambda text: "2 evaluations" in text)
    window.press("input[type=range][aria-label$='for Guidance']", 4 * RIGHT)
    omega = "return document.querySelector('input[type=range][aria-label$=\"for Guidance\"]').value"
    assert float(window.run(omega)) == pytest.approx(1.2)
    window.until("return document.querySelectorAll('.pmf img').length")
    window.press("input[type=range][aria-label$='Between the seeds']", 50 * RIGHT)
    window.until(caption, lambda text: "seed 3 to 1 at 0.50" in text)
    half = Studio(checkpoint.load_model(folder), torch.device("cpu")).draw(
        Request(label=7, omega=1.2, steps=2, seed=3, other_seed=1, blend=0.5)
    )
    assert is_drawn(half.image[None])


def test_a_port_in_use_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "model", DIGITS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["demo", str(folder), "--port", port]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        f"error: cannot listen on port {port} of 127.0.0.1 .*: give another --port, .*\n", error
    )
    assert main(["demo", str(folder), "--port", "70000"]) == 2
    assert "cannot listen on port 70000" in capsys.readouterr().err


def test_without_gradio_the_demo_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "model", DIGITS)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(folder), "--port", "0"]) == 2
    expected = "error: pmf demo needs Gradio, which is not installed: pip install 'gradio>=6'\n"
    assert capsys.readouterr().err == expected


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert main(["demo", str(tmp_path), "--port", "0"]) == 2
    assert "contains no complete checkpoint" in capsys.readouterr().err
