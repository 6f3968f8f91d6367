"""Setup for all tests: up-to-date compiled code, and a selection of cases for the ptx backend."""

import os
import sys
from collections.abc import Iterator

import pytest

# Before PyTorch is imported, and for the processes that tests start: by default OpenMP's threads spin while
# they wait for work, and several test processes then lose most of their time to each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Dynamo keeps eight graphs per function, so a ninth test would fail because of the earlier eight."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The ptx backend (helpers/ptx) compiles every kernel before it runs.

    It runs only those cases of a test function that use some parameter value for the first time: every
    value once, but not every combination. The parameter `name`, of hard data, does not count: it selects no
    kernel, and the emulator runs it. `PMF_PTX=all pytest -k ptx` runs them all.
    """
    if os.environ.get("PMF_PTX") == "all":
        return
    seen: dict[str, set[tuple[int, str]]] = {}
    kept, left = [], []
    for item in items:
        spec = getattr(item, "callspec", None)
        if spec is None or "ptx" not in spec.params.values() or item.path.parent.name not in ("ops", "optim"):
            kept.append(item)
            continue
        known = seen.setdefault(item.nodeid.partition("[")[0], set())
        data = spec.params.get("name")
        brings = {part for part in enumerate(spec.id.split("-")) if part[1] != data} - known
        known |= brings
        (kept if brings else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)
