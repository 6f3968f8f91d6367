"""The version of the eager pass that torch.compile traces; imported only while it traces."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils._named_member_accessor import swap_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .mode import tensors_of
from .module import Constant, beside
from .sdpa import replace_sdpa

__all__ = ["call"]

_NONE = "pmf.tangents: None"

Path = tuple[tuple[bool, Any], ...]
"""Steps from a network to what it holds: (True, an attribute's name) or (False, an item's key)."""


def call(
    network: nn.Module, primals: Any, given: Any, constants: dict[str, Any], samples: tuple[int, int] | None
) -> tuple[Any, Any]:
    """`beside` in a graph whose conditions are guarded."""
    # A graph node accepts every constant except None, which text replaces.
    arguments = tree_map(lambda leaf: _NONE if leaf is None else leaf, (primals, given, constants, samples))
    plain, containers, tensors = _held(network)
    what = [each for module in network.modules() for each in _what_it_does(module)]
    what += [_plain(_at(network, path)) for path in plain]
    what += [len(_at(network, path)) for path in containers]
    found = _traced(network, arguments, {path: _at(network, path) for path in tensors}, what)
    if len(found) == 1:
        raise RuntimeError(found[0])
    return found


@torch._dynamo.nonstrict_trace
def _traced(network: nn.Module, arguments: Any, tensors: dict[Path, Tensor], what: Any) -> Any:
    """The eager pass as one graph node, whose operators AOTAutograd traces."""
    del what  # guarded by the caller
    primals, given, constants, samples = tree_map(_unmarked, arguments)
    try:
        with replace_sdpa(), _replaced(network, tensors), _NothingBakedIn():
            found: Any = beside(network, primals, given, constants, samples)
    except Exception as error:  # Dynamo would replace its text
        if not str(error).startswith("Jvp: "):
            raise
        found = (str(error),)
    return tree_map(lambda leaf: leaf if isinstance(leaf, Tensor) else Constant(leaf), found)


class _NothingBakedIn(TorchDispatchMode):
    """Rejects tensors that the graph would keep as constants, without gradients and with today's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of((*args, *kwargs.values()))
        real = [x for x in tensors if type(x) in (Tensor, nn.Parameter)]
        if 0 < len(real) < len(tensors):
            raise RuntimeError(
                f"Jvp: under torch.compile the network uses a tensor {list(real[0].shape)} that it does not "
                "hold: register it as a buffer"
            )
        return func(*args, **kwargs)


def _unmarked(leaf: Any) -> Any:
    return None if isinstance(leaf, str) and leaf == _NONE else leaf


def _what_it_does(module: nn.Module) -> list[Any]:
    """A module's type and its attributes, read where torch.compile guards them."""
    return [type(module).__qualname__, *(_plain(value) for value in module.__dict__.values())]


def _plain(value: Any) -> Any:
    """Reading any value guards it, but only constants may enter the graph."""
    return value if isinstance(value, (bool, int, float, str)) else _NONE


def _at(network: nn.Module, path: Path) -> Any:
    value: Any = network
    for attribute, key in path:
        value = getattr(value, key) if attribute else value[key]
    return value


# What torch.compile does not find by itself, because it does not trace the network.


@torch._dynamo.assume_constant_result
def _held(network: nn.Module) -> tuple[list[Path], list[Path], list[Path]]:
    """Paths to constants, to the containers that hold them, and to tensors not passed as parameters.

    Those are second names of tied weights, plain attributes, and what containers and objects hold.
    """
    passed = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    plain: list[Path] = []
    containers: list[Path] = []
    tensors: list[Path] = []
    seen: set[int] = set()

    def visit(value: Any, path: Path, depth: int) -> None:
        if isinstance(value, Tensor):
            replaceable = path[-1][0] or not isinstance(_at(network, path[:-1]), tuple)
            if replaceable and ".".join(str(key) for _, key in path) not in passed:
                tensors.append(path)
            return
        if value is None or isinstance(value, _CONSTANT):
            plain.append(path)
            return
        if id(value) in seen or depth > _DEEP:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            own = {name: each for name, each in value.__dict__.items() if name not in _OF_MODULES}
            for name, each in {**value._parameters, **value._buffers, **value._modules, **own}.items():
                if each is not None and not isinstance(each, _CONSTANT):  # read by _what_it_does
                    visit(each, (*path, (True, name)), depth if name in own else 0)
        elif isinstance(value, (list, tuple)) or type(value) in (dict, OrderedDict):
            if len(value) <= _LONG:
                containers.append(path)
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, each in items:
                    if isinstance(key, (str, int)):
                        visit(each, (*path, (False, key)), depth + 1)
        elif type(value).__module__.partition(".")[0] not in _OPAQUE and hasattr(value, "__dict__"):
            for name, each in vars(value).items():
                visit(each, (*path, (True, name)), depth + 1)

    visit(network, (), 0)
    return plain, containers, tensors


_OF_MODULES = set(nn.Module().__dict__)
_CONSTANT = (bool, int, float, str, torch.dtype, FunctionType, BuiltinFunctionType)
_OPAQUE = ("builtins", "functools", "torch", "numpy")
_DEEP = 3
_LONG = 64


@contextlib.contextmanager
def _replaced(network: nn.Module, tensors: dict[Path, Tensor]) -> Iterator[None]:
    """The network with other tensors at these paths."""
    before = [(path, _at(network, path)) for path in tensors]
    try:
        for path, x in tensors.items():
            _put(network, path, x)
        yield
    finally:
        for path, x in before:
            _put(network, path, x)


def _put(network: nn.Module, path: Path, x: Tensor) -> None:
    owner, (attribute, key) = _at(network, path[:-1]), path[-1]
    if not attribute:
        owner[key] = x
    elif isinstance(owner, nn.Module):
        swap_tensor(owner, key, x)
    else:
        setattr(owner, key, x)
