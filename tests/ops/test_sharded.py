"""DTensors over two processes: values, gradients and tangents equal one process's; the rest is rejected."""

import socket
from typing import Any

import pytest
import torch
from helpers import two_meshes
from helpers.ops import CASES

EXACT = 1e-13
"""In float64: sums over ranks are taken in another order."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first rank's results; the second got the same error messages."""
    out = tmp_path_factory.mktemp("meshes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_meshes.main, (port, out), nprocs=2)
    first, second = (torch.load(out / f"rank{rank}.pt") for rank in range(2))
    assert first["refused"] == second["refused"]
    return first


@pytest.mark.parametrize("name", [*CASES, "heads and batch"])
def test_shards_give_the_results_of_one_process(found, name):
    for way, errors in found[name].items():
        for what, error in errors.items():
            assert error < EXACT, f"{way}: {what} off by {error}"


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "plain": "rms_norm: weight is a plain tensor beside DTensors",
        "width": "rms_norm: x is a DTensor of placements",
        "sequence": "attention: query is a DTensor of placements",
        "crossed": "swiglu: gate and up are sharded along dimensions that do not belong together",
        "fewer tangents": "swiglu_jvp: gate_t has size 2 in dimension 0",
        "one tangent": "swiglu_jvp: gate_t has size 1 in dimension 0",
        "uneven groups": "attention: key has size 3 in dimension 1",
        "no groups": "attention: key has size 2 in dimension 1",
        "broadcast": "swiglu: up has size 1 in dimension 0",
        "rows": "newton_schulz: matrices is a DTensor of placements",
    }.items(),
)
def test_unsupported_shardings_are_rejected_by_name(found, case, words):
    assert found["refused"][case].startswith(words)
    assert len(found["refused"]) == 10
