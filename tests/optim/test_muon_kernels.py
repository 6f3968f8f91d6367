"""Muon with the CUDA kernels, on a GPU or emulated: the CPU's numbers, few launches, graph capture."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import emulator
from helpers.kernels import PLACES, at_place
from helpers.levels import EMULATED
from torch import Tensor, nn

from pmf.optim import Muon

GOLDEN = Path(__file__).parents[1] / "golden" / "muon.npz"
SHAPES = ((20, 70), (66, 30), (40, 40), (7,), (3, 4, 5), (1025,))


@pytest.fixture(params=PLACES)
def kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device whose tensors go to the CUDA kernels."""
    with at_place(request.param) as device:
        yield device


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def train(params: list[nn.Parameter], optimizer: Muon, steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def relative(value: Tensor, expected: Tensor) -> float:
    return ((value.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


def test_three_steps_are_the_authors(kernels):
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN).items()}
    params = {k[5:]: nn.Parameter(golden[k].clone().to(kernels)) for k in golden if k.startswith("init/")}
    optimizer = Muon(params.values(), lr=golden["learning_rate"].item(), compute_dtype=torch.float32)
    for step in range(3):
        for name, p in params.items():
            p.grad = golden[f"grad{step}/{name}"].to(kernels)
        optimizer.step()
    for name, p in params.items():
        start = golden[f"init/{name}"]
        moved = golden[f"param2/{name}"] - start
        assert relative(p.detach().cpu() - start, moved) < (3e-5 if p.dim() == 2 else 5e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": False, "adam_nesterov": False, "weight_decay": 0.1},
        {"preset": "moonlight", "nesterov": True},
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_steps_are_those_of_the_cpu(place, settings, dtype):
    """Up to float32 rounding: the momentum bit for bit, the rest up to the order of sums."""
    settings = {"lr": 0.02, "compute_dtype": torch.float32, **settings}
    with at_place(place) as device:
        ours = parameters(device, dtype)
        start = [p.detach().cpu().clone() for p in ours]
        by_kernels = Muon(ours, **settings)
        train(ours, by_kernels, range(3))
    theirs = parameters(torch.device("cpu"), dtype)
    plain = Muon(theirs, **settings)
    train(theirs, plain, range(3))
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        mine, other = by_kernels.state[p], plain.state[q]
        assert torch.equal(mine["momentum"].cpu(), other["momentum"])
        moved = other.get("master", q.detach()).float() - p0.float()
        assert relative(mine.get("master", p.detach()).cpu().float() - p0.float(), moved) < 2e-5
        assert "master" not in mine or torch.equal(p.detach(), mine["master"].to(dtype))


def test_a_half_precision_iteration_moves_almost_as_float32_does(kernels):
    half, single = parameters(kernels), parameters(kernels)
    start = [p.detach().clone() for p in half]
    train(half, Muon(half, lr=0.02), range(2))
    train(single, Muon(single, lr=0.02, compute_dtype=torch.float32), range(2))
    for p, q, p0 in zip(half, single, start, strict=True):
        assert relative(p.detach() - p0, (q.detach() - p0).cpu()) < 1e-2


def test_gradients_that_the_momentum_almost_cancels(kernels):
    """What is left is orthogonalised, though X's scale comes from a sample of the gradient."""
    moved = []
    for device in (kernels, torch.device("cpu")):
        p = nn.Parameter(torch.zeros(40, 70, device=device))
        optimizer = Muon([p], momentum=0.95, nesterov=False, compute_dtype=torch.float16)
        gradient, rest = (torch.randn(40, 70, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
        p.grad = gradient.to(device)
        optimizer.step()
        before = p.detach().clone()
        left = (rest * 2.0**-14 - 0.05 * gradient) / 0.95
        optimizer.state[p]["momentum"].copy_(left)
        optimizer.step()
        moved.append(p.detach() - before)
    assert relative(moved[0], moved[1].cpu()) < 1e-2


@pytest.mark.skipif(not EMULATED, reason="the emulator counts launches")
def test_a_step_of_pmf_b_16_is_at_most_30_launches():
    """As many matrices as pMF-B/16, in as many shapes, and its other parameters; sizes do not matter."""
    shapes = [(3, 4)] * 102 + [(3, 8)] * 72 + [(2, 4)] * 4 + [(4,)] * 200 + [(2, 2, 2)] * 10
    with at_place("emulated") as device:
        params = [nn.Parameter(torch.ones(s, device=device)) for s in shapes]
        optimizer = Muon(params)
        for p in params:
            p.grad = torch.ones_like(p)
        before = emulator.launches()
        optimizer.step()
        assert 0 < emulator.launches() - before <= 30


def test_learning_rate_and_weight_decay_are_read_on_the_device(kernels):
    """As when a captured graph is replayed: the same arguments, pointing to different numbers."""
    ours, theirs = parameters(kernels), parameters(kernels)
    lr, decay = (torch.tensor(x, dtype=torch.float64, device=kernels) for x in (0.1, 0.0))
    followed, told = Muon(ours, lr=lr, weight_decay=decay), Muon(theirs, lr=0.1)
    for step, (rate, share) in enumerate(((0.1, 0.0), (0.03, 0.5))):
        lr.fill_(rate)
        decay.fill_(share)
        for group in told.param_groups:
            group["lr"], group["weight_decay"] = rate, share
        for params, optimizer in ((ours, followed), (theirs, told)):
            train(params, optimizer, range(step, step + 1))
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_replaying_a_captured_step_takes_the_next_steps():
    device = torch.device("cuda")
    lr = torch.tensor(0.1, device=device)
    captured, eager = parameters(device), parameters(device)
    replayed, plain = Muon(captured, lr=lr), Muon(eager, lr=lr)
    for params, optimizer in ((captured, replayed), (eager, plain)):
        train(params, optimizer, range(1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    for rate in (0.1, 0.03):
        lr.fill_(rate)
        graph.replay()
        plain.step()
    assert all(map(torch.equal, captured, eager))
    assert replayed.state_dict()["state"][0]["step"] == plain.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_is_numbers_and_continues_bitwise(kernels, dtype):
    first = parameters(kernels, dtype)
    optimizer = Muon(first, lr=0.01)
    train(first, optimizer, range(1))
    set_gradients(first, 1)
    first[0].grad = first[3].grad = None  # step counts differ between parameters from here
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    steps = [entry["step"] for entry in state["state"].values()]
    assert steps == [1, 2, 2, 1, 2, 2] and all(isinstance(step, int) for step in steps)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = Muon(second, lr=0.5)
    resumed.load_state_dict(state)
    for params, each in ((first, optimizer), (second, resumed)):
        train(params, each, range(2, 4))
    assert all(map(torch.equal, first, second))


def test_zero_nan_and_absent_gradients(kernels):
    params = parameters(kernels)
    start = [p.detach().clone() for p in params]
    optimizer = Muon(params)
    for p in params[:-1]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, params, start))
    assert not optimizer.state[params[-1]]
    set_gradients(params, 0)
    params[0].grad[1, 1] = float("nan")
    kept = [p.grad.clone() for p in params]
    optimizer.step()
    assert params[0].isnan().all() and all(p.isfinite().all() for p in params[1:])
    torch.testing.assert_close([p.grad for p in params], kept, rtol=0, atol=0, equal_nan=True)


def test_masters_accumulate_steps_until_the_parameter_is_set_externally(kernels):
    params = parameters(kernels, torch.bfloat16)
    optimizer = Muon(params, lr=1e-5)
    train(params, optimizer, range(2))
    for p in params:
        assert not torch.equal(optimizer.state[p]["master"], p.detach().float())
    with torch.no_grad():
        for p in params:
            p.fill_(3)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in params:
        assert (p - 3).abs().max() < 0.1


def test_tensors_that_are_not_aligned(kernels):
    """Slices of one buffer starting at the fourth byte, where no 16-byte vector begins."""
    flat, gradient = (torch.randn(400, generator=torch.Generator().manual_seed(i)) for i in range(2))
    whole = [flat.to(kernels, copy=True)[1:391].view(shape) for shape in ((390,), (13, 30))]
    shifted = [nn.Parameter(x) for x in whole]
    aligned = [nn.Parameter(x.clone()) for x in whole]
    for params in (aligned, shifted):
        for p in params:
            p.grad = gradient.to(kernels)[3:393].view(p.shape)
        Muon(params).step()
    assert all(map(torch.equal, aligned, shifted))
