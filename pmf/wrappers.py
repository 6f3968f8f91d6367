"""Wrappers around a model, and their effect on parameter names.

DistributedDataParallel     prefixes every name with "module."
DataParallel                does the same, and runs copies of the module on several devices
torch.compile               inserts "_orig_mod." before the names inside the compiled module
checkpoint_wrapper          inserts "_checkpoint_wrapped_module." before the names inside the block
fully_shard (FSDP2)         keeps the names; changes the module's class in place
FullyShardedDataParallel    (FSDP1) inserts "_fsdp_wrapped_module." and flattens the parameters: rejected,
                            except in the names in files
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn

__all__ = [
    "by_plain_names",
    "exchanges",
    "others",
    "plain_names",
    "refuse_data_parallel",
    "refuse_fsdp1_within",
    "unwrap",
    "without_ddp",
]

DDP = nn.parallel.DistributedDataParallel
DP = nn.DataParallel
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

_COMPILED, _PARALLEL = "_orig_mod", "module."
_FSDP1 = "FullyShardedDataParallel"
_WITHIN = (_COMPILED, "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def others(module: nn.Module, known: Iterable[Tensor]) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's named parameters that are not among the known; none under fully_shard.

    Between passes, fully_shard may show gathered parameters in place of the sharded ones.
    """
    known = list(known)
    if any(hasattr(p, "device_mesh") for p in known):
        return
    own = {id(p) for p in known}
    yield from ((name, p) for name, p in module.named_parameters() if id(p) not in own)


def plain_names(names: Iterable[str]) -> list[str]:
    """Parameter names without wrapper prefixes, in any order and number; unchanged if two would collide.

    "module." is removed only if every name starts with it: a network may have a submodule of that name.
    """
    given = list(names)
    plain = [".".join(part for part in name.split(".") if part not in _WITHIN) for name in given]
    while plain and all(name.startswith(_PARALLEL) for name in plain):
        plain = [name.removeprefix(_PARALLEL) for name in plain]
    return plain if len(set(plain)) == len(set(given)) else given


def by_plain_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same values keyed by `plain_names`."""
    return dict(zip(plain_names(tensors), tensors.values(), strict=True))


def unwrap(model: M) -> M:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, nested in any order.

    Raises TypeError for FullyShardedDataParallel, and for DataParallel on several devices: it would send the
    tangents of the first samples to copies that hold other samples.
    """
    inner: Any = model
    while isinstance(inner, (DDP, DP)) or _COMPILED in inner._modules:
        refuse_data_parallel(inner, "the model")
        inner = inner._modules[_COMPILED] if _COMPILED in inner._modules else inner.module
    if _has_base(inner, _FSDP1):
        _refuse_fsdp1("the model")
    return inner


def refuse_data_parallel(module: nn.Module, what: str) -> None:
    """Raise TypeError if a module is DataParallel on several devices, or one of its copies there."""
    if getattr(module, "_is_replica", False):
        where = "several devices"
    elif isinstance(module, DP) and len(module.device_ids) > 1:
        where = f"{len(module.device_ids)} devices"
    else:
        return
    raise TypeError(
        f"{what} is in DataParallel on {where}, which cannot split samples with tangents; use "
        "DistributedDataParallel, or pass model.module"
    )


def refuse_fsdp1_within(model: nn.Module) -> None:
    """Raise TypeError if a part of the model is in FullyShardedDataParallel."""
    for name, module in model.named_modules():
        if _has_base(module, _FSDP1):
            _refuse_fsdp1(f"the model's {name}")


def _refuse_fsdp1(what: str) -> NoReturn:
    raise TypeError(
        f"{what} is in FullyShardedDataParallel (FSDP1), which flattens parameters; shard it with "
        "torch.distributed.fsdp.fully_shard (FSDP2)"
    )


def without_ddp(model: M) -> M:
    """The model inside DistributedDataParallel, for passes without gradients: DDP's would sync buffers."""
    inner: Any = model
    while isinstance(inner, DDP):
        inner = inner.module
    return inner


def exchanges(model: nn.Module) -> bool:
    """Whether a forward pass waits for other ranks, so that all must run equally many passes."""
    return any(
        isinstance(module, DDP) or _has_base(module, "FSDPModule", _FSDP1) for module in model.modules()
    )


def _has_base(module: nn.Module, *names: str) -> bool:
    """Whether a base class has one of these names; importing FSDP's classes would load torch.distributed."""
    return any(kind.__name__ in names for kind in type(module).__mro__)
