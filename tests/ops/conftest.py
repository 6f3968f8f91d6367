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
    """Of tests that take `level`, drop those that run the same code at a level below, if they are there.

    Tests that call it `name` run at every level: they show that each op dispatches by the right dtype.
    """
    there = {item.nodeid for item in items}
    kept: list[pytest.Item] = []
    repeated: list[pytest.Item] = []
    for item in items:
        (repeated if _at_the_level_below(item) in there else kept).append(item)
    config.hook.pytest_deselected(items=repeated)
    items[:] = kept
    float32_on_a_gpu_last(items)


def _at_the_level_below(item: pytest.Item) -> str | None:
    """The id of the test that runs the same code at a level below, or None.

    Levels above avx512 have code of their own only for bfloat16, amx_bf16 only for two ops in it.
    """
    if Path(__file__).parent not in item.path.parents or not hasattr(item, "callspec"):
        return None
    values = item.callspec.params
    level = values.get("level")
    if level not in ("avx512_bf16", "amx_bf16"):
        return None
    if values.get("dtype", torch.bfloat16) != torch.bfloat16:
        return item.nodeid.replace(level, "avx512")
    own_code = level == "avx512_bf16" or any(op in item.nodeid for op in ("attention", "newton_schulz"))
    return None if own_code else item.nodeid.replace(level, "avx512_bf16")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """One thread: on work this small two only wait for each other. A test may set another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
