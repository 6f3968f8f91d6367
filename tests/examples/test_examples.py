"""The programs in examples/, each at reduced size."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published import load, load_or_skip

__all__ = ["load"]
EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(printed: str) -> list[float]:
    return [float(line.rpartition(" ")[2]) for line in printed.splitlines() if "loss_u" in line]


def test_points(capsys):
    points = example("points").main(["--steps", "3"])
    assert points.shape == (2000, 2) and points.isfinite().all()
    assert len(losses(capsys.readouterr().out)) == 1


def test_signal(capsys):
    signals = example("signal_1d").main(["--steps", "2"])
    assert signals.shape == (256, 64) and signals.isfinite().all()


def test_vit(load):
    load("timm")
    images = example("vit_timm").main(["--steps", "2", "--batch", "4"])
    assert images.shape == (10, 1, 8, 8) and images.isfinite().all()


def test_dit(load):
    load("diffusers")
    images = example("dit_diffusers").main(["--steps", "2", "--batch", "2", "--size", "8"])
    assert images.shape == (4, 1, 8, 8) and images.isfinite().all() and images.std() > 0.1


def test_dit_samples_every_label_that_is_asked_for(load, monkeypatch):
    """In training mode one in ten was dropped."""
    embedding = load("diffusers.models.embeddings").LabelEmbedding
    batches, drop = [], embedding.token_drop

    def noted(self, labels, ids):
        batches.append(len(labels))
        return drop(self, labels, ids)

    monkeypatch.setattr(embedding, "token_drop", noted)
    example("dit_diffusers").main(["--steps", "1", "--batch", "3", "--size", "8"])
    assert batches and 4 not in batches


def test_jacobians(load):
    load("transformers")
    jacobians = example("jacobians_transformers").main(["--batch", "2", "--tokens", "5"])
    assert jacobians.shape == (2, 32, 5, 32)
    assert (jacobians.flatten(2).norm(dim=(1, 2)) > 1e-3).all()


def test_figure(tmp_path, monkeypatch):
    load_or_skip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    out = tmp_path / "figure.png"
    example("figure").main(["--out", str(out), "--points-steps", "1", "--signal-steps", "1"])
    assert out.stat().st_size > 10_000
    for name in ("points", "signal_1d"):
        sys.modules.pop(name, None)
    assert torch.get_default_dtype() == torch.float32
