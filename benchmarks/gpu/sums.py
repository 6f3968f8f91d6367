"""How many bits a tensor core keeps in a sum, from crafted numbers in this library's products.

A patch of 16 pixels times a row of 16 weights is one matrix instruction. 1 + 2^-k - 1 keeps the small number
exactly if k bits below the largest product are kept. 1 + 1.5 2^-k - 1, which has one bit more, shows whether
lower bits are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pmf.bench.harness import Case, Planned, Setting

PIXELS, PATCH, ROWS, MOST_BITS = 16, 4, 16, 40


def product(terms: list[float], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """The sum of up to 16 terms, each times 1, by the patch embedding's first product."""
    image = torch.tensor([*terms, *[0.0] * (PIXELS - len(terms))], device=device).to(dtype)
    ones = torch.ones(ROWS, 1, PATCH, PATCH, device=device, dtype=dtype)
    up = torch.eye(ROWS, device=device, dtype=dtype)
    hidden = torch.ops.pmf.patch_embed(image.view(1, 1, PATCH, PATCH), ones, None, up, None, None, None)[1]
    return hidden.flatten()[0].item()


def surviving_bits(device: torch.device) -> int:
    """The largest k for which 2^-k remains of 1 + 2^-k - 1."""
    return max(k for k in range(MOST_BITS) if product([1.0, 2.0**-k, -1.0], device) == 2.0**-k)


def is_cut(device: torch.device, bits: int) -> bool:
    """Whether lower bits are truncated rather than rounded."""
    return product([1.0, 1.5 * 2.0 ** -(bits + 1), -1.0], device) == 0.0


def cases(setting: Setting) -> Iterator[Planned]:
    yield Planned("bits of a bfloat16 sum that survive", lambda: _case(setting), {"op": "mma sums"})


def _case(setting: Setting) -> Case:
    device = setting.device.device
    bits = surviving_bits(device)
    below = "cut" if is_cut(device, bits) else "rounded"
    found = {"bits": bits, "below": below, "said": f"{bits} bits, what is below them {below}"}
    return Case({"pmf": lambda: None}, timed=False, figures=found)
