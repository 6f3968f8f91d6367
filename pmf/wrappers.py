"""What people put around a model, and what that does to the names of its parameters.

DistributedDataParallel     puts "module." in front of every name
torch.compile               puts "_orig_mod." before what lies in the compiled module
fully_shard (FSDP2)         changes no name; the module is all that it was, in another class
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

__all__ = ["by_plain_names", "plain_names", "unwrap"]

T = TypeVar("T")

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


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, inside DistributedDataParallel and torch.compile in any order."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get(_COMPILED), nn.Module):
            model = inner
        else:
            return model
