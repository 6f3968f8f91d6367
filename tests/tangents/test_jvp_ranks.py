"""Two processes against one: DDP on either side, FSDP2 of the whole and of layers, checkpoints."""

import socket

import pytest
import torch
from helpers import jvp_ranks
from helpers.tolerance import assert_close


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(jvp_ranks.main, (port, out), nprocs=2)
    return torch.load(out / "found.pt")


@pytest.mark.parametrize("way", jvp_ranks.WAYS)
def test_gradients_are_the_mean_of_both_ranks(found, way: str):
    limit = 2e-2 if "bf16" in way else 1e-6
    assert_close(found[way], jvp_ranks.expected(), limit)


@pytest.mark.parametrize("way", ["no_sync", "FSDP, no sync"])
def test_accumulated_gradients(found, way: str):
    assert_close(found[way], jvp_ranks.expected(steps=2), 1e-6)
