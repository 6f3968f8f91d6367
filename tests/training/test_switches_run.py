"""Runs with each switch off or changed: they train, resume bit for bit, and their checkpoints sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pmf import checkpoint, sample
from pmf.errors import UserError
from pmf.training import TrainConfig, resume_config, train

ALL_OTHER: dict[str, Any] = {
    "prediction": "u",
    "v_head": False,
    "guidance": False,
    "times": "r=0",
    "optimizer": "adam",
    "adam_lr": 1e-3,
    "ema": False,
    "norm_p": 0.5,
}
SCALED: dict[str, Any] = {"preconditioner": "edm", "sigma_data": 0.3, "noise_scale": 2.0, "optimizer": "adam"}


@pytest.mark.parametrize("switches", [ALL_OTHER, SCALED], ids=["all other", "pre-conditioned"])
def test_a_run_resumes_and_its_checkpoint_samples(
    tiny: Callable[..., TrainConfig], tmp_path: Path, switches: dict[str, Any]
) -> None:
    switches = switches | {"cooldown": 0.0}  # it depends on the budget, which differs between the parts
    whole = train(tiny(**switches), tmp_path / "whole")
    train(tiny(**switches, steps=2), tmp_path / "parts")
    parts = train(resume_config(tmp_path / "parts", {"steps": 4}), tmp_path / "parts", resume=True)
    for ours, theirs in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    loaded = checkpoint.load_checkpoint(tmp_path / "whole")
    assert loaded.config == whole.model.config
    assert loaded.config.v_head == switches.get("v_head", True)
    images = [
        sample(model, [0, 3], generator=torch.Generator().manual_seed(0)) for model in (whole.model, loaded)
    ]
    assert torch.equal(*images) and images[0].isfinite().all()


def test_without_averages_none_are_kept(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(tiny(ema=False, steps=1), tmp_path)
    newest = checkpoint.newest_checkpoint(tmp_path)
    assert not list(newest.glob("ema-*"))
    assert checkpoint.load_model(tmp_path).path.name == "weights.safetensors"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"prediction": "u"}, "was trained with its preset's --prediction"),
        ({"v_head": False}, "was trained with --v-head"),
        ({"optimizer": "adam"}, "was trained with --optimizer muon"),
        ({"ema": False}, "was trained with --ema"),
    ],
)
def test_settings_that_shape_a_run_cannot_change_when_resuming(
    tiny: Callable[..., TrainConfig],
    tmp_path_factory: pytest.TempPathFactory,
    changed: dict[str, Any],
    sentence: str,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "one-run"
    if not folder.is_dir():
        train(tiny(steps=1), folder)
    with pytest.raises(UserError, match=f"{sentence}, which cannot change when resuming"):
        resume_config(folder, changed)
