"""torch.compile of the whole network in training: its losses, and how many graphs it needs."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.inductor import requires_inductor
from torch import Tensor

from pmf import PixelMeanFlow, create_model, optim
from pmf.flow import Objective, PlaneTimes

BATCH = 6


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graphs from other tests, and one thread: on work this small, two only wait for each other."""
    torch.compiler.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


@pytest.fixture
def model() -> PixelMeanFlow:
    """A small network with every part active: no zero gates, no zero final layer."""
    torch.manual_seed(0)
    model = create_model(
        num_classes=5, image_size=8, patch_size=2, channels=2, hidden_size=32, depth=2, head_depth=1,
        num_heads=2, condition_tokens=(2, 1, 1, 2, 3), bottleneck=12, mlp_width=48,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batches(count: int, objective: Callable[[int], Objective]) -> Iterator[tuple[Any, ...]]:
    """The objective, images, labels and draws of each step."""
    generator = torch.Generator().manual_seed(3)
    for step in range(count):
        images = torch.rand(BATCH, 2, 8, 8, generator=generator) * 2 - 1
        labels = torch.randint(5, (BATCH,), generator=generator)
        yield objective(step), images, labels, objective(step).draw(images, labels, generator)


def gradients(model: PixelMeanFlow) -> Tensor:
    return torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])


def train(model: PixelMeanFlow, network: Any, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """loss_u and loss_v of every step, the first step's gradients, and the size of every du/dt."""
    optimizer = optim.Muon(model, lr=1e-3)
    losses, sizes, first = [], [], None
    for objective, images, labels, draws in batches(steps, lambda step: Objective()):
        terms = objective(network, images, labels, draws)
        terms.loss.backward()
        first = gradients(model) if first is None else first
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack((terms.loss_u, terms.loss_v)).float())
        sizes.append(terms.du_dt.norm())
    assert first is not None
    return torch.stack(losses), first, torch.stack(sizes)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).abs() / expected.abs()).max())


# Only rounding differs: Inductor fuses elementwise operations and rounds once for many.
LIMITS = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (3e-2, 3e-2)}


@requires_inductor
@pytest.mark.parametrize("dtype", LIMITS)
def test_compiled_training_follows_eager(model: PixelMeanFlow, dtype: torch.dtype) -> None:
    steps = 20
    eager, compiled = model.to(dtype), copy.deepcopy(model).to(dtype)
    losses, first, sizes = train(eager, eager, steps)
    found = train(compiled, torch.compile(compiled, fullgraph=True), steps)
    of_losses, of_gradients = LIMITS[dtype]
    assert relative(found[0], losses) < of_losses
    assert float((found[1] - first).norm() / first.norm()) < of_gradients
    assert sizes.min() > 1  # a lost tangent would be zero
    assert relative(found[2], sizes) < 10 * of_losses
    assert relative(losses[1:], losses[:-1]) > 10 * of_losses  # the steps differ by more than the limits


def test_all_kinds_of_batches_fit_in_torch_compiles_limit_of_graphs(model: PixelMeanFlow) -> None:
    """The row counts of guidance and tangents vary between steps; few of them need a new graph."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    network = torch.compile(model, fullgraph=True, backend=count)
    shares, dropouts = (0.5, 0.0, 1.0, 0.3, 0.7, 0.9), (0.1, 1.0, 0.0, 0.5)

    def objective(step: int) -> Objective:
        times = PlaneTimes(data_proportion=shares[step % 6], uniform_fraction=0.5)
        return Objective(times=times, class_dropout=dropouts[step % 4])

    after = []
    for objective_, images, labels, draws in batches(60, objective):
        terms = objective_(network, images, labels, draws)
        expected = objective_(model, images, labels, draws)
        torch.testing.assert_close(terms.loss_u, expected.loss_u)
        torch.testing.assert_close(terms.du_dt, expected.du_dt)
        after.append(len(graphs))
    assert after[-1] == after[30], after
    assert after[-1] <= torch._dynamo.config.recompile_limit, after
