"""``pmf evaluate`` from a checkpoint to its scores, and bad arguments for it and ``pmf sample``."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pmf import checkpoint, flow, metrics, models, sample
from pmf.checkpoint import sharded
from pmf.cli import evaluate, main
from pmf.data import load_digits, read_image, to_uint8

PIXELS = ["--features", "pixels", "--reference", "digits"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = models.create_model(
        "digits", hidden_size=16, depth=2, head_depth=1, num_heads=2, bottleneck=4, sample_omega=2.0
    )
    with torch.no_grad():
        model.u_final.linear.weight.normal_(0, 0.3)
    path = tmp_path_factory.mktemp("model") / "weights.safetensors"
    names = [f"digit {i}" for i in range(10)]
    path.write_bytes(checkpoint.weights_bytes(dict(model.named_parameters()), model.config, names))
    return path


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_the_distance_is_that_of_the_samples(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(weights), *PIXELS, "--num-images", "45", "--seed", "5"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Frechet distance (pixels) of 45 images: ") and "FID" not in said
    assert not list(tmp_path.rglob("*.png"))

    model = checkpoint.load_checkpoint(weights)
    noise = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(5 + i)) for i in range(45)]
    images = sample(model, [i % 10 for i in range(45)], noise=torch.stack(noise))
    digits = load_digits()
    real = to_uint8(digits.get(range(len(digits)))[0])
    ours, theirs = (x.double().flatten(1) / 127.5 - 1 for x in (to_uint8(images), real))
    expected = metrics.frechet_distance(ours, theirs)
    assert result(tmp_path / "evaluation")["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert result(tmp_path / "evaluation")["compared_with"]["images"] == 1797

    # With statistics instead of images, nothing is sampled or counted again.
    assert main(["evaluate", "--images", "digits", *PIXELS[:2], "--make-stats", "d.npz", "--out", "d"]) == 0
    monkeypatch.setattr(flow.Sampler, "__call__", None)
    words = ["evaluate", str(weights), *PIXELS[:3], "d.npz", "--num-images", "45", "--seed", "5"]
    assert main(words) == 0
    assert result(tmp_path / "evaluation")["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    digest = hashlib.sha256(Path("d.npz").read_bytes()).hexdigest()
    assert result(tmp_path / "evaluation")["compared_with"] == {"sha256": digest}


def test_the_sums_of_other_images_or_weights_are_not_used(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both had the name, number and shape of those counted before, and got their score."""
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--images", "a.npz", *PIXELS, "--out", "a"]
    for level in (1, 2):
        np.savez("a.npz", arr_0=np.full((3, 8, 8, 1), level, np.uint8))
        assert main(words) == (0 if level == 1 else 2)
    assert "its checksum is" in capsys.readouterr().err

    model = checkpoint.load_checkpoint(weights)
    header = {"model": dataclasses.asdict(model.config), "class_names": list("0123456789"), "half_lives": [1]}
    tensors = {f"{part}/{name}": x for name, x in model.state_dict().items() for part in ("weights", "ema-1")}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        sharded.save(tmp_path / "shared", tensors, header, b"{}")
        sharded.save(tmp_path / "other", {name: 0.9 * x for name, x in tensors.items()}, header, b"{}")
    finally:
        dist.destroy_process_group()
    words = ["evaluate", "shared", *PIXELS, "--num-images", "12", "--out", "b", "--ema"]
    assert main([*words, "1"]) == 0 and result(tmp_path / "b")["evaluated"]["part"] == "ema-1"
    assert main([*words, "none"]) == 2
    assert "its part is ema-1, now it is weights" in capsys.readouterr().err
    shutil.rmtree("shared")
    Path("other").rename("shared")
    assert main([*words, "1"]) == 2 and "its sha256 is" in capsys.readouterr().err


