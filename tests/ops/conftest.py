"""Fixtures of the tests of ops."""

from collections.abc import Iterator

import pytest
import torch
from helpers.levels import CPU_LEVELS, LEVELS, at_level, without_cuda
from helpers.ops import STEMS


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level of the CPU kernels that this processor has, the emulator, and a GPU where there is one."""
    if "case" in request.fixturenames:  # a test of all ops
        stem = request.getfixturevalue("case").name
    else:
        module = request.module.__name__.rpartition(".")[2]
        stem = max((s for s in STEMS if module.startswith(f"test_{s}")), key=len)
    if request.param not in CPU_LEVELS and (reason := without_cuda(stem)) is not None:
        pytest.skip(reason)
    with at_level(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One thread: on work this small two only wait for each other. A test may set another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
