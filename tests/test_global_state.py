"""Draws and results do not depend on PyTorch's global state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.ops import CASES
from torch import Tensor

import pmf
from pmf import metrics, ops
from pmf.data import image_grid
from pmf.defaults import factory_defaults, home, normal, uniform, whole_numbers
from pmf.flow import LineTimes, NoGuidance, Objective, PlaneTimes, Sampler
from pmf.optim import EMA, Muon
from pmf.perceptual.crop import crop_and_resize, draw_crops
from pmf.sampling import draw_by_seed
from pmf.toy.shapes import SHAPES, draw_plane, draw_points


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    """Uninitialised memory is filled with NaN, too."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], Any]] = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "another device by default": lambda: default_device("meta"),
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
NO_AUTOCAST = [name for name in STATES if name != "autocast"]


def g() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(3)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=g(), dtype=dtype, device="cpu")


IMAGES, LABELS = tensor(6, 1, 8, 8).clamp(-1, 1), torch.arange(6)
SMALL = {"hidden_size": 32, "depth": 2, "head_depth": 1, "num_heads": 2, "bottleneck": 4}


def model() -> pmf.PixelMeanFlow:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pmf.create_model(
            "pmf-b/16",
            num_classes=6,
            image_size=8,
            patch_size=4,
            channels=1,
            condition_tokens=(1,) * 5,
            **SMALL,
        )


MODEL = model()
with torch.no_grad():
    for parameter in MODEL.parameters():  # as after training: no layer's output is zero
        parameter += 0.1 * torch.randn(parameter.shape, generator=g())


def equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.device == expected.device
        assert torch.equal(found, expected), (found.double() - expected.double()).abs().max()
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            equal(a, b)
    else:
        assert found == expected


