"""The processes of one run: who is who, and what they decide together.

``torchrun`` starts them and tells each its number in the environment. Everything here goes over the host
(gloo) and never waits for a device; gradients and weights go over NCCL where they are on GPUs.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pmf.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` of a run; alone, every method is the trivial one."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """``cuda`` as the GPU of this rank among those of its machine."""
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if self.size > 1 and name == "cuda" else name

    def together(self, action: Callable[[], T]) -> T:
        """Do it on every rank; if one of them raises UserError, all raise the sentence of the first such."""
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
        """The largest of each number over the ranks."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor in host memory over the ranks."""
        if self.size > 1:
            numbers = numbers.clone()
            dist.all_reduce(numbers)
        return numbers

    def mean(self, numbers: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor in host memory over the ranks."""
        return self.total(numbers) / self.size

    def from_first(self, value: T) -> T:
        """What the first rank says."""
        if self.size == 1:
            return value
        said: list[Any] = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def require_same(self, what: str, mine: dict[str, Any]) -> None:
        """UserError on all ranks that names the first entry in which one of them differs from the first."""
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
    """Join the processes that torchrun started, for the length of a run; alone where it did not."""
    size = _number("WORLD_SIZE", 1)
    if size == 1 or dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"WORLD_SIZE is {size}, but the other ranks cannot be reached ({reason}): start with "
            "torchrun --nproc-per-node N -m pmf ..., or unset WORLD_SIZE"
        ) from error
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} must be a whole number, got {text!r}")
    return int(text)
