import pytest
import torch
from helpers.published import load

__all__ = ["load"]


@pytest.fixture(autouse=True)
def one_thread():
    """On work this small, two threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
