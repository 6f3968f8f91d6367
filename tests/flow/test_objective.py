"""The objective against a direct port of the paper's equations, in float64, on batches of every case."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.tolerance import error
from torch import Tensor

from pmf.flow import (
    ClassifierFreeGuidance,
    Draws,
    IntervalGuidance,
    NoPreconditioner,
    Objective,
    PlaneTimes,
    XPrediction,
)
from pmf.models import ModelConfig, PixelMeanFlow
from pmf.reference.objective import ObjectiveValues
from pmf.reference.objective import objective as plain_objective

CONFIG = ModelConfig(
    num_classes=5,
    image_size=8,
    patch_size=2,
    channels=2,
    hidden_size=32,
    depth=4,
    head_depth=2,
    num_heads=2,
    condition_tokens=(2, 1, 1, 2, 3),
    bottleneck=12,
)
# Both sides compute the same equations in float64, in different orders: only rounding may differ.
FLOAT64_TOLERANCE = 1e-10
# Rounding through a dozen layers, and division by t as small as 0.05.
FLOAT32_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> PixelMeanFlow:
    """Random weights everywhere: initially gates and heads are zero and would hide most mistakes."""
    torch.manual_seed(0)
    model = PixelMeanFlow(CONFIG).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(draws: dict[str, list[float]]) -> tuple[Tensor, Tensor, Draws]:
    generator = torch.Generator().manual_seed(1)
    size = len(draws["t"])
    shape = (size, CONFIG.channels, CONFIG.image_size, CONFIG.image_size)
    images = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-1, 1)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(CONFIG.num_classes, (size,), generator=generator)
    t, r, omega, t_min, t_max = (
        torch.tensor(draws[name], dtype=torch.float64) for name in ("t", "r", "omega", "t_min", "t_max")
    )
    return (
        images,
        labels,
        Draws(t, r, noise, omega, t_min, t_max, torch.tensor(draws["drop"], dtype=torch.bool)),
    )


FLOW_MATCHING = {"t": 0.6, "r": 0.6, "omega": 3.0, "t_min": 0.0, "t_max": 1.0, "drop": False}
MEANFLOW = {"t": 0.7, "r": 0.2, "omega": 4.0, "t_min": 0.3, "t_max": 0.9, "drop": False}
SAMPLES = {
    "flow matching": FLOW_MATCHING,
    "meanflow": MEANFLOW,
    "flow matching, dropped": {**FLOW_MATCHING, "drop": True},
    "meanflow, dropped": {**MEANFLOW, "drop": True},
    "meanflow, above its interval": {**MEANFLOW, "t": 0.95},
    "meanflow, below its interval, dropped": {**MEANFLOW, "t": 0.25, "drop": True},
    "meanflow, early": {**MEANFLOW, "t": 0.04, "r": 0.01, "t_min": 0.0},
    "meanflow, earlier than its interval and the clip": {**MEANFLOW, "t": 0.03, "r": 0.0},
    "flow matching, early": {**FLOW_MATCHING, "t": 0.02, "r": 0.02},
    "flow matching, omega 1": {**FLOW_MATCHING, "omega": 1.0},
    "meanflow, omega 1": {**MEANFLOW, "omega": 1.0},
    "flow matching, interval not whole": {**FLOW_MATCHING, "t_min": 0.2, "t_max": 0.5},
    "flow matching, interval not whole, dropped": {**FLOW_MATCHING, "t_min": 0.2, "drop": True},
    "at the ends of time": {**MEANFLOW, "t": 1.0, "r": 0.0, "t_max": 1.0},
    "on the edge of its interval": {**MEANFLOW, "t": 0.9, "r": 0.8},
}
BATCHES = {name: [name] for name in SAMPLES} | {
    "all flow matching": ["flow matching", "flow matching, dropped", "flow matching, early"],
    "no flow matching": ["meanflow", "meanflow, dropped", "meanflow, early"],
    "all dropped": ["flow matching, dropped", "meanflow, dropped"],
    "every case": list(SAMPLES),
    "every case, other order": list(SAMPLES)[::-1],
}


def compare(
    model: PixelMeanFlow,
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    draws: Draws,
    **switches: Any,
) -> None:
    """Compare loss, its terms and all gradients; `switches` configure the plain side."""
    params = dict(model.named_parameters())
    plain = plain_objective(
        params,
        images,
        labels,
        **draws._asdict(),
        num_heads=CONFIG.num_heads,
        norm_p=objective.norm_p,
        norm_eps=objective.norm_eps,
        **switches,
    )
    terms = objective(model, images, labels, draws)
    needs_tangent = draws.r != draws.t
    for name in ObjectiveValues._fields:
        ours, theirs = getattr(terms, name), getattr(plain, name)
        if name in ("v_tangent", "du_dt"):
            assert not ours[~needs_tangent].any()
            ours, theirs = ours[needs_tangent], theirs[needs_tangent]
        torch.testing.assert_close(ours, theirs, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE, msg=name)

    expected = torch.autograd.grad(plain.loss, list(params.values()), allow_unused=True)
    actual = torch.autograd.grad(terms.loss, list(params.values()), materialize_grads=True)
    for name, ours, theirs in zip(params, actual, expected, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE, msg=name)


def batch_of(name: str) -> tuple[Tensor, Tensor, Draws]:
    rows = [SAMPLES[sample] for sample in BATCHES[name]]
    return batch({key: [row[key] for row in rows] for key in FLOW_MATCHING})


@pytest.mark.parametrize("name", BATCHES)
def test_agrees_with_the_plain_port(model: PixelMeanFlow, name: str) -> None:
    compare(model, Objective(), *batch_of(name))


@pytest.mark.parametrize("name", [name for name, samples in BATCHES.items() if len(samples) > 1])
def test_agrees_with_blocks_checkpointed_and_rows_rounded_up(
    model: PixelMeanFlow, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "checkpointing", "blocks")
    compare(model, Objective(row_multiple=4), *batch_of(name))


@pytest.mark.parametrize("name", [name for name, samples in BATCHES.items() if len(samples) > 1])
def test_float32_agrees_with_the_plain_port_in_float64(model: PixelMeanFlow, name: str) -> None:
    images, labels, draws = batch_of(name)
    params = dict(model.named_parameters())
    plain = plain_objective(params, images, labels, **draws._asdict(), num_heads=CONFIG.num_heads)
    expected = torch.autograd.grad(plain.loss, list(params.values()), allow_unused=True)

    single = PixelMeanFlow(CONFIG)
    single.load_state_dict(model.state_dict())
    narrow = Draws(*(f.float() if f is not None and f.is_floating_point() else f for f in draws))
    terms = Objective()(single, images.float(), labels, narrow)
    terms.loss.backward()
    assert error(terms.loss_u, plain.loss_u.detach()) < FLOAT32_TOLERANCE
    assert error(terms.loss_v, plain.loss_v.detach()) < FLOAT32_TOLERANCE
    for (name, parameter), gradient in zip(single.named_parameters(), expected, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        assert error(parameter.grad, gradient) < FLOAT32_TOLERANCE, name


@pytest.mark.parametrize("norm_p", [0.0, 0.5, 1.0])
def test_agrees_on_its_own_draws_with_any_norm(
    model: PixelMeanFlow, norm_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "config", replace(CONFIG, noise_scale=2.0))
    images, labels, _ = batch({key: [value] * 8 for key, value in FLOW_MATCHING.items()})
    objective = Objective(norm_p=norm_p, norm_eps=0.1, class_dropout=0.5, noise_scale=2.0)
    draws = objective.draw(images, labels, torch.Generator().manual_seed(2))
    draws = draws._replace(**{f: getattr(draws, f).double() for f in ("t", "r", "omega", "t_min", "t_max")})
    compare(model, objective, images, labels, draws)


class ByImages(XPrediction):
    """The paper's prediction as a generic one: the objective uses one kernel for the paper's own class."""


class Identity(NoPreconditioner):
    """Likewise."""


@pytest.mark.parametrize("other", [{"prediction": ByImages()}, {"preconditioner": Identity()}])
def test_a_users_own_prediction_or_preconditioner(model: PixelMeanFlow, other: dict[str, Any]) -> None:
    compare(model, Objective(**other), *batch_of("every case"))


def test_a_subclass_with_local_annotations() -> None:
    class Local: ...

    @dataclass(frozen=True)
    class Mine(Objective):
        extra: "Local | None" = None  # a name that only this function knows

    assert Mine(norm_p=0.5).norm_p == 0.5
    with pytest.raises(ValueError, match="norm_p must be a finite number"):
        Mine(norm_p="1")  # type: ignore[arg-type]


def test_a_class_is_not_accepted_as_its_instance() -> None:
    with pytest.raises(ValueError, match="times must be a TimeSampling"):
        Objective(times=PlaneTimes)  # type: ignore[arg-type]


def test_order_of_the_batch_does_not_matter(model: PixelMeanFlow) -> None:
    draws = {key: [row[key] for row in SAMPLES.values()] for key in FLOW_MATCHING}
    images, labels, d = batch(draws)
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    terms = Objective()(model, images, labels, d)
    permuted = Objective()(
        model, images[mixed], labels[mixed], Draws(*(None if f is None else f[mixed] for f in d))
    )
    torch.testing.assert_close(permuted.loss_u, terms.loss_u, rtol=FLOAT64_TOLERANCE, atol=0)
    for name in ("v_target", "v_tangent", "u", "du_dt", "v"):
        torch.testing.assert_close(
            getattr(permuted, name),
            getattr(terms, name)[mixed],
            rtol=FLOAT64_TOLERANCE,
            atol=FLOAT64_TOLERANCE,
        )


class CountingModel(PixelMeanFlow):
    """Counts samples by the work done for them."""

    def forward(self, images: Tensor, condition, images_t=None, h_t=None, *, heads="u", as_tokens=False):  # type: ignore[no-untyped-def]
        self.counts[heads] = self.counts.get(heads, 0) + len(images)
        self.counts["tangents"] = self.counts.get("tangents", 0) + (0 if images_t is None else len(images_t))
        return super().forward(images, condition, images_t, h_t, heads=heads, as_tokens=as_tokens)


@pytest.mark.parametrize(
    ("rows", "guidance", "tangents"),
    [
        (["flow matching"] * 3, 3, 0),  # v_u only: v_c is the training pass's own
        (["flow matching, dropped"] * 3, 0, 0),
        (["flow matching, omega 1"] * 3, 0, 0),
        (["meanflow"] * 3, 6, 3),
        (["meanflow, dropped", "meanflow, omega 1", "meanflow, above its interval"], 3, 3),  # v_c only
        (["flow matching, interval not whole"], 2, 0),
    ],
)
def test_computes_only_what_affects_the_result(rows: list[str], guidance: int, tangents: int) -> None:
    model = CountingModel(CONFIG).double()
    model.counts = {}
    Objective()(model, *batch({key: [SAMPLES[row][key] for row in rows] for key in FLOW_MATCHING}))
    assert model.counts.get("v", 0) == guidance
    assert model.counts["tangents"] == tangents
    assert model.counts["uv"] == len(rows)


@pytest.mark.parametrize(
    ("rows", "guidance", "tangents"),
    [
        (["meanflow"] * 3 + ["flow matching"] * 2, 8, 4),  # already 3 v_c and 5 v_u; one more tangent
        (["meanflow"] * 3, 8, 3),  # no more tangents than samples
        (["meanflow"] * 5 + ["flow matching, dropped"] * 3, 12, 8),  # 10 of 12, 5 of 8
        (["flow matching, dropped"] * 3, 0, 0),  # zero rows stay zero
    ],
)
def test_rows_are_rounded_up(rows: list[str], guidance: int, tangents: int) -> None:
    model = CountingModel(CONFIG).double()
    model.counts = {}
    given = batch({key: [SAMPLES[row][key] for row in rows] for key in FLOW_MATCHING})
    Objective(row_multiple=4)(model, *given)
    assert (model.counts.get("v", 0), model.counts["tangents"]) == (guidance, tangents)


def test_gradients_reach_neither_targets_nor_tangents(model: PixelMeanFlow) -> None:
    images, labels, draws = batch({key: [MEANFLOW[key]] * 2 for key in MEANFLOW})
    terms = Objective()(model, images, labels, draws)
    for name in ("v_target", "v_tangent", "u", "du_dt", "v", "loss_u", "loss_v"):
        assert not getattr(terms, name).requires_grad, name
    assert terms.loss.requires_grad


def test_bfloat16_model_follows_the_float32_one() -> None:
    torch.manual_seed(4)
    model = PixelMeanFlow(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.bfloat16().float()  # the same weights on both sides
    images, labels, draws = batch({key: [row[key] for row in SAMPLES.values()] for key in FLOW_MATCHING})
    images, draws = (
        images.float(),
        Draws(*(f.float() if f is not None and f.is_floating_point() else f for f in draws)),
    )
    exact = Objective()(model, images, labels, draws)
    half = PixelMeanFlow(CONFIG).bfloat16()
    half.load_state_dict(model.state_dict())
    rounded = Objective()(half, images, labels, draws)
    assert rounded.loss.dtype == rounded.u.dtype == rounded.v_target.dtype == torch.float32
    unit = torch.finfo(torch.bfloat16).eps
    for name in ("u", "v", "v_target"):
        expected = getattr(exact, name)
        # A dozen rounded operations in a row, amplified by the division by t.
        assert (getattr(rounded, name) - expected).norm() < 8 * unit * expected.norm(), name


def test_inconsistent_batches_are_rejected() -> None:
    model = PixelMeanFlow(CONFIG)
    images, labels = torch.zeros(3, 2, 8, 8), torch.zeros(3, dtype=torch.long)
    objective = Objective()
    draws = objective.draw(images, labels)
    with pytest.raises(
        ValueError, match=r"noise must be like the images, .* \[2, 2, 8, 8\], got .* \[3, 2, 8, 8\]"
    ):
        objective(model, images[:2], labels[:2], draws)
    with pytest.raises(ValueError, match=r"labels must have shape \[3\], got \[2\]"):
        objective(model, images, labels[:2], draws)
    with pytest.raises(ValueError, match=r"omega must have shape \[3\], got \[2\]"):
        objective(model, images, labels, draws._replace(omega=draws.omega[:2]))
    for impossible in ({"r": draws.t, "t": draws.r - 0.1}, {"omega": draws.omega / 9}, {"t": draws.t + 1}):
        with pytest.raises(ValueError, match="draws must have 0 <= r <= t <= 1 and omega >= 1"):
            objective(model, images, labels, draws._replace(**impossible))
    for wrong in ((list(images), labels, draws), (images, labels.tolist(), draws), (images, labels, None)):
        with pytest.raises(TypeError, match="objective: (images|labels|draws) must be a"):
            objective(model, *wrong)
    for image in (images.to(torch.uint8), images[0]):
        with pytest.raises(ValueError, match=r"objective: images must be float32 \[B, C, H, W\], got"):
            objective.draw(image, labels)
    with pytest.raises(TypeError, match="labels must be a Tensor, got Generator"):  # as in MeanFlow.draw
        objective.draw(images, torch.Generator())
    with pytest.raises(TypeError, match="the model must be a PixelMeanFlow, got Linear"):
        objective(torch.nn.Linear(2, 2), images, labels, draws)
    with pytest.raises(
        ValueError, match=r"images must be float32 \[B, 2, 8, 8\], got torch.float32 \[3, 2, 4, 8\]"
    ):
        objective(model, images[:, :, :4], labels, draws)
    with pytest.raises(ValueError, match=r"draws.drop must be boolean, got torch.int64"):
        objective(model, images, labels, draws._replace(drop=draws.drop.long()))
    with pytest.raises(ValueError, match="labels must be int64"):
        objective(model, images, labels.float(), draws)
    with pytest.raises(ValueError, match=r"labels must lie in 0..4, got 0..5"):
        objective(model, images, torch.tensor([0, 5, 1]), draws)
    with pytest.raises(ValueError, match="images must be float32"):
        objective(model, images.long(), labels, draws)
    with pytest.raises(ValueError, match="noise_scale is 2.0 but the model samples with 1.0"):
        Objective(noise_scale=2.0)(model, images, labels, draws)
    with pytest.raises(RuntimeError, match="no v head"):
        objective(PixelMeanFlow(replace(CONFIG, v_head=False)), images, labels, draws)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_scale": 0.0}, "noise_scale must be a finite number, greater than 0, got 0.0"),
        ({"noise_scale": float("nan")}, "noise_scale must be a finite number"),
        ({"noise_scale": "1"}, "noise_scale must be a finite number"),
        ({"norm_p": -5.0}, "norm_p must be a finite number, at least 0, got -5.0"),
        ({"norm_eps": 0.0}, "norm_eps must be a finite number, greater than 0"),
        ({"class_dropout": 1.5}, "class_dropout must be a finite number, at least 0 and at most 1"),
        ({"prediction": "y"}, "prediction must be x or u, or a Prediction, got 'y'"),
        ({"times": "plane"}, "times must be a TimeSampling, got 'plane'"),
        ({"guidance": "none"}, "guidance must be a Guidance, got 'none'"),
        (
            {"guidance": ClassifierFreeGuidance(2.0, 0.5)},
            "ClassifierFreeGuidance is a guidance of",
        ),
        ({"perceptual": "vgg"}, "perceptual must be a Perceptual or empty, got 'vgg'"),
        ({"v_head": "no"}, "v_head must be true or false, got 'no'"),
        ({"row_multiple": 0}, "row_multiple must be a finite number, at least 1"),
        ({"row_multiple": 1.5}, "row_multiple must be a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


def test_times_and_guidance_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="data_proportion must be a finite number, at least 0 and at most 1"):
        PlaneTimes(data_proportion=-0.1)
    with pytest.raises(ValueError, match="std must be a finite number, at least 0"):
        PlaneTimes(std=-1.0)
    with pytest.raises(ValueError, match="max_omega must be a finite number, at least 1"):
        IntervalGuidance(max_omega=0.5)
    with pytest.raises(ValueError, match="beta -1e\\+09 is too low"):
        IntervalGuidance(beta=-1e9)
    with pytest.raises(ValueError, match="interval must be two numbers"):
        ClassifierFreeGuidance(interval=(0.9, 0.1))
