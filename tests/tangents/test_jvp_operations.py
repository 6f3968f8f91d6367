"""Jvp of single operations, in their functional and in-place forms."""

import pytest
import torch
from helpers import emulator
from helpers.jvp import EXACT, check
from helpers.levels import LEVELS, at_level
from helpers.networks import Problem, jvp_math
from helpers.spelled import SPELLED, Spelled, ours
from helpers.tolerance import assert_close
from torch import nn

import pmf


@pytest.mark.parametrize("function", SPELLED, ids=lambda f: f.__name__)
def test_operations(function):
    problem = Problem(Spelled(function), (torch.randn(6, 6, dtype=torch.float64),))
    tangents = problem.tangents()
    check(problem, tangents)
    expected = jvp_math(problem.network, problem.primals, tangents)
    for mode in (torch.no_grad, torch.inference_mode):  # whose tensors have no forward mode
        with mode():
            found = pmf.Jvp(problem.network)(problem.primals, tangents)
        assert_close(found, expected, EXACT)


def test_detach_in_place():
    """It is handled above the level that the mode sees."""
    x, x_t = torch.randn(2, 4, dtype=torch.float64).unbind(0)
    network = Spelled(lambda y: y.clone().detach_() * y)
    network.layer = nn.Identity()
    assert_close(pmf.Jvp(network)((x,), (x_t,))[1], x * x_t, EXACT)


@pytest.mark.parametrize(
    "detach", [torch.Tensor.detach, torch.Tensor.detach_, torch.detach_, torch.Tensor.data.__get__]
)
def test_views_of_a_detached_value(detach):
    """Its memory has a tangent, but they have none until one is written to them."""
    x, x_t = torch.randn(2, 4, 4, dtype=torch.float64).unbind(0)

    def function(x):
        memory = torch.zeros_like(x)
        seen = memory.view(-1)
        constant = detach(memory.copy_(x))
        out = constant[0] * x + constant.t() * x + seen.view(4, 4)
        constant[1] = x[2]
        return out + constant

    network = Spelled(function)
    network.layer = nn.Identity()
    expected = (x[0] + x.t() + 1) * x_t
    expected[1] += x_t[2]
    assert_close(pmf.Jvp(network)((x,), (x_t,))[1], expected, EXACT)


@pytest.mark.skipif("emulated" not in LEVELS, reason="this machine cannot run the emulator")
def test_the_cuda_kernels():
    problem = Problem(Spelled(ours), (torch.randn(6, 6, dtype=torch.float32),))
    problem.network.float()
    tangents = problem.tangents()
    wanted = pmf.Jvp(problem.network)(problem.primals, tangents)
    with at_level("emulated"):
        before = emulator.launches()
        found = pmf.Jvp(problem.network)(problem.primals, tangents)
        assert emulator.launches() > before
    assert_close(found, wanted, 1e-5)
