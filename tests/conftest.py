"""Which tests run on the ptx backend (helpers/ptx), where every kernel is compiled before it runs.

Of each test function's cases there those that bring a value of some parameter for the first time: every value
once, not every combination. `PMF_PTX=all pytest -k ptx` runs them all.
"""

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
        brings = set(enumerate(spec.id.split("-"))) - known
        known |= brings
        (kept if brings else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)