def test_saved_samples_are_the_counted_ones(weights: Path, tmp_path: Path) -> None:
    words = ["--num-images", "12", "--classes", "3", "digit 8", "--omega", "1.5", "--interval", "0.1", "0.9"]
    out = str(tmp_path / "a")
    assert (
        main(["evaluate", str(weights), *PIXELS, *words, "--keep", str(tmp_path / "kept"), "--out", out]) == 0
    )
    kept = sorted(path.relative_to(tmp_path / "kept").as_posix() for path in tmp_path.rglob("*.png"))
    assert kept == [
        f"{label:04d}/{i:08d}.png" for label, first in ((3, 0), (8, 1)) for i in range(first, 12, 2)
    ]
    words = ["--images", str(tmp_path / "kept"), "--channels", "1", "--out", str(tmp_path / "b")]
    assert main(["evaluate", *words, *PIXELS]) == 0
    ours, again = (result(tmp_path / name)["frechet_distance"] for name in ("a", "b"))
    assert again == pytest.approx(ours, rel=1e-9)
    # A seed gives the same image as in pmf sample.
    words = ["--classes", "8", "--seeds", "3", "--omega", "1.5", "--interval", "0.1", "0.9"]
    assert main(["sample", str(weights), *words, "--out", str(tmp_path / "c")]) == 0
    pictures = tmp_path / "c" / "class0008-digit_8_seed0003.png", tmp_path / "kept/0008/00000003.png"
    assert torch.equal(*(read_image(path, 8, 1) for path in pictures))


def test_fid_and_inception_score_with_weights_of_a_file(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        network = metrics.InceptionV3()
    network = network.to_empty(device="cpu").requires_grad_(False)
    for name, tensor in network.state_dict().items():
        tensor.normal_(0, 0.1) if tensor.ndim > 1 else tensor.fill_(float(name.endswith(("weight", "var"))))
    inception = str(tmp_path / "inception.pth")
    torch.save(network.state_dict(), inception)
    np.savez(tmp_path / "ref.npz", mu=np.ones(2048), sigma=np.zeros((2048, 2048)))
    # The distance over 2048 features takes seconds, and is the same function for all spaces.
    monkeypatch.setattr(evaluate, "frechet_of_moments", lambda mean, _, other, __: float(mean @ other))
    words = ["--reference", str(tmp_path / "ref.npz"), "--num-images", "3", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(weights), *words, "--weights", inception]) == 0
    said = capsys.readouterr().out
    assert said.startswith("FID of 3 images: ") and "Inception Score: 1." in said
    assert "fewer images than feature dimensions (2048)" in said
    sums, _ = checkpoint.read_tensors(tmp_path / "out" / "samples.safetensors")
    found = result(tmp_path / "out")
    assert found["frechet_distance"] == pytest.approx(float(sums["moments.sum"].sum()) / 3)
    assert found["features"]["name"] == "inception" and len(found["features"]["weights_sha256"]) == 64


def test_quick_uses_few_images_on_both_sides(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["evaluate", str(weights), *PIXELS, "--num-images", "99", "--quick", "--out", str(tmp_path / "a")]
        )
        == 0
    )
    assert " of 20 images: " in capsys.readouterr().out
    sums, _ = checkpoint.read_tensors(tmp_path / "a" / "reference.safetensors")
    assert sums["moments.count"] == 20
    # A subset of sorted images is evenly spaced, and the distance of a set to itself is 0.
    words = ["--images", "digits", "--num-images", "1797", *PIXELS, "--out", str(tmp_path / "b")]
    assert main(["evaluate", *words]) == 0
    assert result(tmp_path / "b")["frechet_distance"] == pytest.approx(0, abs=1e-9)
    words = ["--images", "digits", "--num-images", "1798", *PIXELS, "--out", str(tmp_path / "c")]
    assert main(["evaluate", *words]) == 2
    assert "--num-images must be at most the 1797 available images, got 1798" in capsys.readouterr().err


def stats(folder: Path, width: int) -> str:
    np.savez(folder / "stats.npz", mu=np.zeros(width), sigma=np.eye(width))
    return str(folder / "stats.npz")


