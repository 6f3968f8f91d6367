"""The authors' trainer as numbers: golden/objective.npz has its results for one tiny network.

The published code was run with every random draw fixed. Two implementations of it agreed to 1e-6; the test
requires 1e-4.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pmf import sample
from pmf.flow import Draws, Objective, Terms
from pmf.models import PixelMeanFlow, config_from_state_dict, from_official

TOLERANCE = 1e-4


class Golden:
    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path)

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self._arrays[name]))

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): self[k] for k in self._arrays.files if k.startswith(prefix)}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(Path(__file__).parents[1] / "golden" / "objective.npz")


@pytest.fixture(scope="module")
def model(golden: Golden) -> PixelMeanFlow:
    params = golden.below("param/")
    model = PixelMeanFlow(config_from_state_dict(params, noise_scale=1.0))
    model.load_state_dict(from_official(params))
    return model


@pytest.fixture(scope="module")
def terms(golden: Golden, model: PixelMeanFlow) -> Terms:
    vectors = {name: golden[f"in/{name}"] for name in ("t", "r", "noise", "omega", "t_min", "t_max")}
    labels = golden["in/labels"]
    drop = torch.arange(len(labels)) < int(golden["in/num_dropped_labels"])
    terms = Objective()(model, golden["in/images"], labels, Draws(**vectors, drop=drop))
    model.zero_grad()
    terms.loss.backward()
    return terms


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["v_target", "u", "v"])
def test_images(golden: Golden, terms: Terms, name: str) -> None:
    assert relative_error(getattr(terms, name), golden[f"out/{name}"]) < TOLERANCE


@pytest.mark.parametrize("name", ["v_tangent", "du_dt"])
def test_tangents_where_they_matter(golden: Golden, terms: Terms, name: str) -> None:
    meanflow = ~golden["in/is_flow_matching"]
    assert relative_error(getattr(terms, name)[meanflow], golden[f"out/{name}"][meanflow]) < TOLERANCE


@pytest.mark.parametrize("name", ["loss", "loss_u", "loss_v"])
def test_losses(golden: Golden, terms: Terms, name: str) -> None:
    assert relative_error(getattr(terms, name), golden[f"out/{name}"]) < TOLERANCE


def test_every_gradient(golden: Golden, model: PixelMeanFlow, terms: Terms) -> None:
    expected = from_official(golden.below("grad/"))
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("steps", [1, 2])
def test_samples(golden: Golden, model: PixelMeanFlow, steps: int) -> None:
    given = golden.below(f"sample{steps}/")
    interval = float(given["t_min"]), float(given["t_max"])
    images = sample(model, given["labels"], steps, float(given["omega"]), interval, noise=given["z"])
    assert relative_error(images, given["images"]) < TOLERANCE
