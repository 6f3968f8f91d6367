"""Find the device named on the command line, query its capabilities, and recognise a lack of memory."""

import torch

from pmf._library import multiplies
from pmf.errors import UserError


def find_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1`` as a usable device; UserError if it is not usable."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is not a torch device: use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch finds no CUDA device; use --device cpu")
    try:
        torch.zeros(1, device=device).item()  # some devices have a name but cannot hold data
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} does not work with this torch: use cpu or cuda") from error
    return device


def has_bf16_products(device: torch.device) -> bool:
    """Whether the device has native bfloat16 matrix products rather than emulated ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and multiplies(torch.bfloat16)


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether too little memory was left for PyTorch's allocator, a CUDA library or the CPU."""
    says = "out of memory", "ALLOC_FAILED", "can't allocate memory"
    is_error = isinstance(problem, RuntimeError) and any(text in str(problem) for text in says)
    return is_error or isinstance(problem, (torch.cuda.OutOfMemoryError, MemoryError))
