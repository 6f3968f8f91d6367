"""WebDataset shards and parquet files: their images and labels, and errors for bad files."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pmf.data import ShuffledStream, load_dataset
from pmf.errors import UserError


def encoded(number: int, kind: str = "png") -> bytes:
    """A grey 4x4 image of level `number`."""
    content = io.BytesIO()
    Image.new("L", (4, 4), number).save(content, format=kind, lossless=True)
    return content.getvalue()


def pack(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four images; image n has level n and class n % 3."""
    for shard in range(3):
        members = []
        for number in range(4 * shard, 4 * shard + 4):
            kind = "webp" if number % 2 else "png"
            members += [(f"{number:03d}.cls", f"{number % 3}\n".encode())]
            members += [(f"{number:03d}.{kind}", encoded(number, kind))]
        pack(tmp_path / "shards" / f"{shard:06d}.tar", members)
    return tmp_path / "shards"


def levels(source: str) -> list[tuple[int, int]]:
    pixels, labels = (dataset := load_dataset(source, 4, 1)).read(range(len(dataset)))
    return [(int(image[0, 0, 0]), int(label)) for image, label in zip(pixels, labels, strict=True)]


def test_a_folder_a_pattern_and_one_shard(shards: Path) -> None:
    expected = [(number, number % 3) for number in range(12)]
    assert levels(str(shards)) == expected
    assert levels(f"{shards}/{{000001..000002}}.tar") == expected[4:]
    assert levels(f"{shards}/000000.tar") == expected[:4]
    assert load_dataset(str(shards), 4, 1).class_names == ["0", "1", "2"]


