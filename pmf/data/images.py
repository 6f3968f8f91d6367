"""Read and crop single images."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    TiffImageFile,
)

from pmf.data.shards import Stored
from pmf.errors import UserError
from pmf.sizes import Size, height_and_width, size_in_words

Encoded = str | Path | Stored
"""The location of an encoded image: a file, or part of a larger one."""

_ORIENTATION, _LYING = ExifTags.Base.Orientation, (5, 6, 7, 8)  # these four swap height and width
_NO_PICTURE = ("F", "LAB")  # Pillow cannot convert these to greyscale or RGB
_WHITE_IS_0 = 0  # of TIFF's photometric interpretations
_16_BITS_IN_32 = ("PNG", "PPM")  # formats whose 16-bit levels Pillow may return as 32-bit
_PNG_LEVELS: dict[str, Callable[[int], int]] = {
    "L;2": lambda level: 85 * level,
    "L;4": lambda level: 17 * level,
    "RGB;16B": lambda level: level >> 8,
}
"""From a PNG file's grey levels to Pillow's pixels, by Pillow's name for the storage format."""
_MODES = {1: "L", 3: "RGB"}  # Pillow's modes for 8-bit images of 1 or 3 channels


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 pixels to float32 in [-1, 1]: x / 127.5 - 1. Floating pixels are returned as they are."""
    return pixels if pixels.is_floating_point() else pixels.to(torch.float32) / 127.5 - 1


def centre_crop(image: Image.Image, size: Size) -> Image.Image:
    """The centre of an image at ``size`` pixels, cropped like ImageNet in ADM (Dhariwal, Nichol 2021).

    Halve with a box filter while both sides are at least twice the requested length, resize bicubically until
    the image just covers ``size``, then crop. size: a number for squares, or (height, width).
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
    """Read only the header; UserError if ``path`` is not an image or is smaller than ``size`` pixels."""
    with open_image(path) as image, _naming_damage(path):
        _check_size(path, image, size)


def image_size(path: Encoded) -> tuple[int, int]:
    """The displayed (height, width) of an image, from its header; UserError if it is not an image."""
    with open_image(path) as image, _naming_damage(path):
        return _seen_size(image)


def read_image(path: Encoded, size: Size, channels: int) -> torch.Tensor:
    """Read an image as displayed, uint8 [channels, height, width]: centre-cropped, transparency over white.

    Applies the EXIF orientation; takes the first frame of an animation; divides 16-bit grey levels by 257.
    Raises UserError if the file is not an image, is truncated or too small, or has no black and white levels
    (32-bit and float pixels).
    """
    height, width = height_and_width(size)
    with open_image(path) as image, _naming_damage(path):
        _check_size(path, image, size)
        _scale_transparent_colour(image)
        image.load()
        seen: Image.Image | None = ImageOps.exif_transpose(image)
        if seen is not None and seen.mode.startswith("I"):
            seen = _from_16_bits(seen, image)
        if seen is None or seen.mode in _NO_PICTURE:
            raise UserError(
                f"{path} has {image.mode} pixels: convert it to an 8-bit greyscale or colour image"
            )
        if seen.has_transparency_data:
            colour = seen.convert("RGBA")
            seen = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), colour)
        pixels = np.asarray(centre_crop(seen.convert(_MODES[channels]), size))
    return torch.from_numpy(pixels.copy()).reshape(height, width, channels).permute(2, 0, 1).contiguous()


def _from_16_bits(image: Image.Image, file: Image.Image) -> Image.Image | None:
    """Convert 16-bit grey levels to 8-bit; None for 32-bit pixels, which have no defined maximum.

    image: the pixels of `file`, upright.
    """
    if image.mode == "I" and file.format not in _16_BITS_IN_32:
        return None
    levels = np.asarray(image).astype(np.uint32)
    if isinstance(file, TiffImageFile):  # Pillow leaves 12 bits as they are, and 0 where it is white
        (bits,) = file.tag_v2[BITSPERSAMPLE]
        levels = levels * 65535 // (2**bits - 1)
        if file.tag_v2[PHOTOMETRIC_INTERPRETATION] == _WHITE_IS_0:
            levels = 65535 - levels
    grey = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(
            Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8))
        )
    return grey


def _scale_transparent_colour(image: Image.Image) -> None:
    """Scale a PNG file's transparent colour like its pixels, which Pillow does not; call before loading."""
    stored = image.tile[0][3] if isinstance(image, PngImageFile) and image.tile else None
    if (colour := image.info.get("transparency")) is not None and stored in _PNG_LEVELS:
        scale = _PNG_LEVELS[stored]
        image.info["transparency"] = scale(colour) if isinstance(colour, int) else tuple(map(scale, colour))


def _check_size(path: Encoded, image: Image.Image, size: Size) -> None:
    height, width = height_and_width(size)
    if min(image.size) >= max(height, width):  # large enough in either orientation
        return
    found = _seen_size(image)
    if found[0] < height or found[1] < width:
        raise UserError(
            f"{path} is {size_in_words(found)} pixels, smaller than the {height}x{width} (height x width) "
            "requested: remove it, or use a smaller --image-size"
        )


def _seen_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after applying the EXIF orientation."""
    height, width = image.height, image.width
    if height == width:
        return height, width
    if isinstance(image, TiffImageFile):  # as stored: newer versions of Pillow have turned a TIFF file's size
        height, width = int(image.tag_v2[IMAGELENGTH]), int(image.tag_v2[IMAGEWIDTH])
    return (width, height) if image.getexif().get(_ORIENTATION, 1) in _LYING else (height, width)


def open_image(path: Encoded) -> Image.Image:
    """Open an image with Pillow and read its header; UserError if that fails."""
    try:
        return Image.open(io.BytesIO(path.read()) if isinstance(path, Stored) else path)
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that Pillow can read: remove it from the folder") from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # see `_naming_damage`
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as an image ({reason}): replace or remove it") from error


@contextmanager
def _naming_damage(path: Encoded) -> Iterator[None]:
    """Name the file in a UserError if Pillow fails: for damaged files its plugins raise any exception."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path} is truncated or damaged ({error}): replace or remove it") from error
