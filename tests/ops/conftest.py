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
    """Levels above avx512 have code of their own only for bfloat16, amx_bf16 only for attention in it."""
    kept: list[pytest.Item] = []
    repeated: list[pytest.Item] = []
    for item in items:
        (repeated if _repeats_a_level_below(item) else kept).append(item)
    config.hook.pytest_deselected(items=repeated)
    items[:] = kept
    float32_on_a_gpu_last(items)


def _repeats_a_level_below(item: pytest.Item) -> bool:
    if Path(__file__).parent not in item.path.parents or not hasattr(item, "callspec"):
        return False
    values = item.callspec.params
    bf16 = values.get("dtype", torch.bfloat16) == torch.bfloat16
    own_code = {"avx512_bf16": bf16, "amx_bf16": bf16 and "attention" in item.nodeid}
    return not own_code.get(values.get("level"), True)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One thread: on work this small two only wait for each other. A test may set another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
