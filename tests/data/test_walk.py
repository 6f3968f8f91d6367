"""File search: links, loops, names and types of files, and the line about what is skipped."""

import logging
import os
import socket
import stat
from pathlib import Path

import pytest
from PIL import Image

from pmf.data import load_dataset
from pmf.data.finding import find_images
from pmf.data.walk import LeftOut, image_endings, walk
from pmf.errors import UserError
from pmf.evaluation import open_images


def write_image(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path, format="PNG")


def walked(root: Path) -> tuple[list[str], str]:
    left_out = LeftOut()
    return walk(str(root), image_endings(), left_out), str(left_out)


def test_files_come_in_the_order_of_their_names_folder_by_folder(tmp_path: Path) -> None:
    for name in ("b/2.png", "b.png", "a/z/1.png", "a/b.png", "a-1.png", "B.png"):
        write_image(tmp_path / name)
    expected = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))  # by the parts of paths
    assert [Path(path) for path in walked(tmp_path)[0]] == expected


def test_training_and_evaluation_accept_pillows_formats_in_any_case(tmp_path: Path) -> None:
    names = ["a.png", "b.JPG", "c.jfif", "d.WebP", "e.avif", "f.TIFF", "g.ppm", "h.jp2", "i.bmp", "j k.l.Png"]
    for number, name in enumerate(names):
        write_image(tmp_path / ("cat" if number % 2 else "dog") / name)
    for name in ("notes.txt", "png", "film.mpg", "page.ps", "table.h5", "Thumbs.db"):
        (tmp_path / "cat" / name).touch()
    assert len(load_dataset(str(tmp_path), 8, 3)) == len(open_images(str(tmp_path))) == len(names)
    found, left_out = walked(tmp_path)
    assert len(found) == len(names) and left_out == "6 of unsupported type (cat/Thumbs.db, ...)"


def test_hidden_and_operating_system_files_are_ignored(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".git/b.png", "__MACOSX/c.png", "deep/.cache/d.png"):
        write_image(tmp_path / name)
    found, left_out = walked(tmp_path)
    assert found == ["a.png"] and left_out == "4 hidden (._a.png, ...)"
    inside = tmp_path / ".git"  # the dataset itself may be in a hidden folder
    assert walked(inside)[0] == ["b.png"]


def test_links_are_followed_and_loops_detected(tmp_path: Path) -> None:
    write_image(tmp_path / "store" / "1.png")
    root = tmp_path / "root"
    write_image(root / "dog" / "own.png")
    (root / "cat").symlink_to(tmp_path / "store")
    (root / "dog" / "part").symlink_to(tmp_path / "store")  # seen from two places, it counts twice
    (root / "dog" / "file.png").symlink_to(tmp_path / "store" / "1.png")
    (root / "dog" / "up").symlink_to(root)
    (tmp_path / "store" / "self").symlink_to(".")
    (root / "dog" / "itself").symlink_to("itself")
    found, left_out = walked(root)
    assert found == ["cat/1.png", "dog/file.png", "dog/own.png", "dog/part/1.png"]
    assert "3 link to a folder above it (cat/self, ...)" in left_out
    assert "1 of unsupported type (dog/itself)" in left_out
    assert len(load_dataset(str(root), 8, 1)) == len(open_images(str(root))) == 4


def test_pipes_and_sockets_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    monkeypatch.chdir(tmp_path)  # names of sockets must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
        assert walked(tmp_path) == (["a.png"], "3 neither file nor folder (link.png, ...)")


def test_an_unreadable_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "lost+found" / "b.png")
    honest = os.scandir

    def guarded(path: str) -> object:  # the tests may run as root, who can read everything
        if stat.S_IMODE(os.stat(path).st_mode) == 0:
            raise PermissionError(13, "Permission denied", path)
        return honest(path)

    (tmp_path / "lost+found").chmod(0)
    monkeypatch.setattr(os, "scandir", guarded)
    try:
        assert walked(tmp_path) == (["a.png"], "1 unreadable: Permission denied (lost+found)")
        with pytest.raises(UserError, match=r"lost\+found cannot be read \(Permission denied\)"):
            walked(tmp_path / "lost+found")
    finally:
        (tmp_path / "lost+found").chmod(0o700)


def test_names_that_are_not_utf_8_and_deep_folders(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9 \n")
    write_image(tmp_path / odd / f"{odd}.png", 7)
    write_image(tmp_path / "plain" / "/".join(["deep"] * 300) / "a.png", 9)  # fewer than a path may contain
    dataset = load_dataset(str(tmp_path), 8, 1)
    assert dataset.class_names == [odd, "plain"]
    assert dataset.read([0, 1])[0][:, 0, 0, 0].tolist() == [7, 9]
    assert open_images(str(tmp_path)).identity() == open_images(str(tmp_path)).identity()


def test_one_line_says_what_was_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat/1.png", "dog/2.png"):
        write_image(tmp_path / name)
    with caplog.at_level(logging.WARNING, "pmf"):
        find_images(str(tmp_path))
        assert not caplog.records  # nothing to say
        write_image(tmp_path / "loose.png")
        (tmp_path / "empty").mkdir()
        (tmp_path / "dog" / "list.txt").touch()
        find_images(str(tmp_path))
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: left out 1 of unsupported type (dog/list.txt), 1 beside the class folders (loose.png), "
        "1 folders without images (empty)"
    )
