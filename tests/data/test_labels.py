"""The three layouts of an image folder, and every way in which they can be broken."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmf.data import load_dataset
from pmf.data.finding import FoundImages, find_images
from pmf.errors import UserError


def write_image(path: Path, level: int = 0, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), level).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, one nested file, and a hidden file, which is ignored."""
    write_image(tmp_path / "dog" / "a.png", 20)
    write_image(tmp_path / "cat" / "deep" / "b.png", 10)
    write_image(tmp_path / "cat" / "c.png", 11)
    (tmp_path / "cat" / ".DS_Store").write_text("hidden")
    return tmp_path


def names_of(found: FoundImages) -> list[tuple[str, int]]:
    return [(Path(str(path)).name, label) for path, label in zip(found.images, found.labels, strict=True)]


def test_a_subfolder_per_class(folder: Path) -> None:
    found = find_images(str(folder))
    assert found.class_names == ["cat", "dog"]
    assert names_of(found) == [("c.png", 0), ("b.png", 0), ("a.png", 1)]


def test_labels_csv_with_words_and_a_byte_order_mark(folder: Path) -> None:
    (folder / "labels.csv").write_text(
        '\ufefffile,label\ndog/a.png,woof\n"cat/c.png",meow\n\n', encoding="utf-8"
    )
    found = find_images(str(folder))
    assert found.class_names == ["meow", "woof"] and found.labels == [1, 0]


def test_integer_labels_are_ordered_as_numbers(folder: Path) -> None:
    (folder / "labels.csv").write_text("file,label\ndog/a.png,10\ncat/c.png,9\n")
    found = find_images(str(folder))
    assert found.class_names == ["9", "10"] and found.labels == [1, 0]


def test_dataset_json_of_the_edm_tools(folder: Path) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": [["dog/a.png", 1], ["cat/c.png", 0]]}))
    found = find_images(str(folder))
    assert found.class_names == ["0", "1"] and found.labels == [1, 0]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_of_hugging_faces_image_folders(folder: Path, name: str) -> None:
    rows = [("dog/a.png", "x, y", "b"), ("cat/c.png", "z", "a")]
    if name.endswith("csv"):
        text = "file_name,text,label\n" + "".join(f'{file},"{said}",{label}\n' for file, said, label in rows)
    else:
        text = "".join(
            json.dumps({"file_name": file, "text": said, "label": label}) + "\n" for file, said, label in rows
        )
    (folder / name).write_text(text)
    found = find_images(str(folder))
    assert [Path(path).name for path in found.images] == ["a.png", "c.png"]
    assert (list(found.labels), found.class_names) == ([1, 0], ["a", "b"])
    (folder / name).write_text(text.replace("label", "caption"))  # the folders are classes as without it
    assert len(find_images(str(folder)).images) == 3


def test_spaces_after_the_commas_of_metadata_are_no_part_of_its_words(folder: Path) -> None:
    """Its labels were ignored without a word."""
    (folder / "metadata.csv").write_text("file_name, label\ndog/a.png, b\ncat/c.png, a\n")
    found = find_images(str(folder))
    assert (list(found.labels), found.class_names) == ([1, 0], ["a", "b"])


