"""Images for viewing: PNG files, grids and matplotlib figures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pmf.atomic import write_file

__all__ = ["ImageGrid", "encode_png", "image_grid", "new_figure", "png_of", "save_png", "to_uint8"]

_GRID_PIXELS = 512  # grids narrower than this are enlarged, so that 8x8 images are visible
_GRID_GAP = 1  # pixels between the images of a grid, before enlargement
_GRID_GREY = 128  # grey level of gaps and empty cells


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert images around [-1, 1] to uint8: round(255 clip((x + 1) / 2, 0, 1)); NaN becomes 0.

    Images that are uint8 already are returned as they are.
    """
    if images.dtype == torch.uint8:
        return images
    unit = ((images.detach().to(torch.float32) + 1) / 2).nan_to_num(nan=0.0).clamp(0, 1)
    return (255 * unit).round().to(torch.uint8)


def encode_png(image: torch.Tensor) -> bytes:
    """An image [C, H, W], float around [-1, 1] or uint8, with C = 1 or 3, as a PNG."""
    array = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    content = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(content, format="PNG")
    return content.getvalue()


def save_png(image: torch.Tensor, path: Path) -> None:
    """Write an image as `encode_png` encodes it; raises OSError."""
    write_file(path, encode_png(image))


class ImageGrid:
    """A uint8 grid [C, H, W] of images, filled in as the images arrive.

    Small images are enlarged by an integer factor (nearest neighbour), so that single pixels are visible.
    """

    def __init__(self, rows: int, columns: int, shape: Sequence[int]) -> None:
        channels, self._height, self._width = shape
        self._row_step, self._column_step = self._height + _GRID_GAP, self._width + _GRID_GAP
        size = (channels, rows * self._row_step - _GRID_GAP, columns * self._column_step - _GRID_GAP)
        self._pixels = torch.full(size, _GRID_GREY, dtype=torch.uint8, device="cpu")

    def put(self, row: int, column: int, image: torch.Tensor) -> None:
        """Place an image, float around [-1, 1] or uint8, in its cell."""
        top, left = row * self._row_step, column * self._column_step
        self._pixels[:, top : top + self._height, left : left + self._width] = to_uint8(image)

    def picture(self) -> torch.Tensor:
        """The grid so far, uint8 [C, height, width]."""
        factor = max(1, round(_GRID_PIXELS / self._pixels.shape[-1]))
        return self._pixels.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def image_grid(images: torch.Tensor, columns: int) -> torch.Tensor:
    """An `ImageGrid` picture of images [N, C, H, W], float around [-1, 1] or uint8, row by row."""
    grid = ImageGrid(-(-len(images) // columns), columns, images.shape[1:])
    for index, image in enumerate(to_uint8(images)):
        grid.put(*divmod(index, columns), image)
    return grid.picture()


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches; needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Any) -> bytes:
    """A figure encoded as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
