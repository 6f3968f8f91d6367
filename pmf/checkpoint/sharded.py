"""Sharded checkpoints: each rank writes its part, and any number of ranks can read them.

The checkpoint folder contains ``shards/`` (torch.distributed.checkpoint: weights, averages, optimizer state,
random generator) and ``sharded.json`` beside config.json. Its tensors are named ``weights/<name>``,
``ema-<H>/<name>`` and ``optimizer/<name>/<what>``.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pmf.atomic import finish_folder, partial_folder, write_file
from pmf.errors import UserError

SHARDS, HEADER = "shards", "sharded.json"


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint folder is sharded."""
    return (folder / HEADER).is_file()


def save(folder: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any], config: bytes) -> None:
    """Write a checkpoint folder collectively; complete or absent. Raises OSError on every rank."""
    import torch.distributed.checkpoint as dcp  # importing it takes seconds
    from torch.distributed.checkpoint.api import CheckpointException

    partial, first = partial_folder(folder), dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # every rank then fails to write below and reports it
            partial.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(tensors, checkpoint_id=partial / SHARDS)
        failure = None
    except (CheckpointException, OSError) as error:
        failure = _reason(error)
    if first and failure is None:
        try:
            write_file(partial / HEADER, json.dumps(header).encode())
            write_file(partial / "config.json", config)
            finish_folder(partial, folder)
        except OSError as error:
            failure = error.strerror or str(error)
    said = [failure]
    dist.broadcast_object_list(said, src=0)
    if said[0] is not None:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(said[0])


def read_header(folder: Path) -> dict[str, Any]:
    """The header passed to `save`; UserError if it is damaged."""
    try:
        content = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / HEADER} cannot be read ({error}): use another checkpoint") from error
    if not isinstance(content, dict):
        raise UserError(f"{folder / HEADER} must contain a JSON object: use another checkpoint")
    return content


def load_into(folder: Path, tensors: Mapping[str, torch.Tensor], *, alone: bool) -> None:
    """Overwrite tensors, sharded or not, with those of the same names; UserError if one is missing.

    alone: a single process reads independently; otherwise this is a collective call.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the missing process group, which is intended
            dcp.load(dict(tensors), checkpoint_id=folder / SHARDS, no_dist=alone)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{folder / SHARDS} is truncated or belongs to another model ({_reason(error)}): use another one"
        ) from error


def _reason(error: BaseException) -> str:
    """The last line of the first rank's failure, where torch gives the reason."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def parts(folder: Path) -> Iterator[str]:
    """The sets of weights in the checkpoint: "weights", "ema-<H>"."""
    yield "weights"
    yield from (f"ema-{half_life:g}" for half_life in read_header(folder)["half_lives"])
