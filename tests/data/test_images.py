"""Reading and writing pixels: scaling, ADM's centre crop, file modes, and unusable files."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pmf.data import centre_crop, image_grid, read_image, save_png, to_float, to_uint8
from pmf.data.images import check_image, image_size
from pmf.errors import UserError


def test_every_pixel_value_survives_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    scaled = to_float(pixels)
    assert scaled.min() == -1 and scaled.max() == 1
    assert torch.equal(to_uint8(scaled), pixels)


def test_to_uint8_clips_rounds_and_survives_nan() -> None:
    images = torch.tensor([-7.0, -1.0, 0.0, 1.0, 3.0, float("inf"), float("nan")])
    assert to_uint8(images).tolist() == [0, 0, 128, 255, 255, 255, 0]  # 127.5 rounds to even: 128


def test_converted_images_are_not_converted_again() -> None:
    """Bytes, as datasets read them, became a white grid; floats became black."""
    pixels = torch.tensor([[[[0, 100], [200, 255]]]], dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels), pixels)
    assert torch.equal(image_grid(pixels, 1), image_grid(to_float(pixels), 1))
    assert torch.equal(to_float(to_float(pixels)), to_float(pixels))


def test_centre_crop_halves_by_box_filter_and_takes_the_middle() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 48), dtype=np.uint8)
    cropped = np.asarray(centre_crop(Image.fromarray(pixels), 10)).astype(float)
    halved = pixels.reshape(10, 2, 24, 2).mean(axis=(1, 3))  # then the middle 10 of 24 columns
    assert np.abs(cropped - halved[:, 7:17]).max() <= 1  # Pillow rounds to whole grey levels, once per axis


def test_a_centre_that_is_not_square_covers_both_sides() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 48), dtype=np.uint8)
    halved = pixels.reshape(10, 2, 24, 2).mean(axis=(1, 3))
    wide = np.asarray(centre_crop(Image.fromarray(pixels), (10, 14))).astype(float)
    assert wide.shape == (10, 14) and np.abs(wide - halved[:, 5:19]).max() <= 1
    whole = np.asarray(centre_crop(Image.fromarray(pixels), (20, 48)))
    assert np.array_equal(whole, pixels)
    tall = np.asarray(centre_crop(Image.fromarray(pixels.T.copy()), (14, 10))).astype(float)
    assert np.abs(tall.T - wide).max() <= 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 200), st.integers(0, 200))
def test_centre_crop_has_the_requested_size(
    height: int, width: int, more_width: int, more_height: int
) -> None:
    image = Image.new("L", (width + more_width, height + more_height))
    assert centre_crop(image, (height, width)).size == (width, height)


def test_centre_crop_at_the_same_size_changes_nothing() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(pixels), 16)), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_read_image_accepts_every_8_bit_mode(tmp_path: Path, mode: str, channels: int) -> None:
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


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
def test_16_bit_grey_levels_keep_their_place_between_black_and_white(tmp_path: Path, kind: str) -> None:
    levels = np.array([0, 128, 129, 257 * 100, 257 * 200 + 128, 257 * 200 + 129, 65406, 65535], np.uint16)
    Image.fromarray(np.tile(levels, (8, 1))).save(tmp_path / f"deep.{kind}")
    for channels in (1, 3):
        row = read_image(tmp_path / f"deep.{kind}", 8, channels)[-1, 3]
        assert row.tolist() == [0, 0, 1, 100, 200, 201, 254, 255]  # clipped at 255, most would be white


@pytest.mark.parametrize(
    ("bits", "white_is_0", "pixels", "expected"),
    [
        (12, False, bytes.fromhex("000fff 808080"), [0, 255, 128, 8]),
        (16, True, bytes.fromhex("0000 ffff 8080 0808"), [255, 0, 127, 247]),
    ],
)
def test_grey_levels_of_a_tiff_keep_their_place(
    tmp_path: Path, bits: int, white_is_0: bool, pixels: bytes, expected: list[int]
) -> None:
    """12 bits were nearly black, and 16 bits a negative."""
    data = pixels * 8  # 4 rows of 8
    tags = {256: 8, 257: 4, 258: bits, 259: 1, 262: 0 if white_is_0 else 1, 277: 1, 278: 4}
    tags |= {273: 8 + 2 + 12 * 9 + 4, 279: len(data)}  # where the pixels begin, and how many bytes they take
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(tags.items()))
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    (tmp_path / "a.tiff").write_bytes(header + entries + bytes(4) + data)
    assert read_image(tmp_path / "a.tiff", 4, 1)[0, 0].tolist() == expected[2:] + expected[:2]


PNG_DEPTHS = {
    # Bits and colour type of the file; its first two pixels, packed; the transparent one; the other, read.
    "grey 1": (1, 0, b"\x55", (0,), 255),
    "grey 2": (2, 0, bytes([0b01100110] * 2), (1,), 170),
    "grey 4": (4, 0, b"\x3a" * 4, (3,), 170),
    "grey 8": (8, 0, b"\x03\xaa" * 4, (3,), 170),
    "grey 16": (16, 0, b"\x12\x34\xaa\xaa" * 4, (0x1234,), 170),
    "colour 8": (8, 2, b"\x01\x02\x03\xaa\xaa\xaa" * 4, (1, 2, 3), 170),
    "colour 16": (16, 2, (b"\x12\x34" * 3 + b"\xaa\xaa" * 3) * 4, (0x1234,) * 3, 170),
}


@pytest.mark.parametrize("depth", PNG_DEPTHS)
def test_the_transparent_colour_of_a_png_of_any_depth_becomes_white(tmp_path: Path, depth: str) -> None:
    bits, kind, row, colour, other = PNG_DEPTHS[depth]

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, kind, 0, 0, 0))
    transparent = chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * 8))
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + transparent + pixels + chunk(b"IEND", b"")
    )
    for channels in (1, 3):
        assert read_image(tmp_path / "a.png", 8, channels)[-1, 3].tolist() == [255, other] * 4


def quarters() -> Image.Image:
    """Four grey levels, so that all eight ways to turn it differ."""
    return Image.fromarray(np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((8, 8), np.uint8)))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_read_as_displayed(tmp_path: Path, orientation: int, kind: str) -> None:
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    turns |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # as stored: rotated the other way
    seen, exif = quarters(), Image.Exif()
    stored = seen if orientation == 1 else seen.transpose(Image.Transpose[turns[orientation]])
    exif[0x0112] = orientation
    stored.save(tmp_path / f"image.{kind}", exif=exif)
    pixels = read_image(tmp_path / f"image.{kind}", 16, 1)[0]
    corners = [int(pixels[y, x]) for y in (3, 12) for x in (3, 12)]
    assert np.abs(np.array(corners) - [0, 80, 160, 240]).max() < 12  # JPEG and WebP are lossy


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "webp"])
def test_a_rotated_photo_has_its_displayed_size(tmp_path: Path, kind: str) -> None:
    """Pillow 11 and later turn the size of a TIFF file when opening it; it was turned twice."""
    exif, path = Image.Exif(), tmp_path / f"a.{kind}"
    exif[0x0112] = 6
    Image.new("L", (20, 10), 9).save(path, exif=exif)  # displayed 20 high and 10 wide
    assert image_size(path) == (20, 10)
    assert read_image(path, (20, 10), 1).shape == (1, 20, 10)
    check_image(path, (20, 10))
    with pytest.raises(UserError, match=r"is 20x10 pixels, smaller than the 10x20"):
        check_image(path, (10, 20))


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_an_animation_is_read(tmp_path: Path, kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    first.save(tmp_path / f"a.{kind}", save_all=True, append_images=[second])
    pixels = read_image(tmp_path / f"a.{kind}", 8, 3)
    assert pixels[0].min() > 240 and pixels[1:].max() < 16


def test_a_suspiciously_large_image_is_named(tmp_path: Path) -> None:
    size = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", size), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(UserError, match=r"bomb\.png cannot be read as an image .*1600000000 pixels"):
        read_image(tmp_path / "bomb.png", 8, 3)


def test_truncated_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(UserError, match=r"cut\.png is truncated or damaged"):
        read_image(path, 16, 3)


def test_whatever_a_damaged_file_makes_pillow_raise_is_named(tmp_path: Path) -> None:
    """Of a PNG's Exif Pillow may learn only from decoding it; other plugins raise errors of other kinds."""
    readers: tuple[Callable[[Path], object], ...] = (
        image_size,
        lambda path: check_image(path, (16, 8)),
        lambda path: read_image(path, 8, 3),
    )
    for name, start in {"a.png": 50, "a.dds": 80}.items():  # compressed pixels, and the pixel format
        content = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
        Image.fromarray(noise).save(content, format=name[2:])
        whole = content.getvalue()
        (tmp_path / name).write_bytes(whole[:start] + bytes(4) + whole[start + 4 :])
        for read in readers:
            with pytest.raises(UserError, match=f"{name} .*replace or remove it"):
                read(tmp_path / name)


def test_empty_text_small_and_float_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.png").write_text("not an image")
    Image.new("RGB", (40, 7)).save(tmp_path / "small.png")
    Image.new("F", (8, 8)).save(tmp_path / "float.tiff")
    Image.new("I", (8, 8), 70000).save(tmp_path / "deep.tiff")
    for name, sentence in {
        "empty.png": "is not an image",
        "words.png": "is not an image",
        "small.png": r"is 7x40 pixels, smaller than the 8x8 .height x width. requested: .*--image-size",
        "float.tiff": "has F pixels: convert it",
        "deep.tiff": "has I pixels: convert it",
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
    assert corners.tolist() == [[0, 128], [255, 128]]  # the fourth cell is empty
