"""What people put around a model, and what that does to the names of its parameters.

DistributedDataParallel     puts "module." in front of every name
torch.compile               puts "_orig_mod." before what lies in the compiled module
fully_shard (FSDP2)         changes no name; the module is all that it was, in another class
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

__all__ = ["by_plain_names", "exchanges", "plain_names", "unwrap", "without_ddp"]

DDP = nn.parallel.DistributedDataParallel
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

_COMPILED, _PARALLEL = "_orig_mod", "module."


def plain_names(names: Iterable[str]) -> list[str]:
    """The names without what wrappers put into them, in any order and number; as they are if two would meet.

    "module." counts only where it stands in front of all: a network may have a part of that name.
    """
    given = list(names)
    plain = [".".join(part for part in name.split(".") if part != _COMPILED) for name in given]
    while plain and all(name.startswith(_PARALLEL) for name in plain):
        plain = [name.removeprefix(_PARALLEL) for name in plain]
    return plain if len(set(plain)) == len(set(given)) else given


def by_plain_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same values under `plain_names`."""
    return dict(zip(plain_names(tensors), tensors.values(), strict=True))


def unwrap(model: M) -> M:
    """The model itself, inside DistributedDataParallel and torch.compile in any order."""
    inner: Any = model
    while isinstance(inner, DDP) or _COMPILED in inner._modules:
        inner = inner.module if isinstance(inner, DDP) else inner._modules[_COMPILED]
    return inner


def without_ddp(model: M) -> M:
    """What DistributedDataParallel wraps, for passes without gradients: its own would exchange buffers."""
    inner: Any = model
    while isinstance(inner, DDP):
        inner = inner.module
    return inner


def exchanges(model: nn.Module) -> bool:
    """Whether a pass through the model waits for other ranks, so that all have to make as many."""
    return any(isinstance(module, DDP) or _is_fully_sharded(module) for module in model.modules())


def _is_fully_sharded(module: nn.Module) -> bool:
    """By the name of the class that `fully_shard` adds: importing it costs as much as torch.distributed."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
