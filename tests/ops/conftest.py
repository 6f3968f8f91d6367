"""Fixtures for the op tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.levels import EVERYWHERE, at_level, float32_on_a_gpu_last


@pytest.fixture(params=EVERYWHERE)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU level of this processor, the emulator, a GPU if there is one, and the built library's PTX."""
    with at_level(request.param):
        yield request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Level amx_bf16 has code of its own only for attention in bfloat16; the rest is that of avx512_bf16."""
    kept: list[pytest.Item] = []
    repeated: list[pytest.Item] = []
    for item in items:
        (repeated if _repeats_the_level_below(item) else kept).append(item)
    config.hook.pytest_deselected(items=repeated)
    items[:] = kept
    float32_on_a_gpu_last(items)


def _repeats_the_level_below(item: pytest.Item) -> bool:
    if Path(__file__).parent not in item.path.parents or not hasattr(item, "callspec"):
        return False
    values = item.callspec.params
    own_code = "attention" in item.nodeid and values.get("dtype", torch.bfloat16) == torch.bfloat16
    return values.get("level") == "amx_bf16" and not own_code


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One thread: on work this small two only wait for each other. A test may set another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