DRAWS: dict[str, Callable[[], Any]] = {
    "objective": lambda: Objective(noise_scale=2.0).draw(IMAGES, LABELS, g()),
    "objective, float64": lambda: Objective().draw(IMAGES.double(), LABELS, g()),
    "objective, other times": lambda: Objective(
        times=PlaneTimes(uniform_fraction=0.5), guidance=NoGuidance()
    ).draw(IMAGES, LABELS, g()),
    "line": lambda: LineTimes().draw(7, g()),
    "crops": lambda: draw_crops(5, 64, g()),
    "pictures by seed": lambda: draw_by_seed(Sampler(MODEL), [1, 2], [5, 6]),
    "plane": lambda: draw_plane(5, g()),
    **{shape: lambda shape=shape: draw_points(shape, 9, g()) for shape in SHAPES},
    "uniform": lambda: uniform(3, 2, generator=g()),
    "normal": lambda: normal(3, generator=g(), dtype=torch.float64),
    "whole numbers": lambda: whole_numbers(9, 4, generator=g()),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_same(name, state):
    expected = DRAWS[name]()
    with STATES[state]():
        found = DRAWS[name]()
    equal(found, expected)


def test_draws_of_the_global_generator_are_the_same():
    """A default on another device does not draw from that device's generator."""
    torch.manual_seed(5)
    expected = Objective().draw(IMAGES, LABELS)
    for state in STATES.values():
        torch.manual_seed(5)
        with state():
            equal(Objective().draw(IMAGES, LABELS), expected)


def test_draws_from_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        draws = Objective().draw(IMAGES, LABELS, g())
    Objective()(MODEL, IMAGES, LABELS, draws).loss.backward()
    equal(list(draws), list(Objective().draw(IMAGES, LABELS, g())))


def test_a_seed_is_not_a_generator():
    for draw in (lambda: pmf.sample(MODEL, [0], generator=0), lambda: Objective().draw(IMAGES, LABELS, 0)):
        with pytest.raises(TypeError, match=r"a torch.Generator or None, got 0: .*manual_seed\(SEED"):
            draw()


def test_a_generator_draws_where_it_is():
    class Elsewhere:
        device = torch.device("cuda", 1)

    assert home(Elsewhere()) == torch.device("cuda", 1)  # type: ignore[arg-type]
    assert home(None) == torch.device("cpu")


@pytest.mark.parametrize("state", NO_AUTOCAST)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ops_are_the_same(case, state):
    for dtype in (torch.float32, torch.float64):
        args = [x if x.dtype == torch.bool else x.to(dtype) for x in (*case.args, *case.directions())]
        plain = args[: len(case.args)]

        def outputs(plain=plain, args=args) -> Any:
            return case.plain(ops)(*plain), case.jvp(ops)(*args), case.jvp(ops, detach_tangent=True)(*args)

        def gradients(args=args) -> Any:
            leaves = [x.clone().requires_grad_() for x in args]
            torch.autograd.backward([y.sum() for y in case.jvp(ops)(*leaves)])
            return [x.grad for x in leaves]

        expected, expected_gradients = outputs(), gradients()
        with STATES[state]():
            equal(outputs(), expected)
            if state not in ("inference", "no gradients"):
                equal(gradients(), expected_gradients)


def steps(optimizer: Callable[..., Any]) -> list[Tensor]:
    """Three steps of a matrix and a vector, and their averages."""
    params = [torch.nn.Parameter(tensor(6, 4)), torch.nn.Parameter(tensor(5).bfloat16())]
    made, average = optimizer(params), EMA([(str(i), p) for i, p in enumerate(params)], (0.1,))
    for _ in range(3):
        for p in params:
            p.grad = torch.sin(p.detach().float()).to(p.dtype)
        made.step()
        average.update(10)
    return [*(p.detach() for p in params), *average.weights(0.1).values()]


def differentiable() -> Tensor:
    """The plain iteration, which autograd follows."""
    with torch.inference_mode(False), torch.enable_grad():
        return ops.newton_schulz(tensor(6, 4).requires_grad_()).detach()


COMPUTED: dict[str, Callable[[], Any]] = {
    "newton_schulz": lambda: ops.newton_schulz(tensor(3, 6, 4)),
    "newton_schulz, bfloat16": lambda: ops.newton_schulz([tensor(4, 9).bfloat16(), tensor(5, 5)]),
    "newton_schulz, differentiable": differentiable,
    "sample": lambda: pmf.sample(MODEL, [0, 1, 5], 2, generator=g()),
    "sample, numbers": lambda: pmf.sample(MODEL, [0, 1], 1, [1.5, 2.0], (0.2, 0.8), noise=tensor(2, 1, 8, 8)),
    "muon": lambda: steps(lambda p: Muon(p, lr=0.1, weight_decay=0.1)),
    "muon, as torch": lambda: steps(lambda p: Muon(p, lr=0.1, preset="torch")),
    "crop": lambda: crop_and_resize(tensor(2, 3, 9, 9), torch.tensor([[0, 1, 5, 7]] * 2, device="cpu"), 6),
    "frechet": lambda: metrics.frechet_distance(tensor(9, 4), tensor(9, 4) + 1),
    "wasserstein": lambda: metrics.sliced_wasserstein(tensor(9, 2), tensor(7, 2) + 1),
    "recall": lambda: metrics.recall(tensor(9, 4), tensor(9, 4) + 0.1),
    "grid": lambda: image_grid(tensor(4, 1, 5, 5), 2),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_is_the_same(name, state):
    expected = COMPUTED[name]()
    with STATES[state]():
        found = COMPUTED[name]()
    equal(found, expected)


@pytest.mark.parametrize("state", [name for name in NO_AUTOCAST if name not in ("inference", "no gradients")])
def test_losses_and_gradients_are_the_same(state):
    objective = Objective()
    draws = objective.draw(IMAGES, LABELS, g())

    def found() -> list[Tensor]:
        MODEL.zero_grad()
        terms = objective(MODEL, IMAGES, LABELS, draws)
        terms.loss.backward()
        return [
            terms.loss.detach(),
            terms.loss_u,
            terms.loss_v,
            *(p.grad.clone() for p in MODEL.parameters()),
        ]

    expected = found()
    with STATES[state]():
        equal(found(), expected)


@pytest.mark.parametrize("state", ["inference", "no gradients"])
def test_losses_without_gradients_are_the_same(state):
    objective = Objective()
    draws = objective.draw(IMAGES, LABELS, g())
    expected = objective(MODEL, IMAGES, LABELS, draws)
    with STATES[state]():
        found = objective(MODEL, IMAGES, LABELS, draws)
    assert found.loss.item() == expected.loss.item()


def test_a_model_follows_the_defaults_as_modules_do():
    with default_dtype(torch.float64), torch.device("meta"):
        made = model()
    assert {p.dtype for p in made.parameters()} == {torch.float64} and all(
        p.is_meta for p in made.parameters()
    )


def test_newton_schulz_in_inference_mode_may_use_all_threads():
    """Worker threads are not in inference mode: they raised when writing to the results."""
    matrices, before = [tensor(6, 4), tensor(64, 96)], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = ops.newton_schulz(matrices)
        with torch.inference_mode():
            equal(ops.newton_schulz([x.clone() for x in matrices]), expected)
    finally:
        torch.set_num_threads(before)


def test_factory_defaults_are_restored():
    with default_dtype(torch.float64), default_device("meta"):
        with pytest.raises(KeyError), factory_defaults():
            assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
            raise KeyError
        assert torch.zeros(1).dtype == torch.float64 and torch.zeros(1).is_meta
