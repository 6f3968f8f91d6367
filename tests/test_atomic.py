"""Files and folders appear complete or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmf import atomic


def test_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "step-1"
    atomic.write_folder(target, [("a", b"one"), ("b", b"")])
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"a": b"one", "b": b""}
    assert [path.name for path in target.parent.iterdir()] == ["step-1"]


def test_folder_is_absent_after_an_error_and_can_be_written_again(tmp_path: Path) -> None:
    def files() -> Iterator[tuple[str, bytes]]:
        yield "a", b"one"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic.write_folder(tmp_path / "step-1", files())
    assert list(tmp_path.iterdir()) == []
    atomic.write_folder(tmp_path / "step-1", [("a", b"two")])
    assert (tmp_path / "step-1" / "a").read_bytes() == b"two"


def test_folder_replaces_the_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    partial = tmp_path / ".step-1.partial"
    partial.mkdir()
    (partial / "a").write_bytes(b"half")
    atomic.write_folder(tmp_path / "step-1", [("a", b"whole")])
    assert (tmp_path / "step-1" / "a").read_bytes() == b"whole" and not partial.exists()


def test_file_is_replaced_whole_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "config.json"
    atomic.write_file(target, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            atomic.write_file(target, b"new")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    atomic.write_file(target, b"new")
    assert target.read_bytes() == b"new"


def test_bytes_that_read_back_differently_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_end(descriptor: int) -> None:
        os.ftruncate(descriptor, 2)

    monkeypatch.setattr(os, "fsync", lose_the_end)
    with pytest.raises(OSError, match="reads back differently"):
        atomic.write_file(tmp_path / "weights", b"12345")
    assert list(tmp_path.iterdir()) == []
