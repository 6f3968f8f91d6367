"""Reference statistics, images and weights in the formats in use, and unusable ones."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pmf import load_checkpoint
from pmf.errors import UserError
from pmf.evaluation import Samples, Statistics, open_images, open_space, read_statistics, write_statistics
from pmf.evaluation.features import Pixels
from pmf.evaluation.judge import Judge
from pmf.models import ModelConfig
from pmf.perceptual import EfficientNetLite0
from pmf.ranks import Ranks

SPACE = Pixels(1, 2, torch.device("cpu"))
MEAN, COVARIANCE = np.arange(4.0), np.diag([1.0, 2, 3, 4])


@pytest.mark.parametrize("names", [("mu", "sigma"), ("ref_mu", "ref_sigma"), ("m", "s"), ("mean", "cov")])
def test_statistics_are_found_under_all_common_names(tmp_path: Path, names: tuple[str, str]) -> None:
    np.savez(tmp_path / "a.npz", **dict(zip(names, (MEAN, COVARIANCE.astype(np.float32)), strict=True)), n=5)
    found = read_statistics(tmp_path / "a.npz", SPACE)
    assert found is not None and found.mean.dtype == found.covariance.dtype == torch.float64
    assert found.mean.tolist() == MEAN.tolist() and found.covariance.tolist() == COVARIANCE.tolist()


def test_written_statistics_are_read_and_name_their_features(tmp_path: Path) -> None:
    written = Statistics(torch.from_numpy(MEAN), torch.from_numpy(COVARIANCE))
    write_statistics(tmp_path / "a.npz", written, SPACE, 7)
    found = read_statistics(tmp_path / "a.npz", SPACE)
    assert found is not None and torch.equal(found.covariance, written.covariance)
    with np.load(tmp_path / "a.npz") as arrays:  # as other tools do
        assert arrays["mu"].shape == (4,) and int(arrays["images"]) == 7
    other = Pixels(1, 2, torch.device("cpu"))
    other.name = "lite"
    with pytest.raises(UserError, match="of the features 'pixels', not 'lite': give --features pixels"):
        read_statistics(tmp_path / "a.npz", other)


def test_statistics_of_equally_many_pixels_in_another_shape_are_refused(tmp_path: Path) -> None:
    written = Statistics(torch.from_numpy(MEAN), torch.from_numpy(COVARIANCE))
    write_statistics(tmp_path / "a.npz", written, SPACE, 7)
    with pytest.raises(UserError, match=r"\[2, 2\].*here they are .*\[1, 4\].*make the statistics again"):
        read_statistics(tmp_path / "a.npz", Pixels(1, (1, 4), torch.device("cpu")))


def test_a_batch_of_images_is_statistics_only_if_it_contains_them(tmp_path: Path) -> None:
    pixels = np.zeros((3, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "images.npz", pixels)
    assert read_statistics(tmp_path / "images.npz", SPACE) is None
    np.savez(tmp_path / "adm.npz", pixels, mu=MEAN, sigma=COVARIANCE)
    assert read_statistics(tmp_path / "adm.npz", SPACE) is not None


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (
            {"mu": np.zeros(5), "sigma": np.eye(5)},
            r"mu \[5\] and sigma \[5, 5\].*'pixels'.*have 4 dimensions",
        ),
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, r"sigma \[5, 5\]"),
        ({"m": np.zeros(4), "s": np.full((4, 4), np.nan)}, "non-finite"),
        ({"mu": np.zeros(4)}, "contains mu, but neither mu and sigma nor images in arr_0"),
        ({"mu": np.array([None]), "sigma": np.eye(4)}, "is truncated or not an .npz file"),
    ],
)
def test_statistics_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, Any], sentence: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=sentence):
        read_statistics(tmp_path / "a.npz", SPACE)


def test_damaged_files_of_statistics_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no reference statistics file"):
        read_statistics(tmp_path / "a.npz", SPACE)
    np.savez(tmp_path / "a.npz", mu=MEAN, sigma=COVARIANCE)
    whole = (tmp_path / "a.npz").read_bytes()
    for kept in (0, 10, len(whole) // 2):
        (tmp_path / "a.npz").write_bytes(whole[:kept])
        with pytest.raises(UserError, match="is truncated or not an .npz file"):
            read_statistics(tmp_path / "a.npz", SPACE)
    np.save(tmp_path / "b.npy", MEAN)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(UserError, match="not an .npz file .it contains a single array"):
        read_statistics(tmp_path / "b.npz", SPACE)


def test_damage_inside_compressed_arrays_is_named(tmp_path: Path) -> None:
    """A zlib.error, which is none of the errors of files."""
    levels = np.random.default_rng(0).integers(0, 9, (5, 8, 8, 3), np.uint8)
    for name, sentence in (("arr_0", "contains no image array arr_0"), ("mu", "is truncated or not an .npz")):
        np.savez_compressed(tmp_path / "a.npz", **{name: levels, "sigma": COVARIANCE})
        content = bytearray((tmp_path / "a.npz").read_bytes())
        content[200:232] = bytes(range(0, 256, 8))
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            open_images(str(tmp_path / "a.npz")) if name == "arr_0" else read_statistics(
                tmp_path / "a.npz", SPACE
            )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_of_images_is_read_by_rows(tmp_path: Path, save: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    save(tmp_path / "images.npz", pixels, np.arange(5))
    source = open_images(str(tmp_path / "images.npz"))
    assert (len(source), source.shape) == (5, (3, 4, 4))
    assert torch.equal(source.read([3, 1]), torch.from_numpy(pixels[[3, 1]]).permute(0, 3, 1, 2))
    with pytest.raises(UserError, match=r"contains images \[3, 4, 4\].* but \[3, 8, 8\] are needed"):
        open_images(str(tmp_path / "images.npz"), size=8)


def test_folders_are_read_recursively_and_cropped_on_request(tmp_path: Path) -> None:
    for name, size in (("b/x.png", (8, 8)), ("a.JPEG", (8, 8)), (".hidden.png", (2, 2))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.effect_noise(size, 50).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    source = open_images(str(tmp_path))
    assert (len(source), source.shape) == (2, (3, 8, 8))
    assert source.read([1, 0]).dtype == torch.uint8
    Image.new("L", (12, 9), 7).save(tmp_path / "c.png")
    grown = open_images(str(tmp_path))
    assert grown.identity() != source.identity()
    with pytest.raises(UserError, match=r"c\.png is not 8x8 pixels as .*a\.JPEG is: give --image-size"):
        grown.read([2])
    cut = open_images(str(tmp_path), channels=1, size=8)
    assert cut.read([2]).tolist() == [[[[7] * 8] * 8]]


def test_training_datasets_are_accepted(tmp_path: Path) -> None:
    pixels, labels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4), np.arange(3, dtype=np.uint8)
    for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
        (tmp_path / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    source = open_images(str(tmp_path), channels=1, size=4)
    assert (len(source), source.shape, source.from_files) == (3, (1, 4, 4), False)
    assert source.read([2]).flatten().tolist() == list(range(32, 48))


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no images .*nowhere: give a folder"):
        open_images(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="the folder .* contains no images"):
        open_images(str(tmp_path))
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(UserError, match=r"contains float64 \[2, 4, 4, 3\]: images must be uint8"):
        open_images(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", labels=np.zeros(2))
    with pytest.raises(UserError, match="contains no image array arr_0"):
        open_images(str(tmp_path / "a.npz"))


def test_images_need_not_be_square(tmp_path: Path) -> None:
    for name, level in (("a", 3), ("b", 250)):
        Image.new("L", (8, 4), level).save(tmp_path / f"{name}.png")
    source = open_images(str(tmp_path), channels=1)
    assert source.shape == (1, 4, 8) and source.read([1]).tolist() == [[[[250] * 8] * 4]]
    assert open_images(str(tmp_path), size=(2, 6)).read([0]).shape == (1, 3, 2, 6)
    np.savez(tmp_path / "images.npz", np.zeros((5, 4, 8, 3), np.uint8))
    assert open_images(str(tmp_path / "images.npz")).shape == (3, 4, 8)
    assert open_images(str(tmp_path / "images.npz"), size=(4, 8)).shape == (3, 4, 8)
    with pytest.raises(UserError, match=r"contains images \[3, 4, 8\].* but \[3, 8, 4\] are needed"):
        open_images(str(tmp_path / "images.npz"), size=(8, 4))


def test_large_images_are_averaged_in_the_pixel_space() -> None:
    space = Pixels(3, 64, torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features, _ = space(pixels)
    assert features.shape == (2, space.width) == (2, 3 * 32 * 32)
    first = pixels[0, 0, :2, :2].double().mean() / 127.5 - 1
    assert float(features[0, 0]) == pytest.approx(float(first), abs=1e-6)


def open_inception(weights: Path | None) -> None:
    open_space("inception", channels=3, size=8, device=torch.device("cpu"), weights=weights)


def test_missing_and_foreign_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=r"pt_inception-2015-12-05-6726825d\.pth.*https://.*--weights.*pixels"
    ):
        open_inception(None)
    with pytest.raises(UserError, match=r"--weights .*none\.pth does not exist: download it from https://"):
        open_inception(tmp_path / "none.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "vision.pth")
    with pytest.raises(UserError, match="does not contain FID's Inception network .it lacks 'Conv2d_1a"):
        open_inception(tmp_path / "vision.pth")
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half")
    with pytest.raises(UserError, match=r"weights-inception-2015-12-05-6726825d\.pth is truncated"):
        open_inception(None)


def test_lite0_accepts_grey_images_of_any_size(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = EfficientNetLite0()
    network = network.to_empty(device="cpu")
    for name, tensor in network.state_dict().items():
        tensor.normal_(0, 0.1) if tensor.ndim > 1 else tensor.fill_(float(name.endswith(("weight", "var"))))
    torch.save(network.state_dict(), tmp_path / "lite0.pth")
    space = open_space(
        "lite0", channels=1, size=8, device=torch.device("cpu"), weights=tmp_path / "lite0.pth"
    )
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    features, logits = space(grey)
    assert features.shape == (2, space.width) and logits is None and features.std(0).any()
    assert torch.equal(features, space(grey.expand(-1, 3, -1, -1))[0])
    assert space.title == "Frechet distance (lite0)"


def test_all_classes_in_another_order_are_other_samples() -> None:
    """Image i has the class of its place: their sums were taken for those of the usual order."""
    config = ModelConfig(num_classes=3)
    sampler: Any = SimpleNamespace(network=SimpleNamespace(config=config), precision="fp32")
    usual, turned, one = (Samples(sampler, {}, classes, 9) for classes in ([0, 1, 2], [2, 1, 0], [1]))
    assert [x.identity()["classes"] for x in (usual, turned, one)] == ["all", [2, 1, 0], [1]]


@pytest.mark.parametrize("features", ["inception", "lite0", "pixels"])
def test_weights_of_a_judge_are_named_by_its_flag(tmp_path: Path, features: str) -> None:
    """In an abbreviated home, which shells leave as it is in quotes."""
    said = "needs" if features == "pixels" else f"{Path.home() / 'no.pth'} does not exist"
    with pytest.raises(UserError, match=f"^--evaluate-weights {said}"):
        Judge(
            "digits",
            image_shape=(1, 8, 8),
            features=features,
            weights=Path("~/no.pth"),
            images=4,
            folder=tmp_path,
            device=torch.device("cpu"),
            batch_size=4,
            ranks=Ranks(),
        )


class Impatient(Pixels):
    """Pixels that Ctrl-C interrupts at the third batch."""

    batches = 0

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.batches += 1
        if self.batches == 3:
            raise KeyboardInterrupt
        return super().__call__(pixels)


def test_a_judge_forgets_the_samples_of_an_interrupted_call(tmp_path: Path) -> None:
    """A run that is resumed may come to the same step with other weights: the sums were those of both."""
    judge = Judge(
        "digits",
        image_shape=(1, 8, 8),
        features="pixels",
        weights=None,
        images=32,
        folder=tmp_path,
        device=torch.device("cpu"),
        batch_size=8,
        ranks=Ranks(),
    )
    model, other = load_checkpoint("digits"), load_checkpoint("digits")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
    expected, pixels = judge(model, 5), judge.space
    judge.space = Impatient(1, 8, torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        judge(other, 5)
    assert list(tmp_path.iterdir())
    judge.space = pixels
    assert judge(model, 5) == expected
    assert not list(tmp_path.iterdir())
