"""The smallest run that is still complete."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pmf.training import TrainConfig, get_preset

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "depth": 2,
    "head_depth": 1,
    "num_heads": 2,
    "bottleneck": 4,
    "condition_tokens": (1, 1, 1, 1, 1),
    "batch_size": 8,
    "precision": "fp32",
    "minutes": None,
    "steps": 4,
    "log_every": 2,
    "ema_half_lives": (0.01, 0.02),
    "sample_ema": 0.02,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Callable[..., TrainConfig]:
    """The digits preset on a network of a few thousand weights, with settings replaced by name."""
    return lambda **overrides: get_preset("digits", **(TINY | overrides))