def test_images_that_the_list_lacks_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rest was left out without a word."""
    for name, text in (
        ("LABELS.CSV", "file,label\ndog\\a.png,woof\n"),  # from Windows
        ("dataset.json", json.dumps({"labels": [["dog/a.png", 1]]})),
    ):
        (folder / name).write_text(text)
        found = find_images(str(folder))
        assert found.images == [f"{folder}/dog/a.png"] and len(found.class_names) == 1
        assert f"{folder}: left out 2 not listed in {name} (cat/c.png, ...)" in caplog.text
        (folder / name).unlink()


def test_the_home_folder_may_be_abbreviated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load_dataset(f"~/{folder.name}", 8, 1)) == 3


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8") and None


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "not utf-8": (lambda f: (f / "labels.csv").write_bytes(b"file,label\n\xff\xfe") and None, "UTF-8"),
    "header": (write("labels.csv", "dog/a.png,1\n"), "first row of .*labels.csv must be file,label"),
    "empty csv": (write("labels.csv", ""), "first row"),
    "third column": (
        write("labels.csv", "file,label,split\ndog/a.png,1,train\n"),
        "labels.csv must have two columns, file and label: remove 'split'",
    ),
    "semicolons": (write("labels.csv", "file;label\n"), "must be file,label, got 'file;label'"),
    "windows": (
        write("labels.csv", "file,label\nC:\\a.png,1\n"),
        "does not exist in .*: separate folders by /",
    ),
    "no rows": (write("labels.csv", "file,label\n"), "lists no images"),
    "three cells": (write("labels.csv", "file,label\ndog/a.png,1,2\n"), "row 2 .*got 'dog/a.png,1,2'"),
    "no label": (write("labels.csv", "file,label\ndog/a.png,\n"), "row 2"),
    "absent file": (
        write("labels.csv", "file,label\nfox.png,1\ncat/c.png,2\n"),
        "'fox.png', which does not exist",
    ),
    "twice": (write("labels.csv", "file,label\ndog/a.png,1\ndog/a.png,2\n"), "'dog/a.png' twice"),
    "outside": (write("labels.csv", "file,label\n../a.png,1\n"), "outside"),
    "quote": (write("labels.csv", 'file,label\n"dog/a.png,1\n'), "cannot be read as a CSV"),
    "json": (write("dataset.json", "{"), "cannot be read as JSON"),
    "json list": (write("dataset.json", "[]"), '"labels"'),
    "json entry": (write("dataset.json", '{"labels": [["dog/a.png", "x"]]}'), "entry 0"),
    "metadata": (
        write("metadata.jsonl", '{"file_name": "dog/a.png", "label": [1]}'),
        "entry 0 of .*jsonl must",
    ),
    "metadata without a label in its first entry": (
        write("metadata.jsonl", '{"file_name": "dog/a.png"}\n{"file_name": "cat/c.png", "label": 1}'),
        "entry 0 of .*jsonl must",
    ),
    "damaged metadata": (write("metadata.jsonl", "{"), "metadata.jsonl cannot be read"),
    "json bool": (write("dataset.json", '{"labels": [["dog/a.png", true]]}'), "entry 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_labels_are_named(folder: Path, case: str) -> None:
    break_it, sentence = BROKEN[case]
    break_it(folder)
    with pytest.raises(UserError, match=sentence):
        find_images(str(folder))


def test_folders_that_cannot_be_trained_on(tmp_path: Path) -> None:
    empty, hollow = tmp_path / "empty", tmp_path / "hollow"
    empty.mkdir()
    (hollow / "dog").mkdir(parents=True)
    (hollow / "notes.txt").touch()
    for path, sentence in {
        tmp_path / "nowhere": "is not a folder",
        empty: "empty contains no images: put them into one subfolder per class",
        hollow: r"hollow contains no images \(left out 1 of unsupported type \(notes.txt\)\)",
    }.items():
        with pytest.raises(UserError, match=sentence):
            find_images(str(path))


def test_a_dangling_link_counts_as_a_missing_image(folder: Path) -> None:
    (folder / "dog" / "gone.png").symlink_to(folder / "moved" / "gone.png")
    with pytest.raises(UserError, match=r"gone\.png cannot be read as an image"):
        load_dataset(str(folder), 8, 1)


def test_one_file_under_two_spellings_is_named_twice(folder: Path) -> None:
    first = sorted((folder / "dog").iterdir())[0].name
    (folder / "labels.csv").write_text(f"file,label\ndog/{first},dog\n./dog/{first},cat\n")
    with pytest.raises(UserError, match="twice"):
        find_images(str(folder))


def test_a_file_without_image_content_stops_loading(folder: Path) -> None:
    (folder / "dog" / "notes.png").write_text("remember the milk")
    with pytest.raises(UserError, match=r"notes\.png is not an image"):
        load_dataset(str(folder), 8, 1)


def test_a_loaded_folder_gives_its_pixels(folder: Path) -> None:
    dataset = load_dataset(str(folder), 8, 1)
    images, labels = dataset.get([2, 0])
    assert images.dtype.is_floating_point and images.shape == (2, 1, 8, 8) and labels.tolist() == [1, 0]
    np.testing.assert_allclose(images[:, 0, 0, 0].numpy(), [20 / 127.5 - 1, 11 / 127.5 - 1], rtol=1e-6)


def test_an_emoji_package_is_labelled_by_category(folder: Path) -> None:
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    names = ["tiger.png", "kiwi.png"]
    for name in names:
        Image.new("RGBA", (64, 64)).save(pictures / name)
    entries = [
        {"image": "tiger.png", "category": "Animals & Nature"},
        {"image": "kiwi.png", "category": "Food & Drink"},
        {"image": "not-drawn-yet.png", "category": "Food & Drink"},
        {"image": "tone.png", "category": "Component"},
    ]
    (folder / "emoji.json").write_text(json.dumps(entries))
    found = find_images(str(folder))
    assert found.images == [str(pictures / name) for name in names] and found.labels == [0, 1]
    assert found.class_names == ["Animals & Nature", "Food & Drink"]
    (folder / "emoji.json").write_text('[{"image": "tiger.png"}]')
    with pytest.raises(UserError, match="emoji.json is damaged"):
        find_images(str(folder))
