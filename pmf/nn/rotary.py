"""Tables for two-dimensional rotary embedding."""

import torch
from torch import Tensor

from pmf.sizes import Size, height_and_width

__all__ = ["rotary_tables"]


def rotary_tables(
    grid: Size,
    head_dim: int,
    theta: float = 1e4,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin [rows columns, head_dim / 2] of the angle of each pair of elements, tokens in row order.

    grid: (rows, columns), or one number for both. With m = head_dim / 4 frequencies f_i = theta^(-i / m), the
    first m pairs rotate by row f_i, the last m by column f_i (Su et al., 2021, applied to each image axis).
    """
    m = head_dim // 4
    frequency = theta ** (-torch.arange(m, dtype=torch.float64, device="cpu") / m)
    rows, columns = height_and_width(grid)
    angle = torch.arange(max(rows, columns), dtype=torch.float64, device="cpu")[:, None] * frequency
    by_row = angle[:rows, None].expand(rows, columns, m)
    by_column = angle[None, :columns].expand(rows, columns, m)
    angles = torch.cat((by_row, by_column), -1).flatten(0, 1)
    device = torch.get_default_device() if device is None else device
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
