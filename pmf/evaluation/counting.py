"""Accumulate the features of many images batch by batch, over processes, resuming where it stopped."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmf.evaluation.features import FeatureSpace
from pmf.evaluation.sources import ImageSource
from pmf.evaluation.sums import Sums
from pmf.ranks import Ranks

__all__ = ["count_features", "describe", "forget_sums"]

_SAVE_SECONDS = 60.0
_AHEAD = 2  # batches of files prefetched during computation


def describe(source: ImageSource, space: FeatureSpace, batch_size: int) -> dict[str, Any]:
    """What determines the sums: images, features, and the division into batches."""
    return {"evaluated": source.identity(), "features": space.identity(), "batch_size": batch_size}


def count_features(
    source: ImageSource,
    space: FeatureSpace,
    batch_size: int,
    file: Path,
    ranks: Ranks,
    on_images: Callable[[int], object] = lambda count: None,
    save_seconds: float = _SAVE_SECONDS,
) -> Sums:
    """Feature sums over all images of the source, returned on every process and saved to ``file``.

    Batch b goes to process b mod the number of processes. Each process saves its own sums about once a
    minute, as a whole file: the first to ``file``, the others to ``<stem>-rank<r>`` beside it. A later call,
    on any number of processes, computes only what no file contains; a single process that was interrupted
    ends with the same bits as one that was not. on_images is called with the number of images added.
    """
    batches = -(-len(source) // batch_size)
    identity = describe(source, space, batch_size)
    device = space.device if space.device.type == "cuda" else torch.device("cpu")  # others may lack float64
    sums = Sums(len(source), batches, space.width, space.classes, device)

    def collect() -> None:
        """Collect the sums from all files on the first process and merge them into one file."""
        parts = _parts(file)
        for part in [file, *parts] if file.is_file() else parts:
            sums.add_file(part, identity)
        if parts:
            _merge(sums, file, identity)

    ranks.together(lambda: collect() if ranks.first else None)
    done = ranks.from_first(sums.done)
    own_file = file if ranks.first else file.with_stem(f"{file.stem}-rank{ranks.rank}")
    missing = (~done).nonzero().flatten().tolist()
    on_images(sum(len(_rows(source, batch, batch_size)) for batch in done.nonzero().flatten().tolist()))

    saved = time.monotonic()
    try:
        for batch, pixels in _read_ahead(source, missing[ranks.rank :: ranks.size], batch_size):
            rows = _rows(source, batch, batch_size)
            features, logits = space(pixels)
            sums.add(batch, torch.tensor(rows, device="cpu"), features, logits)
            on_images(len(rows))
            if time.monotonic() - saved >= save_seconds:
                sums.save(own_file, identity)
                saved = time.monotonic()
    except KeyboardInterrupt:
        sums.save(own_file, identity)
        raise
    if missing:
        sums.save(own_file, identity)
    for tensor in sums.tensors().values():
        tensor.copy_(ranks.total(tensor.cpu()))
    sums.done.fill_(True)
    if ranks.first and ranks.size > 1:
        _merge(sums, file, identity)
    return sums


def forget_sums(file: Path) -> None:
    """Remove a file of `count_features`, and those that the other processes wrote beside it."""
    for one in (file, *_parts(file)):
        one.unlink(missing_ok=True)


def _parts(file: Path) -> list[Path]:
    """The files of all processes except the first."""
    return sorted(file.parent.glob(f"{file.stem}-rank*{file.suffix}"))


def _merge(sums: Sums, file: Path, identity: dict[str, Any]) -> None:
    """Save one file for all, and only then remove the others."""
    sums.save(file, identity)
    for part in _parts(file):
        part.unlink()


def _rows(source: ImageSource, batch: int, batch_size: int) -> range:
    """The image indices of one batch; the last batch may be smaller."""
    return range(batch * batch_size, min((batch + 1) * batch_size, len(source)))


def _read_ahead(source: ImageSource, batches: Sequence[int], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield every batch with its pixels; images in files are prefetched during computation."""
    if not source.from_files:
        for batch in batches:
            yield batch, source.read(_rows(source, batch, batch_size))
        return
    with ThreadPoolExecutor(1, thread_name_prefix="pmf-batch") as thread:
        ahead: deque[tuple[int, Future[Tensor]]] = deque()
        for batch in batches:
            ahead.append((batch, thread.submit(source.read, _rows(source, batch, batch_size))))
            if len(ahead) > _AHEAD:
                first, pixels = ahead.popleft()
                yield first, pixels.result()
        for first, pixels in ahead:
            yield first, pixels.result()
