"""Datasets in MNIST's file format, as Fashion-MNIST is distributed."""

import gzip
from pathlib import Path

import pytest
import torch

from pmf.data import load_dataset
from pmf.errors import UserError

HEADER = {3: bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 6, 0, 0, 0, 6]), 1: bytes([0, 0, 8, 1, 0, 0, 0, 4])}
PIXELS = bytes(range(4 * 36))


def write(folder: Path, images: bytes, labels: bytes, end: str = ".gz") -> str:
    for name, content in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        (folder / (name + end)).write_bytes(gzip.compress(content) if end else content)
    return str(folder)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_images_and_labels_are_those_of_the_files(tmp_path: Path, end: str) -> None:
    source = write(tmp_path, HEADER[3] + PIXELS, HEADER[1] + bytes([2, 0, 1, 2]), end)
    dataset = load_dataset(source, 6, 1)
    images, labels = dataset.get([3, 0])
    expected = torch.tensor([list(range(108, 144)), list(range(36))]).reshape(2, 1, 6, 6) / 127.5 - 1
    assert torch.equal(images, expected) and labels.tolist() == [2, 2]
    assert (len(dataset), dataset.class_names) == (4, ["0", "1", "2"])
    write(tmp_path, HEADER[3] + PIXELS, HEADER[1] + bytes([2, 0, 2, 1]), end)
    assert load_dataset(source, 6, 1).fingerprint != dataset.fingerprint


@pytest.mark.parametrize(
    ("images", "labels", "size", "sentence"),
    [
        (HEADER[3] + PIXELS, HEADER[1] + bytes(4), 8, "6x6 greyscale, .* use --image-size 6x6 --channels 1"),
        (HEADER[3] + PIXELS[:-1], HEADER[1] + bytes(4), 6, "images-idx3-ubyte.gz is truncated"),
        (
            HEADER[3] + PIXELS,
            HEADER[3] + PIXELS,
            6,
            "labels-idx1-ubyte.gz is truncated, or not a file of 1-dim",
        ),
        (HEADER[3] + PIXELS, bytes([0, 0, 8, 1, 0, 0, 0, 1, 5]), 6, "contains 4 images and 1 labels"),
        (b"", HEADER[1] + bytes(4), 6, "is truncated"),
    ],
)
def test_files_that_do_not_fit_are_named(
    tmp_path: Path, images: bytes, labels: bytes, size: int, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load_dataset(write(tmp_path, images, labels), size, 1)


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    source = write(tmp_path, HEADER[3] + PIXELS, HEADER[1] + bytes(4))
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="images-idx3-ubyte.gz cannot be read"):
        load_dataset(source, 6, 1)
