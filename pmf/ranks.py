"""The processes of a distributed run: their identity and their collective decisions.

``torchrun`` starts them and sets each rank in the environment. Communication here goes through host memory
(gloo) and never waits for a device; gradients and weights on GPUs use NCCL.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pmf.errors import UserError

T = TypeVar("T")

_PATIENCE = 30.0  # seconds of waiting for other ranks without a word
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` processes of a run; with size 1 every method is trivial."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes files and prints for all."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """``cuda`` as this rank's GPU on its machine; other names unchanged."""
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if self.size > 1 and name == "cuda" else name

    def together(self, action: Callable[[], T]) -> T:
        """Run the action on every rank; if any raises UserError, all raise the first rank's message."""
        if self.size == 1:
            return action()
        error: UserError | None = None
        try:
            result = action()
        except UserError as caught:
            error = caught
        if not self.maximum(float(error is not None))[0]:
            return result
        sentences: list[str | None] = [None] * self.size
        dist.all_gather_object(sentences, str(error) if error else None)
        raise UserError(next(sentence for sentence in sentences if sentence)) from error

    def maximum(self, *numbers: float) -> list[float]:
        """The maximum of each number over the ranks."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of a tensor in host memory."""
        if self.size > 1:
            numbers = numbers.clone()
            dist.all_reduce(numbers)
        return numbers

    def mean(self, numbers: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks of a tensor in host memory."""
        return self.total(numbers) / self.size

    def from_first(self, value: T) -> T:
        """Broadcast the first rank's value."""
        if self.size == 1:
            return value
        said: list[Any] = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def require_same(self, what: str, mine: dict[str, Any]) -> None:
        """Raise UserError on all ranks naming the first entry that differs from the first rank's."""
        if self.size == 1:
            return
        everyone: list[dict[str, Any]] = [{} for _ in range(self.size)]
        dist.all_gather_object(everyone, mine)
        for rank, other in enumerate(everyone):
            for name in everyone[0].keys() | other.keys():
                if everyone[0].get(name) != other.get(name):
                    raise UserError(
                        f"the ranks disagree on {what}: {name} is {everyone[0].get(name)} on rank 0 and "
                        f"{other.get(name)} on rank {rank}: start every rank with the same command and data"
                    )


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started, for the length of the context; otherwise run alone."""
    size = _number("WORLD_SIZE", 1)
    if size == 1 or dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    words = "waiting at %s for all %d processes: start the others, or correct MASTER_ADDR and MASTER_PORT"
    waiting = threading.Timer(_PATIENCE, _log.warning, (words, place, size))
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"WORLD_SIZE is {size}, but the other ranks cannot be reached ({reason}): start with "
            "torchrun --nproc-per-node N -m pmf ..., or unset WORLD_SIZE"
        ) from error
    finally:
        waiting.cancel()
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} must be a whole number, got {text!r}")
    return int(text)
