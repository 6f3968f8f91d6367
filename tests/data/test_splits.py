"""Training, validation and test splits side by side, under one rule for folders, shards and tables."""

import io
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pmf.data import load_dataset
from pmf.data.finding import find_images
from pmf.data.splits import split_of_file, split_of_folder
from pmf.errors import UserError


def write_images(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(root / name)


def read(root: Path) -> tuple[list[str], list[str]]:
    found = find_images(str(root))
    return [str(path).removeprefix(f"{root}/") for path in found.images], found.class_names


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("train2017", "train"),
        ("train_images", "train"),
        ("val", "validation"),
        ("valid", "validation"),
        ("validation-set", "validation"),
        ("dev", "validation"),
        ("test", "test"),
        ("test 2", "test"),
        ("trains", None),
        ("test_tube", None),
        ("invalid", None),
        ("cat", None),
    ],
)
def test_names_of_folders(name: str, part: str | None) -> None:
    assert split_of_folder(name) == part


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("train-00000-of-00010.parquet", "train"),
        ("imagenet1k-validation-00.tar", "validation"),
        ("data_test_3.tar", "test"),
        ("train2017_01.tar", "train"),
        ("train/0000.parquet", "train"),
        ("plain_text/validation/0000.parquet", "validation"),
        ("val/train-0.tar", "train"),
        ("000000.tar", None),
        ("constrained-0.tar", None),
        ("latest-0.tar", None),
    ],
)
def test_names_of_shards_and_tables(path: str, part: str | None) -> None:
    assert split_of_file(path) == part


def test_splits_are_not_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, "train2017/cat/1.png", "train2017/dog/2.png", "val2017/cat/3.png", "sheet.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").touch()
    with caplog.at_level(logging.WARNING, "pmf"):
        assert read(tmp_path) == (["train2017/cat/1.png", "train2017/dog/2.png"], ["cat", "dog"])
    assert "1 outside the train split (val2017)" in caplog.text
    assert "1 beside the folder train2017 (sheet.png)" in caplog.text


def test_flat_splits_have_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "train/1.png", "train/2.png", "test/3.png")
    assert read(tmp_path) == (["train/1.png", "train/2.png"], ["0"])


def test_without_a_training_split_the_first_is_read(tmp_path: Path) -> None:
    write_images(tmp_path, "val/cat/1.png", "val/dog/2.png", "test/cat/3.png")
    assert read(tmp_path)[0] == ["val/cat/1.png", "val/dog/2.png"]


def test_images_beside_a_test_folder_are_training_images(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "2.png", "test/3.png")
    assert read(tmp_path) == (["1.png", "2.png"], ["0"])


@pytest.mark.parametrize("name", ["test", "train"])
def test_a_class_may_have_the_name_of_a_split(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, f"{name}/1.png", "cat/2.png", "dog/3.png")
    assert read(tmp_path)[1] == sorted(["cat", "dog", name])


def test_folders_beside_splits_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "extra/cat/4.png")
    with caplog.at_level(logging.WARNING, "pmf"):
        assert read(tmp_path) == (["train/cat/1.png", "train/dog/2.png"], ["cat", "dog"])
    assert "1 beside the train split (extra), 1 outside the train split (val)" in caplog.text


def test_splits_below_one_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "images/train/1.png", "images/val/2.png")
    assert read(tmp_path) == (["images/train/1.png"], ["0"])
    write_images(tmp_path, "images/train/cat/3.png", "images/train/dog/4.png", "images/val/cat/5.png")
    assert read(tmp_path)[1] == ["cat", "dog"]


@pytest.mark.parametrize("others", [["labels"], ["masks", "Annotations"]])
def test_pictures_of_labels_are_not_a_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, others: list[str]
) -> None:
    """images beside labels or masks, with the splits below or above both."""
    for other in others:
        write_images(tmp_path, f"a/{other}/train/1.png", f"a/{other}/val/2.png", f"b/train/{other}/1.png")
    write_images(
        tmp_path, "a/Images/train/1.png", "a/Images/val/2.png", "b/train/images/1.png", "b/val/2.png"
    )
    with caplog.at_level(logging.WARNING, "pmf"):
        assert read(tmp_path / "a") == (["Images/train/1.png"], ["0"])
        assert read(tmp_path / "b") == (["train/images/1.png"], ["0"])
    assert f"left out {2 * len(others)} beside the folder Images ({min(others)}/train/1.png" in caplog.text
    write_images(tmp_path, "a/cats/3.png")  # then they are classes like any others
    assert len(read(tmp_path / "a")[1]) == 2 + len(others)


def test_splits_within_every_class(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png")
    assert read(tmp_path) == (["cat/train/1.png", "dog/train/3.png"], ["cat", "dog"])
    write_images(tmp_path, "dog/5.png")  # then the folders are not splits
    assert len(read(tmp_path)[0]) == 5


def test_labels_of_the_training_split_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, "train/images/1.png", "train/images/2.png", "val/3.png")
    (tmp_path / "train" / "labels.csv").write_text("file,label\nimages/1.png,b\nimages/2.png,a\n")
    (tmp_path / "train" / "notes.txt").touch()
    with caplog.at_level(logging.WARNING, "pmf"):
        found = find_images(str(tmp_path))
    assert list(found.labels) == [1, 0] and found.class_names == ["a", "b"]
    assert "left out 1 of unsupported type (train/notes.txt), 1 outside the train split (val)" in caplog.text


def test_splits_below_more_folders(tmp_path: Path) -> None:
    write_images(
        tmp_path, "data/photos/train/cat/1.png", "data/photos/train/dog/2.png", "data/photos/val/cat/3.png"
    )
    assert read(tmp_path)[1] == ["cat", "dog"] and len(read(tmp_path)[0]) == 2


