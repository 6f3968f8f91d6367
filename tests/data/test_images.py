"""Pixels in, pixels out: scaling, ADM's centre crop, file modes, and files that cannot be used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pmf.data import centre_crop, image_grid, read_image, save_png, to_float, to_uint8
from pmf.errors import UserError


def test_every_pixel_value_survives_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    scaled = to_float(pixels)
    assert scaled.min() == -1 and scaled.max() == 1
    assert torch.equal(to_uint8(scaled), pixels)


def test_to_uint8_clips_rounds_and_survives_nan() -> None:
    images = torch.tensor([-7.0, -1.0, 0.0, 1.0, 3.0, float("inf"), float("nan")])
    assert to_uint8(images).tolist() == [0, 0, 128, 255, 255, 255, 0]  # 127.5 rounds to even: 128


def test_centre_crop_halves_by_box_filter_and_takes_the_middle() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 48), dtype=np.uint8)
    cropped = np.asarray(centre_crop(Image.fromarray(pixels), 10)).astype(float)
    halved = pixels.reshape(10, 2, 24, 2).mean(axis=(1, 3))  # then the middle 10 of 24 columns
    assert np.abs(cropped - halved[:, 7:17]).max() <= 1  # Pillow rounds to whole grey levels, once per axis


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 200))
def test_centre_crop_has_the_size_asked_for(size: int, more_width: int, more_height: int) -> None:
    image = Image.new("L", (size + more_width, size + more_height))
    assert centre_crop(image, size).size == (size, size)


def test_centre_crop_at_the_same_size_changes_nothing() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(pixels), 16)), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_read_image_takes_every_8_bit_mode(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / "image.tiff"
    Image.new("RGB", (12, 9), (255, 255, 255)).convert(mode).save(path)
    pixels = read_image(path, 8, channels)
    assert pixels.shape == (channels, 8, 8) and pixels.dtype == torch.uint8
    assert (pixels == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "clear.png"
    Image.new("RGBA", (8, 8), (10, 200, 30, 0)).convert(mode).save(path)
    assert (read_image(path, 8, 3) == 255).all()


def test_a_transparent_palette_colour_becomes_white(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(path, transparency=0)
    assert (read_image(path, 8, 3) == 255).all()


def test_truncated_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(UserError, match=r"cut\.png is cut off or damaged"):
        read_image(path, 16, 3)


def test_empty_text_small_and_16_bit_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.png").write_text("not an image")
    Image.new("RGB", (40, 7)).save(tmp_path / "small.png")
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    for name, sentence in {
        "empty.png": "is not an image",
        "words.png": "is not an image",
        "small.png": r"is 40x7 pixels, smaller than the 8x8 asked for: .*--image-size",
        "deep.png": "16-bit or float.*convert it",
        "absent.png": "No such file",
    }.items():
        with pytest.raises(UserError, match=f"{name} .*{sentence}"):
            read_image(tmp_path / name, 8, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_png_holds_the_rounded_pixels(tmp_path: Path, channels: int) -> None:
    image = torch.empty(channels, 5, 7).uniform_(-1.2, 1.2, generator=torch.Generator().manual_seed(0))
    save_png(image, tmp_path / "folder" / "image.png")
    with Image.open(tmp_path / "folder" / "image.png") as read:
        pixels = torch.from_numpy(np.asarray(read).copy()).reshape(5, 7, channels).permute(2, 0, 1)
    assert torch.equal(pixels, to_uint8(image))


def test_grid_enlarges_small_images_by_whole_pixels_in_reading_order() -> None:
    images = torch.stack([torch.full((1, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    grid = image_grid(images, columns=2)
    factor = grid.shape[-1] // 17  # 8 + gap of 1 + 8 columns
    assert grid.shape == (1, 17 * factor, 17 * factor) and factor > 20
    tile = 9 * factor
    corners = grid[0, ::tile, ::tile]
    assert corners.tolist() == [[0, 128], [255, 128]]  # the fourth place is empty
