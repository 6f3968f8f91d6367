"""Tangents of the first n of B samples equal torch.func.jvp's for these samples, at the cost of n."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import NETWORKS, Block, Problem, encoder, jvp_math
from helpers.products import Counted, products
from helpers.spelled import SPELLED, Spelled, complex_numbers
from helpers.tolerance import assert_close
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pmf
from pmf.tangents.samples import FirstSamples

EXACT = 1e-10
DOUBLE = torch.float64


@pytest.fixture
def completions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The values whose tangents were completed for all samples."""
    found: list[Any] = []
    complete = FirstSamples._complete

    def noted(self: FirstSamples, x: Tensor, *rest: Any) -> Tensor:
        found.append(x.shape)
        return complete(self, x, *rest)

    monkeypatch.setattr(FirstSamples, "_complete", noted)
    return found


def padded(t: Tensor, batch: int) -> Tensor:
    return torch.cat((t, t.new_zeros(batch - len(t), *t.shape[1:])))


def check(problem: Problem, count: int, mixes: bool = False, jvp: Any = None) -> None:
    """Against torch.func.jvp of the first samples, or of all with zero tangents if samples mix."""
    network, primals, constants = problem
    first = tuple(t[:count] for t in problem.tangents())
    if mixes:
        whole = tuple(padded(t, len(x)) for t, x in zip(first, primals, strict=True))
        wanted_t = jvp_math(network, primals, whole, **constants)[1]
    else:
        some = {k: x[:count] if len(x) == len(primals[0]) else x for k, x in constants.items()}
        wanted_t = jvp_math(network, tuple(x[:count] for x in primals), first, **some)[1]
    jvp = pmf.Jvp(network) if jvp is None else jvp
    out, out_t = jvp(primals, first, **constants)
    wanted = network(*primals, **constants)
    assert_close(out, wanted, EXACT)
    assert wanted_t.abs().sum() > 0
    assert_close(out_t, wanted_t[:count], EXACT)
    weights = [w for w in network.parameters() if w.requires_grad]

    def gradients(out: Tensor, out_t: Tensor) -> Any:
        target = out + 0.3 * padded(out_t, len(out)).detach()
        return torch.autograd.grad(target.square().sum(), weights, allow_unused=True)

    for found, expected in zip(gradients(out, out_t), gradients(wanted, wanted_t[:count]), strict=True):
        if expected is not None:
            assert_close(found, expected, EXACT)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, count: int, completions: list[Any]):
    problem = NETWORKS[name](DOUBLE)
    check(problem, min(count, len(problem.primals[0]) - 1))
    # nn.MultiheadAttention puts tokens before samples, so the first samples are not contiguous in memory.
    assert bool(completions) == (name in ("encoder", "encoder, eval", "transformer"))


def images(*layers: nn.Module) -> Problem:
    return Problem(nn.Sequential(*layers).to(DOUBLE), (torch.randn(3, 2, 8, 8, dtype=DOUBLE),))


def test_convolutions_pools_and_operations_in_place(completions: list[Any]):
    problem = images(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.SiLU(inplace=True),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.ZeroPad2d(1), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.0), nn.Linear(16, 6), nn.LogSoftmax(-1),
    )  # fmt: skip
    check(problem, 2)
    assert not completions


def test_channels_last(completions: list[Any]):
    problem = images(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 1))
    problem.network.to(memory_format=torch.channels_last)
    image = problem.primals[0].contiguous(memory_format=torch.channels_last)
    check(Problem(problem.network, (image,)), 1)
    assert not completions


def residual_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y += x.sin()
    y -= x
    y.mul_(x).add_(1)
    y.copy_(y.exp())
    return y


def rotary_by_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * 0.6 + torch.cat((-b, a), -1) * 0.8


def our_operators(x: Tensor) -> Tensor:
    y = pmf.ops.swiglu(x, x.sin())
    y = pmf.ops.rms_norm(y, torch.ones(6, dtype=x.dtype))
    y = pmf.ops.gated_residual(x[:, None], y[:, None], x[:, None] * 2)
    q = torch.stack((y, y.cos()), 2)  # [B, 1, 2, 6]
    return pmf.ops.attention(q, q, q).flatten(1)[:, :6] + F.rms_norm(x, (6,), x.new_ones(6))


