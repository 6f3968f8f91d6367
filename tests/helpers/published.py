"""The packages that published the networks under comparison.

A test is skipped if its package is missing, and fails with PMF_PEERS=required, as set in CI.
"""

import importlib
import importlib.util
import os
import sys
import types
from typing import Any

import pytest
import torch

_schemas = torch.library.Library("torchvision", "FRAGMENT")  # its definitions live as long as it does


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a package that imports torchvision, or tools that do not affect its results."""
    for name in (
        "nms",
        "qnms",
    ):  # torchvision needs them, and CPU builds of torch lack them
        if not hasattr(torch.ops.torchvision, name):
            _schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):
        stand_in = types.ModuleType(name)
        setattr(stand_in, attribute, None)
        monkeypatch.setitem(sys.modules, name, stand_in)

    def load_with_torchvision(name: str) -> Any:
        load_or_skip("torchvision")
        return load_or_skip(name)

    return load_with_torchvision


def load_or_skip(name: str) -> Any:
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        missing = pytest.fail if os.environ.get("PMF_PEERS") == "required" else pytest.skip
        missing(f"{package} is not installed")
    return importlib.import_module(name)