def test_images_read_from_shards_are_those_in_memory(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = ShuffledStream(load_dataset(str(shards), 4, 1), 6, seed=1, position=3)
    monkeypatch.setattr("pmf.data.datasets._CACHE_BYTES", 0)
    halves = [
        ShuffledStream(load_dataset(str(shards), 4, 1), 6, seed=1, position=3, rank=rank, ranks=2)
        for rank in range(2)
    ]
    for _ in range(4):
        images, labels = in_memory.next_batch()
        for rank, half in enumerate(halves):
            part, part_labels = half.next_batch()
            assert part.dtype == torch.uint8
            assert torch.equal(part, images[rank::2]) and torch.equal(part_labels, labels[rank::2])
        assert half.position == in_memory.position


def test_a_missing_or_damaged_shard_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"shard .*000003\.tar is missing"):
        load_dataset(f"{shards}/{{000000..000003}}.tar", 4, 1)
    whole = (shards / "000001.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    for length in (100, 700, end - 600, end):
        (shards / "000001.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"shard .*000001\.tar is truncated"):
            load_dataset(str(shards), 4, 1)
    halfway = whole.index(b"006.cls")
    damaged, endless = bytearray(whole), bytearray(whole)
    damaged[halfway] ^= 1  # in a header: tarfile ends there as if the archive did
    header = memoryview(endless)[halfway : halfway + 512]
    header[124:136], header[148:156] = (
        b"\x80" + b"\xff" * 11,
        b" " * 8,
    )  # a file of 2^88 bytes, and the checksum
    header[148:156] = b"%06o\0 " % sum(header)
    for content in (damaged, endless):
        (shards / "000001.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"shard .*000001\.tar is truncated or"):
            load_dataset(str(shards), 4, 1)
    (shards / "000001.tar").write_bytes(whole)
    monkeypatch.setattr("pmf.data.datasets._CACHE_BYTES", 0)
    dataset = load_dataset(str(shards), 4, 1)
    (shards / "000001.tar").write_bytes(whole[:1024])  # while training
    with pytest.raises(UserError, match=r"000001\.tar is truncated: 007\.webp extends past its end"):
        dataset.read([7])
    (shards / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001\.tar cannot be read"):
        dataset.read([7])


@pytest.mark.parametrize(
    ("about", "names", "expected"),
    [
        ([{"label": 2, "class": 0}, {"label": 0, "caption": "a cat"}], ["0", "1", "2"], [2, 0]),
        ([{"class": "dog"}, {"label": -1, "cls": "cat"}], ["cat", "dog"], [1, 0]),
        ([{"label": "10"}, {"label": "9"}], ["9", "10"], [1, 0]),
        ([{"caption": "a dog", "label": None}, {"label": True}], ["0"], [0, 0]),
        ([[1], "x"], ["0"], [0, 0]),
    ],
)
def test_labels_in_json(tmp_path: Path, about: list[Any], names: list[str], expected: list[int]) -> None:
    members = [
        (f"{key}.json", json.dumps(content).encode()) for key, content in zip("ab", about, strict=True)
    ]
    shard = pack(tmp_path / "s" / "0.tar", [("a.png", encoded(1)), ("b.png", encoded(2)), *members])
    assert levels(str(shard)) == list(zip((1, 2), expected, strict=True))
    assert load_dataset(str(shard), 4, 1).class_names == names
    if len(names) > 1:  # as with .cls, beside images the shard is the dataset
        (tmp_path / "s" / "c.png").write_bytes(encoded(3))
        assert len(load_dataset(str(shard.parent), 4, 1)) == 2
    pack(shard, [("a.png", encoded(1)), members[0], ("a.cls", b"3")])  # which says more clearly what it is
    assert levels(str(shard)) == [(1, 3)]


def test_a_class_without_images_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labels that count from 1 gave a class that was never trained, but sampled in every evaluation."""
    shard = pack(
        tmp_path / "0.tar", [("a.png", encoded(1)), ("a.cls", b"1"), ("b.png", encoded(2)), ("b.cls", b"2")]
    )
    assert load_dataset(str(shard), 4, 1).class_names == ["0", "1", "2"]
    assert f"{shard} has no images of class 0, so samples of it will be meaningless" in caplog.text
    caplog.clear()
    pack(shard, [("a.png", encoded(1)), ("a.cls", b"0"), ("b.png", encoded(2)), ("b.cls", b"1")])
    assert len(load_dataset(str(shard), 4, 1)) == 2 and not caplog.text


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        (
            [("a.png", encoded(1)), ("a.cls", b"0"), ("b.png", encoded(1)), ("b.json", b'{"label": "cat"}')],
            "has labels of two kinds, such as 'cat' and 0 in a.cls",
        ),
        (
            [("a.png", encoded(1)), ("a.json", b"{}"), ("b.png", encoded(1)), ("b.json", b'{"label": 0}')],
            r"no label a\.cls beside a\.png, but other images have one",
        ),
        ([("a.txt", b"1")], "contains no image"),
        ([("a.png", encoded(1)), ("b.cls", b"1")], r"labels such as b\.cls, none of which has an image"),
        ([("a.png", encoded(1)), ("a.cls", b"1000000000000")], "class 1000000000000, but there may be"),
        (
            [("a.png", encoded(1)), ("b.png", encoded(1)), ("b.cls", b"1")],
            r"no label a\.cls beside a\.png, but other images have one",
        ),
        (
            [("1.left.png", encoded(1)), ("1.right.png", encoded(1)), ("1.cls", b"1")],
            r"one label 1\.cls for 1\.left\.png and 1\.right\.png",
        ),
        ([("a.png", encoded(1)), ("a.cls", b"cat")], "must contain a class number"),
        (
            [("a.png", b"x"), ("a.cls", b"1"), ("b.png", encoded(1)), ("b.cls", b"2")],
            r"a\.png in .* not an image",
        ),
    ],
)
def test_what_a_shard_must_contain(tmp_path: Path, members: list[tuple[str, bytes]], sentence: str) -> None:
    shard = pack(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=sentence):
        load_dataset(str(shard), 4, 1)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tables in Hugging Face's format."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    noted = {"info": {"features": {"label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}}}
    (tmp_path / "tables").mkdir()
    for part in range(2):
        numbers = range(5 * part, 5 * part + 5)
        table = arrow.table(
            {
                "image": [{"bytes": encoded(number), "path": None} for number in numbers],
                "label": [number % 3 for number in numbers],
            }
        ).replace_schema_metadata({"huggingface": json.dumps(noted)})
        parquet.write_table(table, tmp_path / "tables" / f"train-{part:05d}.parquet", row_group_size=2)
    return tmp_path / "tables"


def test_parquet_is_unpacked_once(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [(number, number % 3) for number in range(10)]
    assert levels(str(tables)) == expected
    monkeypatch.setattr("pmf.data.parquet._unpack", None)
    assert levels(str(tables)) == expected
    assert load_dataset(str(tables), 4, 1).class_names == ["cat", "dog", "owl"]


def test_only_the_training_split_is_read(tables: Path) -> None:
    (tables / "train-00001.parquet").rename(tables / "test-00000.parquet")
    assert levels(str(tables)) == [(number, number % 3) for number in range(5)]
    (tables / "train-00000.parquet").rename(tables / "all.parquet")
    assert levels(str(tables)) == [(number, number % 3) for number in range(5)]
    (tables / "test-00000.parquet").rename(tables / "more.parquet")
    assert len(levels(str(tables))) == 10


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([], "contains no image"),
        ([0, 2], "an image of class 2, but names 2 classes, 0 to 1"),
    ],
)
def test_labels_of_tables_match_their_names(tables: Path, labels: list[int], sentence: str) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"image": [{"bytes": encoded(7), "path": None}] * len(labels), "label": labels}
    kinds = {"image": pyarrow.struct({"bytes": pyarrow.binary()}), "label": pyarrow.int64()}
    noted = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})
    table = pyarrow.table(columns, schema=pyarrow.schema(kinds, {"huggingface": noted}))
    shutil.rmtree(tables)
    tables.mkdir()
    pyarrow.parquet.write_table(table, tables / "0.parquet")
    with pytest.raises(UserError, match=sentence):
        load_dataset(str(tables), 4, 1)


def test_a_damaged_table_is_named(tables: Path) -> None:
    table = tables / "train-00001.parquet"
    whole = table.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4] + bytes(60) + whole[64:]):  # at its end, and inside
        table.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-00001\.parquet is truncated"):
            load_dataset(str(tables), 4, 1)
    assert list((tables.parent / "cache" / "pixelmeanflow").iterdir()) == []


def test_a_table_that_pyarrow_does_not_read_is_named(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For damaged types, and images of more than 2 GiB in a row group: a RuntimeError."""
    import pyarrow
    import pyarrow.parquet

    def refuse(*words: Any, **options: Any) -> None:
        raise pyarrow.ArrowNotImplementedError("Nested data conversions not implemented")

    for owner, name in ((pyarrow.parquet.ParquetFile, "read_row_group"), (pyarrow.parquet, "read_schema")):
        monkeypatch.setattr(owner, name, refuse)
        with pytest.raises(UserError, match=r"train-00000\.parquet is truncated, or .* .Nested data conv"):
            load_dataset(str(tables), 4, 1)


def test_a_damaged_index_of_unpacked_images_is_named(tables: Path) -> None:
    load_dataset(str(tables), 4, 1)
    (index,) = (tables.parent / "cache" / "pixelmeanflow").glob("*.npz")
    index.write_bytes(index.read_bytes()[:30])
    with pytest.raises(UserError, match=f"{index.name}, unpacked from .* is damaged: remove it"):
        load_dataset(str(tables), 4, 1)


def test_a_table_without_images_is_named(tables: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), tables / "train-00000.parquet")
    with pytest.raises(
        UserError, match=r"train-00000\.parquet must have one column of images .* got text, label"
    ):
        load_dataset(str(tables), 4, 1)


def write_table(tables: Path, labels: list[Any] | None, name: str = "label") -> str:
    """A single table in a folder, with an image per label; None means no label column."""
    import pyarrow
    import pyarrow.parquet

    count = 3 if labels is None else len(labels)
    columns: dict[str, Any] = {"image": [{"bytes": encoded(n), "path": None} for n in range(count)]}
    if labels is not None:
        columns[name] = labels
    shutil.rmtree(tables)
    tables.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), tables / "train-0.parquet")
    return str(tables)


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (["owl", "cat", "owl"], [1, 0, 1], ["cat", "owl"]),
        (["10", "9", "10"], [1, 0, 1], ["9", "10"]),
        ([0.0, 2.0], [0, 2], ["0", "1", "2"]),
        ([True, False], [1, 0], ["0", "1"]),
        ([1, 1], [1, 1], ["0", "1"]),
        ([None, None], [0, 0], ["0"]),
        ([float("nan")] * 2, [0, 0], ["0"]),  # pandas' null
        ([-1, -1], [0, 0], ["0"]),
        (None, [0, 0, 0], ["0"]),
    ],
)
def test_labels_of_tables_are_numbers_words_or_none(
    tables: Path, labels: list[Any] | None, numbers: list[int], names: list[str]
) -> None:
    for _ in range(2):  # unpacked, and from the cache
        dataset = load_dataset(write_table(tables, labels), 4, 1)
        assert dataset.class_names == names
        pixels, found = dataset.read(range(len(dataset)))
        assert found.tolist() == numbers and pixels[:, 0, 0, 0].tolist() == list(range(len(numbers)))


