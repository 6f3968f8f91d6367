"""Optimizer state as tensors plus JSON."""

import json

import pytest
import torch

from pmf.training.packing import pack, unpack


def test_nested_state_survives_json_exactly() -> None:
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "average": torch.randn(2, 3)}, 1: {}},
        "param_groups": [
            {"lr": 0.1 + 0.2, "betas": (0.9, 0.95), "nesterov": True, "name": "muon", "eps": None}
        ],
    }
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.loads(json.dumps(pack(tree, "optimizer", tensors)))
    assert set(tensors) == {"optimizer/state/0/step", "optimizer/state/0/average"}
    back = unpack(skeleton, tensors)
    assert back["param_groups"] == tree["param_groups"]
    assert list(back["state"]) == [0, 1] and torch.equal(
        back["state"][0]["average"], tree["state"][0]["average"]
    )


def test_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match="optimizer/hook"):
        pack({"hook": print}, "optimizer", {})
