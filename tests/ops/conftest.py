"""Fixtures for the op tests."""

from collections.abc import Iterator

import pytest
import torch
from helpers.levels import EVERYWHERE, at_level


@pytest.fixture(params=EVERYWHERE)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU level of this processor, the emulator, a GPU if there is one, and the built library's PTX."""
    with at_level(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One thread: on work this small two only wait for each other. A test may set another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
