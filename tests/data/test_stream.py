"""The order of the images is a pure function of seed and position."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pmf.data import FolderImages, MemoryImages, ShuffledStream, load_dataset, load_digits
from pmf.data.finding import find_images
from pmf.errors import UserError


def numbered(count: int) -> MemoryImages:
    """Images whose only pixel is their index."""
    pixels = torch.arange(count, dtype=torch.float32).reshape(count, 1, 1, 1)
    return MemoryImages(pixels, torch.arange(count) % 2, ["0", "1"])


def seen(stream: ShuffledStream, batches: int) -> list[float]:
    return torch.cat([stream.next_batch()[0].flatten() for _ in range(batches)]).tolist()


@given(st.integers(2, 23), st.integers(1, 50), st.integers(0, 5), st.integers(0, 2**32))
def test_resumed_stream_continues_exactly(count: int, batch: int, before: int, seed: int) -> None:
    whole = ShuffledStream(numbered(count), batch, seed)
    seen(whole, before) if before else None
    resumed = ShuffledStream(numbered(count), batch, seed, position=before * batch)
    assert seen(resumed, 3) == seen(whole, 3)


@given(st.integers(2, 23), st.integers(1, 9))
def test_every_epoch_shows_every_image_once(count: int, batch: int) -> None:
    stream = ShuffledStream(numbered(count), batch, seed=3)
    order = seen(stream, -(-3 * count // batch))[: 3 * count]
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    first, second = (seen(ShuffledStream(numbered(50), 100, seed), 1) for seed in (0, 1))
    assert first[:50] != first[50:] and first != second


def test_files_read_ahead_come_in_the_same_order_as_from_memory(tmp_path: Path) -> None:
    for index in range(7):
        path = tmp_path / str(index % 2) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), 10 * index, dtype=np.uint8)).save(path)
    in_memory = load_dataset(str(tmp_path), 4, 1)
    files = find_images(str(tmp_path))
    from_files = FolderImages(files.images, files.labels, files.class_names, 4, 1)
    from_files.check_headers()
    one, other = (
        ShuffledStream(in_memory, 3, seed=5, position=6),
        ShuffledStream(from_files, 3, seed=5, position=6),
    )
    for _ in range(6):
        (images, labels), (images_read, labels_read) = one.next_batch(), other.next_batch()
        assert torch.equal(images, images_read) and torch.equal(labels, labels_read)
        assert one.position == other.position


def test_digits_are_scaled_to_unit_range() -> None:
    dataset = load_digits()
    images, labels = dataset.get(range(len(dataset)))
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert torch.equal((images + 1) * 8, ((images + 1) * 8).round())  # 17 grey levels
    assert labels.dtype == torch.int64 and labels.bincount().min() >= 170
    assert dataset.class_names == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    ("size", "channels", "sentence"), [(16, 1, "8x8 grey"), (8, 3, "8x8 grey"), (8, 2, "--channels")]
)
def test_digits_have_only_one_shape(size: int, channels: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_dataset("digits", size, channels)


def test_a_folder_called_digits_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained on scikit-learn's digits without a word, instead of one's own."""
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("digits", 8, 1)) == 1797 and not caplog.text
    Path("digits").mkdir()
    Image.new("L", (8, 8)).save("digits/1.png")
    assert len(load_dataset("digits", 8, 1)) == 1797
    assert "the folder of that name is ./digits" in caplog.text
    assert len(load_dataset("./digits", 8, 1)) == 1


@pytest.mark.parametrize(
    ("pixels", "labels", "sentence"),
    [
        (torch.zeros(3, 1, 4, 4), torch.tensor([1, 2, 3]), "labels must lie between 0 and 2, .* got 1 to 3"),
        (torch.zeros(3, 1, 4, 4), torch.tensor([-1, 0, 1]), "got -1 to 1"),
        (torch.zeros(3, 1, 4, 4), torch.tensor([0, 1]), r"labels must be \[3\], got \[2\]"),
        (torch.zeros(3, 4, 4), torch.zeros(3), r"pixels must be uint8 or float32 .* \[3, 4, 4\]"),
        (torch.zeros(3, 1, 4, 4, dtype=torch.int64), torch.zeros(3), "got torch.int64"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_named(
    pixels: torch.Tensor, labels: torch.Tensor, sentence: str
) -> None:
    """A label one too large is that of no label: such images were trained on as if they had none."""
    with pytest.raises(ValueError, match=f"MemoryImages: .*{sentence}"):
        MemoryImages(pixels, labels, ["a", "b", "c"])


def test_digits_without_scikit_learn_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        load_digits()
