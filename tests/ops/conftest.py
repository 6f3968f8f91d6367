"""Fixtures of the tests of ops."""

from collections.abc import Iterator

import pytest
import torch
from helpers.levels import LEVELS, at_level


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level of the CPU kernels that this processor has, and afterwards the default again."""
    with at_level(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test call torch.set_num_threads: the number is the old one afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