def test_a_table_without_a_known_label_column_says_so(tables: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):  # unpacked, and from the cache
        assert load_dataset(Path(write_table(tables, [0, 1], "category")), 4, 1).class_names == ["0"]
        assert "images have no classes; its other columns are category" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (
            [0.5, 1.0],
            r"row 0 of .*train-0\.parquet must contain a class number, 0 or more, or a string, got 0\.5",
        ),
        ([3, -2], r"row 1 of .* got -2"),
        ([[0, 1], [1, 1]], r"row 0 of .* got \[0, 1\]"),
    ],
)
def test_labels_of_tables_that_cannot_be_classes_are_named(
    tables: Path, labels: list[Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load_dataset(write_table(tables, labels), 4, 1)


@pytest.mark.parametrize("labels", [[0.0, None, 1.0], [0, -1, 1], ["a", None, "b"]])
def test_an_image_without_a_label_among_others_is_left_out(
    tables: Path, labels: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # unpacked, and from the cache
        assert levels(write_table(tables, labels)) == [(0, 0), (2, 1)]
        assert "left out 1 without a label (image 1 of" in caplog.text
        caplog.clear()


def test_labels_of_two_kinds_are_named(tables: Path) -> None:
    import pyarrow.parquet

    words = pyarrow.table({"image": [{"bytes": encoded(7), "path": None}], "label": ["owl"]})
    pyarrow.parquet.write_table(words, tables / "train-00002.parquet")
    with pytest.raises(UserError, match="labels of two kinds: 0 for image 0 and 'owl' for image 10: remove"):
        load_dataset(str(tables), 4, 1)


@pytest.mark.parametrize("name", ["Label", "coarse_label", "LABELS", "cls"])
def test_the_label_column_has_one_of_several_names(tables: Path, name: str) -> None:
    assert levels(write_table(tables, [1, 0], name)) == [(0, 1), (1, 0)]


def name_classes(table: Path, names: list[str] | None) -> None:
    import pyarrow.parquet

    noted = {} if names is None else {"info": {"features": {"label": {"names": names}}}}
    content = pyarrow.parquet.read_table(table)
    content = content.replace_schema_metadata({"huggingface": json.dumps(noted)})
    pyarrow.parquet.write_table(content, table)


def test_tables_that_number_their_classes_differently_are_read_by_name(tables: Path) -> None:
    """All images got the names of the first table."""
    first, second = sorted(tables.iterdir())
    name_classes(second, ["owl", "cat", "dog"])
    expected = [(n, n % 3) for n in range(5)] + [(n, (n + 2) % 3) for n in range(5, 10)]
    for _ in range(2):  # unpacked, and from the cache
        dataset = load_dataset(str(tables), 4, 1)
        assert dataset.class_names == ["cat", "dog", "owl"] and levels(str(tables)) == expected
    name_classes(first, ["cat"])
    with pytest.raises(UserError, match=r"row 1 of .*00000\.parquet has class 1, but .* names 1 classes"):
        load_dataset(str(tables), 4, 1)
    shutil.copy(first, tables / "train-00002.parquet")
    name_classes(first, None)
    with pytest.raises(
        UserError, match=r"name their classes differently, and train-00000\.parquet names none"
    ):
        load_dataset(str(tables), 4, 1)
    (tables / "train-00002.parquet").unlink()
    assert load_dataset(str(tables), 4, 1).class_names == ["owl", "cat", "dog"]


def test_classes_of_one_name_get_their_numbers(tables: Path) -> None:
    """ImageNet has two cranes: --init-from gave both the row of the second, --classes chose the first."""
    for table in tables.iterdir():
        name_classes(table, ["crane", "dog", "crane"])
    assert load_dataset(str(tables), 4, 1).class_names == ["crane (0)", "dog", "crane (2)"]
    assert levels(str(tables)) == [(n, n % 3) for n in range(10)]


def test_images_may_be_a_plain_column_of_bytes(tables: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"jpg": [encoded(5), encoded(6)], "class": [0, 1]})
    pyarrow.parquet.write_table(table, tables / "train-00001.parquet")
    (tables / "train-00000.parquet").unlink()
    assert levels(str(tables)) == [(5, 0), (6, 1)]


def test_the_image_column_named_image_is_preferred(tables: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tables / "train-00001.parquet").unlink()
    pictures = [{"bytes": encoded(5), "path": None}]
    for name, other in (("image", "conditioning_image"), ("first", "second")):
        hints = [{"bytes": encoded(9), "path": None}]
        table = pyarrow.table({other: hints, name: pictures, "label": [0]})
        pyarrow.parquet.write_table(table, tables / "train-00000.parquet")
        if name == "image":
            assert levels(str(tables)) == [(5, 0)]
        else:
            with pytest.raises(UserError, match="one of them named image or .* got second, first, label"):
                levels(str(tables))


def test_without_a_home_or_a_writable_cache_one_sentence_says_what_to_set(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # where nobody can write, root included
    with pytest.raises(
        UserError, match="cannot unpack .* to /proc/none.*: set XDG_CACHE_HOME to a writable folder"
    ):
        load_dataset(str(tables), 4, 1)
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(homeless))
    with pytest.raises(UserError, match="this user has no home folder: set XDG_CACHE_HOME"):
        load_dataset(str(tables), 4, 1)
