"""The version of the eager pass that torch.compile traces; imported only while it traces."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .module import beside
from .sdpa import replace_sdpa

__all__ = ["traced", "what_it_does"]


@torch._dynamo.nonstrict_trace
def traced(
    network: nn.Module,
    primals: tuple[Any, ...],
    given: Sequence[Tensor | None],
    constants: dict[str, Any],
    what: Any,
) -> Any:
    """The eager pass as one graph node, whose operators AOTAutograd traces."""
    del what  # guarded by the caller
    with replace_sdpa():
        return beside(network, primals, given, constants)


def what_it_does(network: nn.Module) -> tuple[Any, ...]:
    """The attributes of a network that determine its forward, read where torch.compile guards them."""
    found: list[Any] = []
    for module in network.modules():
        found.append(type(module).__qualname__)
        for name, value in module.__dict__.items():
            if isinstance(value, (bool, int, float, str)):
                found.append((name, value))
    return tuple(found)
