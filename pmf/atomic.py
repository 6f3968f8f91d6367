"""Atomic writes: a file or folder is either complete or absent, even after a crash."""

import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

_CHUNK = 1 << 24  # bytes per read when verifying a file


def write_folder(target: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a folder atomically: complete or absent.

    Every file is synced and verified, then a single rename makes the folder visible. On OSError, removes the
    partial folder and re-raises.
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
    """The temporary name of a folder while it is being written."""
    return target.with_name(f".{target.name}.partial")


def finish_folder(partial: Path, target: Path) -> None:
    """Make a complete folder with synced files visible in one rename; raises OSError."""
    _sync_folder(partial)
    partial.rename(target)
    _sync_folder(target.parent)


def write_file(target: Path, content: bytes) -> None:
    """Replace a file with ``content``, or raise OSError and keep the old one."""
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
