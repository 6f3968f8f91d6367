"""Reading, cropping and writing single images."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from pmf.atomic import write_file
from pmf.data.shards import Stored
from pmf.errors import UserError

_MODES = {1: "L", 3: "RGB"}  # Pillow's name for an 8-bit image of 1 or 3 channels
_GRID_PIXELS = 512  # a grid narrower than this is enlarged, so that 8x8 images can be seen
_GRID_GAP = 1  # pixels between two images of a grid, before enlargement
_GRID_GREY = 128  # of the gaps, and of places without an image


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to float32 in [-1, 1]: x / 127.5 - 1."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images around [-1, 1] to uint8, where they are: round(255 clip((x + 1) / 2, 0, 1)); a NaN becomes 0."""
    unit = ((images.detach().to(torch.float32) + 1) / 2).nan_to_num(nan=0.0).clamp(0, 1)
    return (255 * unit).round().to(torch.uint8)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an image at ``size`` pixels, as ADM (Dhariwal, Nichol 2021) crops ImageNet.

    Halve by box filter while the short side is at least twice ``size``, bicubic to ``size``, then crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = round(image.width * scale), round(image.height * scale)
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def check_image(path: Path | Stored, size: int) -> None:
    """Read the header only: UserError where ``path`` is no image, or smaller than ``size`` pixels."""
    with _open(path, size):
        pass


def read_image(path: Path | Stored, size: int, channels: int) -> torch.Tensor:
    """One image file as uint8 [channels, size, size]: centre crop, transparency laid over white.

    Raises UserError where the file is no image, is cut off, is too small, or has 16-bit or float pixels.
    """
    with _open(path, size) as image:
        if image.mode[0] in "IF":
            raise UserError(f"{path} has {image.mode} pixels (16-bit or float): convert it to an 8-bit image")
        try:
            image.load()
            if image.has_transparency_data:
                colour = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colour)
            pixels = np.asarray(centre_crop(image.convert(_MODES[channels]), size))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} is cut off or damaged ({error}): replace or remove it") from error
    return torch.from_numpy(pixels.copy()).reshape(size, size, channels).permute(2, 0, 1).contiguous()


def _open(path: Path | Stored, size: int) -> Image.Image:
    try:
        image = Image.open(path if isinstance(path, Path) else io.BytesIO(path.read()))
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that Pillow can read: remove it from the folder") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as an image ({reason}): replace or remove it") from error
    if min(image.size) < size:
        image.close()
        raise UserError(
            f"{path} is {image.width}x{image.height} pixels, smaller than the {size}x{size} asked for: "
            "remove it, or train with a smaller --image-size"
        )
    return image


def save_png(image: torch.Tensor, path: Path) -> None:
    """Write one image, float around [-1, 1] or uint8, [C, H, W] with C = 1 or 3; raises OSError."""
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    array = pixels.permute(1, 2, 0).cpu().numpy()
    content = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(content, format="PNG")
    write_file(path, content.getvalue())


class ImageGrid:
    """One uint8 picture of many images [C, H, W], each put in its place as it comes.

    Small images are enlarged by a whole factor, nearest neighbour, so that every pixel can be seen as it is.
    """

    def __init__(self, rows: int, columns: int, shape: Sequence[int]) -> None:
        channels, self._height, self._width = shape
        self._row_step, self._column_step = self._height + _GRID_GAP, self._width + _GRID_GAP
        size = (channels, rows * self._row_step - _GRID_GAP, columns * self._column_step - _GRID_GAP)
        self._pixels = torch.full(size, _GRID_GREY, dtype=torch.uint8, device="cpu")

    def put(self, row: int, column: int, image: torch.Tensor) -> None:
        """Lay one image, float around [-1, 1] or uint8, into its place."""
        top, left = row * self._row_step, column * self._column_step
        pixels = image if image.dtype == torch.uint8 else to_uint8(image)
        self._pixels[:, top : top + self._height, left : left + self._width] = pixels

    def picture(self) -> torch.Tensor:
        """What is there so far, uint8 [C, height, width]."""
        factor = max(1, round(_GRID_PIXELS / self._pixels.shape[-1]))
        return self._pixels.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def image_grid(images: torch.Tensor, columns: int) -> torch.Tensor:
    """Images [N, C, H, W] in rows of ``columns``, in reading order, as one picture of `ImageGrid`."""
    grid = ImageGrid(-(-len(images) // columns), columns, images.shape[1:])
    for index, image in enumerate(to_uint8(images)):
        grid.put(*divmod(index, columns), image)
    return grid.picture()
