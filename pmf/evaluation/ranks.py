"""The processes that share an evaluation, as torchrun starts them."""

import datetime
import os

import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]

_PATIENCE = datetime.timedelta(days=1)  # the fastest waits for the slowest only once, at the end


class Ranks:
    """This process's number and how many there are: one, unless torchrun started several.

    All that is exchanged lies in main memory (gloo), whatever the device that computes.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """``cuda`` becomes the GPU of this process's own."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if self.size > 1 and name == "cuda" else name

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over all processes."""
        if self.size > 1:
            total = tensor.cpu()
            dist.all_reduce(total)
            tensor.copy_(total)

    def from_first(self, tensor: Tensor) -> None:
        """Replace a tensor in main memory by the first process's."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
