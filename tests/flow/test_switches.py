"""Every ablation, alone and combined, against the plain port in float64, on batches of every case."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from flow.test_objective import BATCHES, CONFIG, SAMPLES, CountingModel, batch, batch_of, compare, model
from torch import Tensor

import pmf
from pmf.flow import (
    EDMPreconditioner,
    LineTimes,
    NoGuidance,
    Objective,
    PlaneTimes,
    Preconditioner,
    SCMPreconditioner,
    UPrediction,
)
from pmf.models import ModelConfig, PixelMeanFlow
from pmf.reference.network import network
from pmf.reference.objective import coefficients

__all__ = ["model"]  # the fixture


class Blurred:
    """Two simple distances: of cropped rows, and of means; both with gradients."""

    max_t = 0.75

    def draw(self, batch: int, image_size: int, generator: torch.Generator | None) -> Tensor:
        return torch.randint(image_size // 2, (batch,), generator=generator)

    def __call__(self, x_pred: Tensor, x: Tensor, crop: Tensor | None) -> Sequence[tuple[float, Tensor]]:
        assert crop is not None and len(crop) == len(x) == len(x_pred)
        rows = (torch.arange(x.shape[-1]) >= crop[:, None])[:, None, :, None]
        error = x_pred - x
        return [(0.4, (error * rows).square().sum((1, 2, 3))), (0.1, error.mean((1, 2, 3)).square())]


MIXED = [name for name, samples in BATCHES.items() if len(samples) > 1]
MODEL_SWITCHES: dict[str, dict[str, Any]] = {
    "u": {"prediction": "u"},
    "edm": {"preconditioner": "edm", "sigma_data": 0.4},
    "scm": {"preconditioner": "scm", "sigma_data": 0.4},
    "edm, wide noise": {"preconditioner": "edm", "noise_scale": 2.0},
    "scm, wide noise": {"preconditioner": "scm", "noise_scale": 2.0},
}
OBJECTIVE_SWITCHES: dict[str, dict[str, Any]] = {
    "no v head": {"v_head": False},
    "perceptual": {"perceptual": Blurred()},
    "no v head, perceptual": {"v_head": False, "perceptual": Blurred()},
}


def check(
    model: PixelMeanFlow, name: str, of_model: dict[str, Any], of_objective: dict[str, Any], **settings: Any
) -> None:
    model = copy.copy(model)
    model.config = replace(CONFIG, **of_model)
    objective = Objective(noise_scale=model.config.noise_scale, **of_objective, **settings)
    images, labels, draws = batch_of(name)
    perceptual = objective.perceptual
    if perceptual is not None:
        crop = perceptual.draw(len(images), CONFIG.image_size, torch.Generator().manual_seed(5))
        draws = draws._replace(crop=crop)
        of_objective = {**of_objective, "perceptual_max_t": perceptual.max_t}
    compare(model, objective, images, labels, draws, **of_model, **of_objective)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("switch", ["u", "edm", "scm"])
def test_what_the_output_means(model: PixelMeanFlow, switch: str, name: str) -> None:
    check(model, name, MODEL_SWITCHES[switch], {})


@pytest.mark.parametrize("switch", ["u", "edm", "scm"])
def test_names_mean_what_the_configuration_would_create(model: PixelMeanFlow, switch: str) -> None:
    named = {k: v for k, v in MODEL_SWITCHES[switch].items() if k in ("prediction", "preconditioner")}
    rest = {k: v for k, v in MODEL_SWITCHES[switch].items() if k not in named}
    images, labels, draws = batch_of("every case")
    terms, samples = [], []
    for of_model, of_call in ((MODEL_SWITCHES[switch], {}), (rest, named)):
        model = copy.copy(model)
        model.config = replace(CONFIG, **of_model)
        objective = Objective(noise_scale=model.config.noise_scale, **of_call)
        terms.append(objective(model, images, labels, draws).loss.detach())
        samples.append(pmf.sample(model, [0, 1], generator=torch.Generator().manual_seed(1), **of_call))
    assert torch.equal(*terms) and torch.equal(*samples)


@pytest.mark.parametrize(
    "wrong",
    [{"prediction": "v"}, {"preconditioner": "karras"}, {"prediction": UPrediction}, {"preconditioner": 3}],
)
def test_other_predictions_and_preconditioners_are_refused(
    model: PixelMeanFlow, wrong: dict[str, Any]
) -> None:
    (name,) = wrong
    for make in (lambda: Objective(**wrong), lambda: pmf.sample(model, [0], **wrong)):
        with pytest.raises(ValueError, match=f"{name} must be "):
            make()


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("switch", OBJECTIVE_SWITCHES)
def test_terms_of_the_loss(model: PixelMeanFlow, switch: str, name: str) -> None:
    check(model, name, {}, OBJECTIVE_SWITCHES[switch])


@pytest.mark.parametrize("of_objective", OBJECTIVE_SWITCHES)
@pytest.mark.parametrize("of_model", MODEL_SWITCHES)
def test_combinations(model: PixelMeanFlow, of_model: str, of_objective: str) -> None:
    switches = MODEL_SWITCHES[of_model], OBJECTIVE_SWITCHES[of_objective]
    check(model, "every case", *switches, norm_p=0.5, row_multiple=4)


@pytest.mark.parametrize(
    "settings",
    [
        {"times": LineTimes(line="r=t")},
        {"times": LineTimes(line="r=0")},
        {"guidance": NoGuidance()},
        {"guidance": NoGuidance(), "v_head": False},
        {"guidance": NoGuidance(), "times": LineTimes(line="r=0"), "v_head": False},
    ],
)
def test_its_own_draws_of_times_and_guidance(model: PixelMeanFlow, settings: dict[str, Any]) -> None:
    images, labels, _ = batch({key: [value] * 6 for key, value in SAMPLES["meanflow"].items()})
    objective = Objective(class_dropout=0.3, **settings)
    draws = objective.draw(images, labels, torch.Generator().manual_seed(2))
    draws = draws._replace(**{f: getattr(draws, f).double() for f in ("t", "r", "omega", "t_min", "t_max")})
    compare(model, objective, images, labels, draws, v_head=objective.v_head)


def test_times_on_a_line_keep_the_t_of_the_plane() -> None:
    plane = PlaneTimes(mean=0.4, std=1.0, uniform_fraction=0.3)
    t, _ = plane.draw(64, torch.Generator().manual_seed(0))
    for line, expected in (("r=t", t), ("r=0", torch.zeros(64))):
        drawn = LineTimes(plane, line).draw(64, torch.Generator().manual_seed(0))
        assert torch.equal(drawn[0], t) and torch.equal(drawn[1], expected)
    with pytest.raises(ValueError, match="line must be 'r=t' or 'r=0', got 't=1'"):
        LineTimes(plane, "t=1")


def test_without_guidance_omega_is_one_on_the_whole_interval() -> None:
    omega, t_min, t_max = NoGuidance().draw(torch.tensor([True, False]), None)
    assert (omega.tolist(), t_min.tolist(), t_max.tolist()) == ([1, 1], [0, 0], [1, 1])
    assert NoGuidance().effective_omega(omega, 3 * omega, t_min, t_max, omega > 0).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("settings", "rows", "passes", "tangents"),
    [
        # Without a v head the same passes use the u head; a flow-matching sample's u is its v_c.
        ({"v_head": False}, ["flow matching"] * 3, {"u": 3 + 3}, 0),
        ({"v_head": False}, ["meanflow"] * 3, {"u": 3 + 6}, 3),
        ({"v_head": False, "guidance": NoGuidance()}, ["flow matching"] * 3, {"u": 3}, 0),
        # Without guidance only the direction of du/dt is left to compute.
        ({"guidance": NoGuidance()}, ["meanflow"] * 3, {"uv": 3, "v": 3}, 3),
        ({"guidance": NoGuidance()}, ["flow matching"] * 3, {"uv": 3}, 0),
    ],
)
def test_switches_compute_no_more_than_needed(
    settings: dict[str, Any], rows: list[str], passes: dict[str, int], tangents: int
) -> None:
    model = CountingModel(replace(CONFIG, v_head=settings.get("v_head", True))).double()
    model.counts = {}
    given = {key: [SAMPLES[row][key] for row in rows] for key in SAMPLES["meanflow"]}
    Objective(**settings)(model, *batch(given))
    assert model.counts.pop("tangents") == tangents
    assert model.counts == passes


PRECONDITIONERS = {"edm": EDMPreconditioner(0.4, 2.0), "scm": SCMPreconditioner(0.4, 2.0)}


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_tangents_of_preconditioners_are_their_derivatives(name: str) -> None:
    preconditioner: Preconditioner = PRECONDITIONERS[name]
    torch.manual_seed(0)
    z, raw, z_t, raw_t = torch.randn(4, 5, 1, 2, 2, dtype=torch.float64)
    t, t_t = torch.tensor([0.0, 0.03, 0.5, 0.9, 1.0]).double(), torch.randn(5).double()
    primals, tangents = (z, raw, t), (z_t, raw_t, t_t)
    for function, tangent, used in (
        (preconditioner.input, preconditioner.input_tangent, (0, 2)),
        (preconditioner.output, preconditioner.output_tangent, (0, 1, 2)),
    ):
        at, along = [primals[i] for i in used], [tangents[i] for i in used]
        _, expected = torch.func.jvp(function, tuple(at), tuple(along))
        torch.testing.assert_close(tangent(*at, *along), expected, rtol=1e-12, atol=1e-12)
        step = 1e-6
        ahead, behind = ([a + s * b for a, b in zip(at, along, strict=True)] for s in (step, -step))
        difference = (function(*ahead) - function(*behind)) / (2 * step)
        torch.testing.assert_close(tangent(*at, *along), difference, rtol=1e-6, atol=1e-6)


def test_edm_coefficients_meet_their_requirements() -> None:
    """Measured on samples: unit input, unit target, and no other c_skip has a smaller error."""
    torch.manual_seed(0)
    x, e = 0.4 * torch.randn(200_000).double(), 2.0 * torch.randn(200_000).double()
    for t in (0.1, 0.5, 0.8, 1.0):
        time = torch.full((1,), t, dtype=torch.float64)
        c_in, c_skip, c_out = (c.item() for c in coefficients("edm", time, 0.4, 2.0))
        z = (1 - t) * x + t * e
        assert abs((c_in * z).std() - 1) < 0.01
        assert abs(((x - c_skip * z) / c_out).std() - 1) < 0.01
        least = (x * z).mean() / z.square().mean()
        assert abs(c_skip - least) < 0.01


def test_scm_coefficients_turn_the_rotations_velocity_into_the_image() -> None:
    torch.manual_seed(0)
    x, e = torch.randn(2, 8, dtype=torch.float64)
    t = torch.rand(8, dtype=torch.float64)
    angle = torch.atan2(t, 1 - t)
    z = (1 - t) * x + t * e
    _, velocity = torch.func.jvp(lambda w: w.cos() * x + w.sin() * e, (angle,), (torch.ones_like(angle),))
    _, c_skip, c_out = coefficients("scm", t, 0.4, 2.0)
    torch.testing.assert_close(c_skip * z + c_out * velocity / 0.4, x)


@pytest.mark.parametrize("name", ["u", "edm", "scm, wide noise"])
def test_samples_follow_the_models_own_switches(model: PixelMeanFlow, name: str) -> None:
    config = replace(CONFIG, **MODEL_SWITCHES[name])
    model = copy.copy(model)
    model.config = config
    noise = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = pmf.sample(model, [1, 3], omega=2.0, interval=(0.2, 0.9), noise=noise)
    one = torch.ones(2, dtype=torch.float64)
    c_in, c_skip, c_out = coefficients(config.preconditioner, one, config.sigma_data, config.noise_scale)
    condition = one, 2 * one, 0.2 * one, 0.9 * one, torch.tensor([1, 3])
    params = dict(model.named_parameters())
    raw = network(params, c_in[0] * noise, *condition, num_heads=CONFIG.num_heads, head="u")
    output = c_skip[0] * noise + c_out[0] * raw
    torch.testing.assert_close(images, noise - output if config.prediction == "u" else output)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction": "eps"}, "prediction must be x or u, got 'eps'"),
        ({"preconditioner": "ddpm"}, "preconditioner must be none, edm or scm, got 'ddpm'"),
        ({"sigma_data": 0.0}, "sigma_data must be positive"),
        ({"prediction": "u", "preconditioner": "scm"}, "use it with prediction x"),
    ],
)
def test_impossible_models_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)
    if "sigma_data" in settings:
        with pytest.raises(ValueError, match="preconditioner: sigma_data must be positive"):
            EDMPreconditioner(**settings)
