"""Image sizes: a number, (height, width), or text."""

import numpy as np
import pytest

from pmf.sizes import height_and_width, normal_size, parse_size, size_in_words


def test_the_height_comes_first_everywhere() -> None:
    assert parse_size("32x64") == normal_size([32, 64]) == (32, 64)
    assert height_and_width((32, 64)) == (32, 64) and size_in_words((32, 64)) == "32x64"
    assert parse_size("32") == parse_size("32X32") == normal_size(np.int64(32)) == 32
    assert height_and_width(32) == (32, 32) and size_in_words(32) == "32x32"


@pytest.mark.parametrize("text", ["", "0", "32x", "x64", "32x0", "-8", "3.5", "32x64x3", "32,64", "wide"])
def test_invalid_words(text: str) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        parse_size(text)


@pytest.mark.parametrize("size", [0, -1, True, 3.5, "32", None, (8,), (8, 0), (8, 2.5), (1, 2, 3)])
def test_invalid_objects(size: object) -> None:
    with pytest.raises(ValueError, match="must be a number of at least 1"):
        height_and_width(size)  # type: ignore[arg-type]
