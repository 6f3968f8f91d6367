"""The elementwise ops and the read-out at the lengths and widths of attention, at every level."""

import pytest
import torch
from helpers.elementwise import FEW_TERMS, check, normal
from helpers.levels import EVERYWHERE
from torch import Tensor

LENGTHS = (1, 17, 63, 64, 65, 276)
WIDTHS = (32, 64, 72, 80, 96, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_sizes(name: str, length: int, dtype: torch.dtype) -> None:
    """Each dtype pairs the lengths and widths differently."""
    width = WIDTHS[(LENGTHS.index(length) + DTYPES.index(dtype)) % len(WIDTHS)]

    def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [x.to(dtype) for x in normal(*shapes)]

    x, y, x_t, y_t, weight, weight_t, gate = drawn(*[(1, length, width)] * 4, *[(width,)] * 3)
    check(name, "rms_norm", (x, weight), (x_t, weight_t), terms=FEW_TERMS)
    check(name, "swiglu", (x, y), (x_t, y_t), terms=FEW_TERMS)
    check(name, "gated_residual", (x, y, gate), (x_t, y_t, weight_t), terms=FEW_TERMS)
    query, key, query_t, key_t = drawn(*[(1, heads, length, width) for heads in (2, 1, 2, 1)])
    angles = normal((length, width // 2))[0].float()
    inputs = (query, key, weight, weight_t, angles.cos(), angles.sin())
    check(name, "rotary_qk_norm", inputs, (query_t, key_t), terms=FEW_TERMS, constants=2)
    tokens, tokens_t, z, z_t = drawn(*[(1, length, 48)] * 2, *[(1, 3, 4, 4 * length)] * 2)
    t = torch.tensor([0.4])
    check(name, "patch_velocity", (tokens, z, t), (tokens_t, z_t, None), terms=FEW_TERMS, constants=1)
