import pytest
import torch
from helpers.published import load

from pmf.tangents import mode

__all__ = ["load"]


@pytest.fixture(autouse=True)
def _all_tangents_in_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat all tangents as large: no network here has large ones."""
    monkeypatch.setattr(mode, "LARGE", 1)


@pytest.fixture(autouse=True)
def one_thread():
    """On work this small, two threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
