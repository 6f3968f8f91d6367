"""The device that a command line names, and what a device can do."""

import torch

from pmf.errors import UserError


def find_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1`` as a device that works here; UserError where it does not."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is not a torch device: use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name} was asked for, but torch finds no CUDA device: use --device cpu")
    try:
        torch.zeros(1, device=device).item()  # a device may be known by name and still hold no numbers
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} does not work with this torch: use cpu or cuda") from error
    return device


def has_bf16_products(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run on instructions of their own here, instead of being emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # a torch too old to say
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
