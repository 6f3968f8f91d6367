"""torch.compile around the optimizer: the compiled step equals the eager one, bit for bit."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pmf.optim import EMA, Muon

SHAPES = {
    "one matrix": [(16, 32)],
    "two matrices of one shape": [(16, 32), (16, 32)],
    "three square matrices": [(16, 16)] * 3,
    "two shapes": [(16, 32), (8, 8)],
    "matrices, vectors and a convolution": [(16, 32), (16,), (16, 32), (4, 3, 2, 2), (16,)],
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="eager")


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("preset", ["pmf", "torch"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_compiled_step_equals_the_eager_one(name, preset):
    """Two matrices of the same shape were silently off by hundreds of steps."""
    ours, theirs = parameters(SHAPES[name]), parameters(SHAPES[name])
    first, second = Muon(ours, lr=0.02, preset=preset), Muon(theirs, lr=0.02, preset=preset)
    step = compiled(first.step)
    for k in range(4):
        for params, each in ((ours, step), (theirs, second.step)):
            set_gradients(params, k)
            if k == 2:
                params[0].grad = None
            each()
    assert all(map(torch.equal, ours, theirs))
    assert first.state_dict()["state"].keys() == second.state_dict()["state"].keys()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
    ],
)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("together", [True, False])
def test_a_schedule_changes_the_compiled_steps_rate(together, lr, schedule):
    """Compiled as one function with the schedule and the average, or separately."""

    def trained(
        around: Callable[..., Any],
    ) -> tuple[list[nn.Parameter], dict[str, torch.Tensor], list[float]]:
        params = parameters([(6, 4), (6, 4), (5,)])
        optimizer = Muon(params, lr=copy.deepcopy(lr))
        scheduler, ema = schedule(optimizer), EMA([(f"{i}", p) for i, p in enumerate(params)], (0.1,))

        def step() -> None:
            optimizer.step()
            scheduler.step()
            ema.update(100)

        parts = (around(step),) if together else (around(optimizer.step), scheduler.step, around(ema.update))
        rates = []
        for k in range(4):
            set_gradients(params, k)
            for part in parts:
                part(*((100,) if part is parts[-1] and not together else ()))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        assert ema.updates == 4
        return params, ema.weights(0.1), rates

    ours, averages, rates = trained(compiled)
    theirs, expected, their_rates = trained(lambda function: function)
    assert rates == their_rates and len(set(rates)) > 1
    assert all(map(torch.equal, ours, theirs))
    assert all(torch.equal(averages[name], expected[name]) for name in expected)


def test_a_compiled_training_step_with_a_closure():
    """Everything under torch.compile: loss, gradients and step."""

    def trained(around: Callable[..., Any]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        optimizer, x = Muon(model, lr=0.05), torch.randn(5, 4)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            return loss

        step = around(lambda: optimizer.step(closure))
        losses = [step().detach() for _ in range(4)]
        return [*losses, *(p.detach() for p in model.parameters())]

    for value, expected in zip(trained(compiled), trained(lambda function: function), strict=True):
        torch.testing.assert_close(value, expected)


def test_fullgraph_says_why_it_cannot_contain_the_step():
    params = parameters([(4, 4)])
    set_gradients(params, 0)
    optimizer, start = Muon(params), params[0].detach().clone()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Muon.step"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    assert torch.equal(params[0], start)


def test_importing_the_optimizer_does_not_import_dynamo():
    """Importing it takes seconds: torch.compiler.disable as a decorator would."""
    code = "import sys, pmf.optim; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
