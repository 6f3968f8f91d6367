"""Published packages to compare with, if installed: nothing here installs anything."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = [[3.4445, -4.7750, 2.0315]] * 5


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def jvp_flash_attention(primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Package jvp-flash-attention: value and tangent. Its documentation asks for this calling convention."""
    import torch.autograd.forward_ad as forward_ad
    from jvp_flash_attention.jvp_attention import JVPAttn

    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x_t) for x, x_t in zip(primals, tangents, strict=True)]
        out = forward_ad.unpack_dual(JVPAttn.fwd_dual(*duals))
        return out.primal, out.tangent


def gram_newton_schulz() -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Package gram-newton-schulz: matrices of one shape are stacked, as its optimizer does."""
    from gram_newton_schulz import GramNewtonSchulz

    function: Any = GramNewtonSchulz(ns_coefficients=COEFFICIENTS)

    def run(matrices: Sequence[Tensor]) -> list[Tensor]:
        shapes: dict[torch.Size, list[int]] = defaultdict(list)
        for i, matrix in enumerate(matrices):
            shapes[matrix.shape].append(i)
        done: dict[int, Tensor] = {}
        for members in shapes.values():
            stacked = function(torch.stack([matrices[i] for i in members]))
            done.update(zip(members, stacked.clone().unbind(), strict=True))
        return [done[i] for i in range(len(matrices))]

    return run
