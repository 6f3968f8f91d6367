"""Reading, cropping and writing single images."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pmf.atomic import write_file
from pmf.data.shards import Stored
from pmf.errors import UserError
from pmf.sizes import Size, height_and_width, size_in_words

Encoded = str | Path | Stored
"""Where one encoded image is: a file, or a part of a larger one."""

_ORIENTATION, _LYING = ExifTags.Base.Orientation, (5, 6, 7, 8)  # the last four exchange rows and columns
_NO_PICTURE = ("F", "LAB")  # Pillow makes no grey or colour image of these
_16_BITS_IN_32 = ("PNG", "PPM")  # formats whose 16-bit levels Pillow may return as 32-bit ones
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


def centre_crop(image: Image.Image, size: Size) -> Image.Image:
    """The centre of an image at ``size`` pixels, as ADM (Dhariwal, Nichol 2021) crops ImageNet.

    Halve by box filter while both sides are at least twice as long as asked for, bicubic until the image just
    covers ``size``, then crop. size: a number for squares, or (height, width).
    """
    height, width = height_and_width(size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    sides = round(image.width * scale), round(image.height * scale)
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def check_image(path: Encoded, size: Size) -> None:
    """Read the header only: UserError where ``path`` is no image, or smaller than ``size`` pixels."""
    with open_image(path) as image:
        _check_size(path, image, size)


def image_size(path: Encoded) -> tuple[int, int]:
    """(height, width) of an image as it is seen, from its header; UserError where it is none."""
    with open_image(path) as image:
        return _seen_size(image)


def read_image(path: Encoded, size: Size, channels: int) -> torch.Tensor:
    """One image as it is seen, uint8 [channels, height, width]: centre crop, transparency laid over white.

    Turned as its EXIF orientation says; of an animation the first picture; 16-bit grey levels are divided by
    257. Raises UserError where the file is no image, is cut off, is too small, or has no levels from black to
    white (32-bit and float pixels).
    """
    height, width = height_and_width(size)
    with open_image(path) as image:
        _check_size(path, image, size)
        try:
            image.load()
            seen: Image.Image | None = ImageOps.exif_transpose(image)
            if seen is not None and seen.mode.startswith("I"):
                seen = _from_16_bits(seen, image.format)
            if seen is None or seen.mode in _NO_PICTURE:
                raise UserError(
                    f"{path} has {image.mode} pixels: convert it to an 8-bit grey or colour image"
                )
            if seen.has_transparency_data:
                colour = seen.convert("RGBA")
                seen = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), colour)
            pixels = np.asarray(centre_crop(seen.convert(_MODES[channels]), size))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is cut off or damaged ({error}): replace or remove it") from error
    return torch.from_numpy(pixels.copy()).reshape(height, width, channels).permute(2, 0, 1).contiguous()


def _from_16_bits(image: Image.Image, kind: str | None) -> Image.Image | None:
    """16-bit grey levels as 8-bit ones; None where pixels have 32 bits, and so no largest level."""
    if image.mode == "I" and kind not in _16_BITS_IN_32:
        return None
    levels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


def _check_size(path: Encoded, image: Image.Image, size: Size) -> None:
    height, width = height_and_width(size)
    if min(image.size) >= max(height, width):  # whichever way it is turned
        return
    found = _seen_size(image)
    if found[0] < height or found[1] < width:
        raise UserError(
            f"{path} is {size_in_words(found)} pixels, smaller than the {height}x{width} (height x width) "
            "asked for: remove it, or give a smaller --image-size"
        )


def _seen_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after the turn that EXIF asks for."""
    lies = image.getexif().get(_ORIENTATION, 1) in _LYING if image.width != image.height else False
    return image.size if lies else (image.height, image.width)


def open_image(path: Encoded) -> Image.Image:
    """Pillow's image of a file, its header read; UserError where there is none."""
    try:
        return Image.open(io.BytesIO(path.read()) if isinstance(path, Stored) else path)
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that Pillow can read: remove it from the folder") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as an image ({reason}): replace or remove it") from error


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