def statistics(x: Tensor) -> Tensor:
    y = x.view(len(x), 2, 3)
    return torch.cat((y.mean(-1), y.var(-1), y.norm(dim=-1), y.amax((1,)), y.sum(1, keepdim=True)[:, 0]), 1)


def matrices(x: Tensor) -> Tensor:
    y = x.view(len(x), 2, 3)
    return (y @ y.mT @ torch.ones(2, 5, dtype=x.dtype)).roll(1, -1).flip(2).cumsum(1)


def broadcast(x: Tensor) -> Tensor:
    constant = torch.arange(12, dtype=x.dtype).view(2, 6).expand(len(x), 2, 6)
    return ((constant + x[:, None]) * (constant - x[:, None]).sin()).flatten(1)


APART = (residual_in_place, rotary_by_halves, statistics, matrices, broadcast)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("function", APART, ids=lambda f: f.__name__)
def test_operations_on_independent_samples(function, count: int, completions: list[Any]):
    check(Problem(Spelled(function), (torch.randn(6, 6, dtype=DOUBLE),)), count)
    assert not completions


def test_our_operators(completions: list[Any]):
    check(Problem(Spelled(our_operators), (torch.randn(6, 6, dtype=DOUBLE),)), 2)
    assert not completions


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("function", SPELLED, ids=lambda f: f.__name__)
def test_operations_that_mix_samples(function, count: int):
    """As many samples as features, so that only the right dimension gives the right tangent."""
    check(Problem(Spelled(function), (torch.randn(6, 6, dtype=DOUBLE),)), count, mixes=True)


def one_sample_overwritten(x: Tensor) -> Tensor:
    y = x * 2
    z = y.view(6, 2, 3)
    z[5] = y[0].view(2, 3)
    z[:, 1] += y.flip(0)[:, :3]
    return y.sin() + z.flatten(1)


def order_of_samples(x: Tensor) -> Tensor:
    return x.sort(0).values + x[torch.tensor([5, 0, 1, 2, 3, 4])] + x.softmax(0) + x.mean(0) + x.t()


def weights_of_our_operators(x: Tensor) -> Tensor:
    """One tensor for all samples, though it has as many rows; a sample alone; a gate alone."""
    constant = torch.linspace(-1, 2, 36, dtype=x.dtype).view(6, 6)
    y = pmf.ops.rms_norm(x, x[:, 0]) * pmf.ops.rms_norm(x[:, 1], constant[0]) + pmf.ops.swiglu(
        x[:, 2], x[:, 3]
    )
    gated = pmf.ops.gated_residual(constant[:, None], constant.sin()[:, None], x[:, None])[:, 0]
    return y + gated + pmf.ops.gated_residual(x, x.sin(), x[:, 4])


def joined_samples(x: Tensor) -> Tensor:
    return torch.cat((x[3:], x[:3])) * torch.stack((x, x)).sum(0) + (x.unfold(0, 2, 2).sum(-1)).repeat(2, 1)


def samples_in_the_second_dimension(x: Tensor) -> Tensor:
    """As in nn.TransformerEncoder with batch_first=False: a norm's statistics have gaps between the first."""
    tokens = x.view(len(x), 2, 3).transpose(0, 1)
    return (F.layer_norm(tokens, (3,), x.new_ones(3)) * tokens).transpose(0, 1).flatten(1)


def one_tensor_in_two_roles(x: Tensor) -> Tensor:
    """Of which only the first has one row for each sample."""
    return x @ x + F.linear(x, x) + F.conv1d(x[:, :, None], x[:, :, None])[..., 0]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    "function",
    [
        one_sample_overwritten, order_of_samples, joined_samples, one_tensor_in_two_roles,
        weights_of_our_operators, samples_in_the_second_dimension,
    ],
)  # fmt: skip
def test_samples_that_change_places(function, count: int):
    check(Problem(Spelled(function), (torch.randn(6, 6, dtype=DOUBLE),)), count, mixes=True)


