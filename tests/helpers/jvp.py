"""What a Jvp must equal: torch.func.jvp through math attention, in values, tangents and gradients."""

from typing import Any

import torch
from torch import Tensor, nn

import pmf

from .networks import Problem, jvp_math
from .tolerance import assert_close

EXACT = 1e-12


def gradients(out: Tensor, out_t: Tensor, network: nn.Module) -> Any:
    """Gradients of a loss like MeanFlow's, in which the tangent is part of the target."""
    weights = list(network.parameters())
    return torch.autograd.grad((out + 0.3 * out_t).square().sum(), weights, allow_unused=True)


def check(
    problem: Problem, tangents: Any = None, detach: bool = True, jvp: Any = None, limit: float = EXACT
) -> None:
    network, primals, constants = problem
    tangents = problem.tangents() if tangents is None else tangents
    out, out_t = jvp_math(network, primals, tangents, **constants)
    if detach:  # torch.func.jvp passes gradients through detach(), which the network itself blocks
        wanted = gradients(network(*primals, **constants), out_t.detach(), network)
    else:
        wanted = gradients(out, out_t, network)
    jvp = pmf.Jvp(network) if jvp is None else jvp
    found = jvp(primals, tangents, detach_tangent=detach, **constants)
    assert out_t.abs().sum() > 0
    assert_close(found, (out, out_t), limit)
    assert found[1].requires_grad is not detach
    for actual, expected in zip(gradients(found[0], found[1], network), wanted, strict=True):
        if expected is not None:
            assert_close(actual, expected, limit)
