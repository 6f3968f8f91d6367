"""Where tensors go to the CUDA kernels: a GPU, and the emulator, which runs them on CPU tensors (as compiled
by g++ or nvcc).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from helpers.levels import EMULATED, PTX, at_level

PLACES = (*EMULATED, *PTX, *(("cuda",) if torch.cuda.is_available() else ()))


@contextmanager
def at_place(name: str) -> Iterator[torch.device]:
    """The device whose tensors go to the CUDA kernels inside the block."""
    if name == "cuda":
        yield torch.device("cuda")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with at_level(name):
            yield torch.device("cpu")
    finally:
        torch.set_num_threads(threads)