Words = Callable[[Path], list[str]]
BAD: dict[str, tuple[Words, str]] = {
    "omega": (lambda p: [*PIXELS, "--omega", "0.5"], "--omega must be at least 1 (1 is no guidance), got"),
    "no omega": (lambda p: [*PIXELS, "--omega", "nan"], "--omega must be at least 1"),
    "interval": (lambda p: [*PIXELS, "--interval", "0.7", "0.2"], "--interval must be 0 <= MIN <= MAX <= 1"),
    "class": (lambda p: [*PIXELS, "--classes", "10"], "there is no class '10': the model knows digit 0,"),
    "size": (
        lambda p: ["--features", "pixels", "--reference", stats(p, 65)],
        "mu [65] and sigma [65, 65], but the features 'pixels' of these images have 64 dimensions",
    ),
    "reference": (lambda p: ["--features", "pixels", "--reference", str(p / "no")], "there are no images"),
    "statistics": (lambda p: ["--reference", "no.npz", *PIXELS[:2]], "reference statistics file no.npz"),
    "weights": (lambda p: ["--reference", "digits"], "--weights"),
    "features": (lambda p: ["--reference", "digits", "--features", "vgg"], "invalid choice: 'vgg'"),
    "no network": (lambda p: [*PIXELS, "--weights", "x"], "pixels have none"),
    "nothing": (lambda p: [], "give --reference to compare, or --make-stats"),
    "both": (lambda p: [*PIXELS, "--images", "digits"], "give either a checkpoint to sample"),
    "suffix": (lambda p: [*PIXELS, "--make-stats", "x.pt"], "--make-stats must end in .npz"),
    "overwriting": (lambda p: [*PIXELS, "--make-stats", stats(p, 64)], "stats.npz already exists: choose"),
    "one image": (lambda p: [*PIXELS, "--num-images", "1"], "--num-images must be 2 or more, got 1"),
    "batch": (lambda p: [*PIXELS, "--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
    "steps": (lambda p: [*PIXELS, "--steps", "0"], "--steps must be 1 or more, got 0"),
    "seed": (lambda p: [*PIXELS, "--seed", "-1"], "--seed must lie between 0"),
    "cut": (lambda p: [*PIXELS, "--image-size", "8"], "--image-size and --channels apply to --images"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_sentence_and_leaves_nothing(
    weights: Path,
    tmp_path: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words, sentence = BAD[case][0](tmp_path), BAD[case][1]
    assert main(["evaluate", str(weights), *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and sentence in said.err and said.err.count("\n") == 1, said.err
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--omega", "7"],
        ["--times", "1", "0"],
        ["--interval", "0", "1"],
        ["--steps", "2"],
        ["--seed", "3"],
        ["--ema", "500"],
        ["--precision", "fp32"],
        ["--classes", "3"],
        ["--keep", "kept"],
    ],
)
def test_settings_of_samples_are_rejected_for_images(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is sampled, so they had no effect."""
    assert main(["evaluate", "--images", "digits", *PIXELS, *words]) == 2
    expected = f"error: {words[0]} applies to samples, not to --images: leave it out\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--omega", "0.5"], "omega must be finite and at least 1 (1 is no guidance), got 0.5"),
        (
            ["--interval", "0.7", "0.2"],
            "interval must be two numbers 0 <= t_min <= t_max <= 1, got (0.7, 0.2)",
        ),
        (["--classes", "10"], "there is no class '10'"),
    ],
)
def test_sampling_rejects_the_same(
    weights: Path, tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(weights), *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and sentence in said.err and said.err.count("\n") == 1, said.err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_evaluation_says_how_to_continue(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(weights), *PIXELS, "--num-images", "40", "--out", str(tmp_path / "out")]
    draw, drawn = flow.Sampler.__call__, []

    def draw_twice(*arguments: object, **options: object) -> torch.Tensor:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(1)
        return draw(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(flow.Sampler, "__call__", draw_twice)
        assert main(words) == 130
    assert f"the same command continues from the sums in {tmp_path / 'out'}" in capsys.readouterr().err
    assert main(words) == 0
    whole = [*words[:-1], str(tmp_path / "whole")]
    assert main(whole) == 0
    assert result(tmp_path / "out")["frechet_distance"] == result(tmp_path / "whole")["frechet_distance"]