def test_batch_norm_in_training_mode():
    network = images(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()).network
    x, x_t = torch.randn(2, 4, 2, 6, 6, dtype=DOUBLE).unbind(0)
    expected = jvp_math(network, (x,), (padded(x_t[:2], 4),))[1]
    assert_close(pmf.Jvp(network)((x,), (x_t[:2],))[1], expected[:2], EXACT)


def test_operators_that_decompose(completions: list[Any]):
    """Under inference_mode PyTorch leaves that to the mode."""
    network = Spelled(lambda x: x.square().sin())
    x, x_t = torch.randn(2, 4, 6, dtype=DOUBLE).unbind(0)
    expected = jvp_math(network, (x,), (x_t,))[1][:2]
    with torch.inference_mode():
        assert_close(pmf.Jvp(network)((x,), (x_t[:2],))[1], expected, EXACT)
    assert not completions


def test_complex_primals():
    network = Spelled(lambda x: (x * x.conj()).real + x.imag)
    network.layer = nn.Identity()
    x, x_t = torch.randn(2, 4, 3, dtype=torch.complex128).unbind(0)
    expected = jvp_math(network, (x,), (padded(x_t[:2], 4),))[1]
    assert_close(pmf.Jvp(network)((x,), (x_t[:2],))[1], expected[:2], EXACT)
    assert complex_numbers in SPELLED


def test_primals_of_several_batches_and_outputs_without_one():
    """Two batch sizes have no common samples: tangents are completed at once."""

    class Net(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x * y[:2], x.sum()

    x, y = torch.randn(2, 3), torch.randn(4, 3)
    (_, _), (product_t, sum_t) = pmf.Jvp(Net())((x, y), (x[:1], y[:1]))
    assert_close(product_t, 2 * x[:1] * y[:1], 1e-6)
    assert_close(sum_t, x[0].sum(), 1e-6)


def products_of_values(problem: Problem) -> int:
    with FlopCounterMode(display=False) as counter, pmf.replace_sdpa():
        problem.network(*problem.primals, **problem.constants)
    return products(counter)


@pytest.mark.parametrize("name", ["ViT", "DiT", "U-Net", "points"])
def test_products_are_computed_only_for_samples_with_a_tangent(name: str):
    """Counted: every product once for the values, and once more for each sample with a tangent."""
    problem = NETWORKS[name](torch.float32)
    batch, tangents = len(problem.primals[0]), problem.tangents()
    for count in range(1, batch + 1):
        with FlopCounterMode(display=False) as counter:
            pmf.Jvp(problem.network)(problem.primals, tuple(t[:count] for t in tangents))
        assert products(counter) * batch == products_of_values(problem) * (batch + count)


def with_batch(problem: Problem, batch: int) -> Problem:
    primals = (torch.randn(batch, *x.shape[1:], dtype=x.dtype) for x in problem.primals)
    return problem._replace(primals=tuple(primals))


def test_compiled():
    """No products for samples without a tangent; one dynamic graph for any number of samples."""
    block = Block(16, 2).to(DOUBLE)
    problem, backend = Problem(block, (torch.randn(3, 6, 16, dtype=DOUBLE),)), Counted()
    jvp = torch.compile(pmf.Jvp(problem.network), fullgraph=True, dynamic=True, backend=backend)
    for batch, count in ((7, 4), (9, 2)):
        some = with_batch(problem, batch)
        check(some, count, jvp=jvp)
        assert products(backend.counter) * batch == products_of_values(some) * (batch + count)
    assert backend.graphs == 1


def test_compiled_where_samples_are_not_outermost():
    problem = encoder(DOUBLE, depth=1)
    jvp = torch.compile(pmf.Jvp(problem.network), fullgraph=True, backend="aot_eager")
    check(problem, 1, jvp=jvp)


def test_completed_under_transforms():
    problem = NETWORKS["ViT"](DOUBLE)
    t = problem.tangents()[0][:1]
    wanted = pmf.Jvp(problem.network)(problem.primals, (t,))
    assert_close(pmf.Jvp(problem.network)(problem.primals, (t,), False), wanted, EXACT)
