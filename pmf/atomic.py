"""Files and folders that are complete or absent, whatever happens while they are written."""

import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

_CHUNK = 1 << 24  # bytes compared at a time when a file is read back


def write_folder(target: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a folder so that it is either complete or absent, whatever happens on the way.

    Every file is synced and read back, then one rename makes the folder visible. Raises OSError, and then
    removes what was written.
    """
    partial = partial_folder(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, content in files:
            _write_and_verify(partial / name, content)
        finish_folder(partial, target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_folder(target: Path) -> Path:
    """What a folder is called while it is written."""
    return target.with_name(f".{target.name}.partial")


def finish_folder(partial: Path, target: Path) -> None:
    """Make a complete folder, whose files are synced, visible by one rename; raises OSError."""
    _sync_folder(partial)
    partial.rename(target)
    _sync_folder(target.parent)


def write_file(target: Path, content: bytes) -> None:
    """Replace a file by ``content``, or raise OSError and leave the old one as it was."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_and_verify(partial, content)
        partial.replace(target)
        _sync_folder(target.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _write_and_verify(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    if checksum != zlib.crc32(content):
        raise OSError(f"{path.name} reads back differently from what was written")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