def test_train_is_a_split_beside_a_folder_without_other_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/1.png", "train/dog/2.png", "unlabeled/3.png")
    assert read(tmp_path) == (["train/cat/1.png", "train/dog/2.png"], ["cat", "dog"])
    write_images(tmp_path, "bus/red/4.png")  # now train is a vehicle
    assert read(tmp_path)[1] == ["bus", "train", "unlabeled"]


def png() -> bytes:
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "PNG")
    return content.getvalue()


PNG = png()


def write_members(path: Path, members: list[tuple[str, Any]]) -> None:
    """A tar file of contents, or of links (kind, target), by name."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                about.type, about.linkname = content
                archive.addfile(about)
            else:
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))


def write_shard(path: Path, *names: str, label: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    members: list[tuple[str, Any]] = []
    for number, name in enumerate(names):
        members.append((f"{name}.png", PNG))
        if label:
            members.append((f"{name}.cls", str(number).encode()))
    write_members(path, members)


def test_splits_of_shards_in_folders_and_by_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "by_folder" / "train" / "0.tar", "a", "b")
    write_shard(tmp_path / "by_folder" / "val" / "0.tar", "c")
    assert len(load_dataset(str(tmp_path / "by_folder"), 8, 1)) == 2
    write_shard(tmp_path / "by_name" / "set-train-0.tar", "a", "b")
    write_shard(tmp_path / "by_name" / "set-val-0.tar", "c")
    assert len(load_dataset(str(tmp_path / "by_name"), 8, 1)) == 2
    assert len(load_dataset(f"{tmp_path}/by_name/set-val-0.tar", 8, 1)) == 1  # as requested


def test_splits_inside_a_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "all.tar", "train/a", "train/b", "val/c")
    assert list(find_images(str(tmp_path)).labels) == [0, 1]


def test_images_that_differ_only_in_their_extension_are_named(tmp_path: Path) -> None:
    """The last one was used: a run trained on masks."""
    write_members(tmp_path / "masks.tar", [("1.jpg", PNG), ("1.png", PNG), ("1.cls", b"0")])
    with pytest.raises(UserError, match=r"has two images with one name, 1.jpg and 1.png: rename"):
        find_images(str(tmp_path))


def test_the_last_of_two_members_with_one_name_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``tar -r`` appends a new version."""
    write_shard(tmp_path / "0.tar", "1", "2", "1")
    assert list(find_images(str(tmp_path)).labels) == [2, 1]
    assert "left out 2 written again later in the shard (1.png, ...)" in caplog.text


def test_links_in_a_shard_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GNU tar writes the second of two names of one file as a hard link: image and label disappeared."""
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    members = [("a/1.png", PNG), ("a/1.cls", b"\xef\xbb\xbf1"), ("b/2.png", (hard, "a/1.png"))]
    members += [("b/2.cls", b"0"), ("./b/3.png", (soft, "../b/2.png")), ("b/3.cls", (soft, "../a/1.cls"))]
    members += [("b/4.png", (soft, "/elsewhere.png")), ("b/5.png", (soft, "5.png"))]
    write_members(tmp_path / "A.TAR", members)
    dataset = load_dataset(str(tmp_path / "A.TAR"), 8, 1)  # whatever the case of the ending
    assert dataset.read(range(3))[1].tolist() == [1, 0, 1] and len(dataset) == 3
    assert "left out 2 no file, or a link to none in the archive (b/4.png, ...)" in caplog.text


def test_an_archive_beside_its_images_is_a_shard_only_with_labels(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/1.png", "train/dog/2.png")
    write_shard(tmp_path / "train.tar", "cat/1", "dog/2", "dog/3", label=False)
    assert read(tmp_path)[1] == ["cat", "dog"]
    write_shard(tmp_path / "train.tar", "cat/1", "dog/2", "dog/3")
    assert len(load_dataset(str(tmp_path), 8, 1)) == 3  # and the picture beside it is a preview


def test_keys_of_shards_may_contain_dots(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", "photo.2024.01", "photo.2024.02", "v1.2/a.b")
    dataset = load_dataset(str(tmp_path), 8, 1)
    assert len(dataset) == 3 and dataset.read([0, 1, 2])[1].tolist() == [0, 1, 2]


def test_shards_without_labels_have_one_class(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", "a", "b", label=False)
    assert load_dataset(str(tmp_path), 8, 1).class_names == ["0"]


def test_folders_in_shards_are_classes_and_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They were ignored without a note: a run without classes."""
    write_shard(tmp_path / "0.tar", "cat/1", "dog/1", label=False)
    write_shard(tmp_path / "1.tar", "cat/1", "owl/2", label=False)  # keys need not differ between shards
    found = find_images(str(tmp_path))
    assert found.class_names == ["cat", "dog", "owl"] and list(found.labels) == [0, 1, 0, 2]
    assert [str(image) for image in found.images][2] == f"cat/1.png in {tmp_path}/1.tar"
    shard = tmp_path / "all.tar"
    for names, classes, count in (
        (["photos/cat/1", "photos/dog/2"], ["cat", "dog"], 2),
        (["x/train/cat/1", "x/train/dog/2", "x/val/cat/3"], ["cat", "dog"], 2),
        (["cat/train/1", "cat/val/2", "dog/train/3", "dog/val/4"], ["cat", "dog"], 2),
        (["train/1", "val/2"], ["0"], 1),
        (["./photos/1", "./photos/2"], ["photos"], 2),
        (["1", "2"], ["0"], 2),
    ):
        write_shard(shard, *names, label=False)
        found = find_images(str(shard))
        assert (found.class_names, len(found.images)) == (classes, count), names
    assert "outside the train split (val)" in caplog.text
