"""The version of the eager pass that torch.compile traces; imported only while it traces."""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .module import beside
from .sdpa import replace_sdpa

__all__ = ["marked", "traced", "what_it_does"]

_NONE = "pmf.tangents: None"


@torch._dynamo.nonstrict_trace
def traced(network: nn.Module, arguments: Any, what: Any) -> Any:
    """The eager pass as one graph node, whose operators AOTAutograd traces.

    arguments: `marked` primals, tangents of their leaves, and constants.
    """
    del what  # guarded by the caller
    primals, given, constants = tree_map(_unmarked, arguments)
    with replace_sdpa():
        return beside(network, primals, given, constants)


def marked(arguments: Any) -> Any:
    """Arguments for `traced`, in which text stands for None: a graph node takes every constant but None."""
    return tree_map(lambda leaf: _NONE if leaf is None else leaf, arguments)


def _unmarked(leaf: Any) -> Any:
    return None if isinstance(leaf, str) and leaf == _NONE else leaf


def what_it_does(network: nn.Module) -> tuple[Any, ...]:
    """The attributes of a network that determine its forward, read where torch.compile guards them."""
    found: list[Any] = []
    for module in network.modules():
        found.append(type(module).__qualname__)
        for name, value in module.__dict__.items():
            if isinstance(value, (bool, int, float, str)):
                found.append((name, value))
    return tuple(found)
