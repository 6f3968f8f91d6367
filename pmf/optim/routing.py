"""Which parameters Muon takes: the weights of linear layers, and nothing else unless a group says so."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Named", "ParamsLike", "frozen_names", "route"]

Named = tuple[str, Tensor]
ParamsLike = nn.Module | Iterable[Tensor] | Iterable[Named] | Iterable[Mapping[str, Any]]

EMBEDDING_NAMES = ("embed", "emb", "wte", "wpe")
"""What modules of embedding tables are called beside names that contain "embedding"."""


def route(params: ParamsLike) -> list[dict[str, Any]]:
    """Parameter groups, each with its "algorithm", "muon" or "adam", and "params" as (name, tensor) pairs.

    - A module: weights of `nn.Linear` by Muon, except where an `nn.Embedding` shares them; all else by Adam.
    - (name, tensor) pairs: matrices called `<module>.weight` by Muon, unless that module is an embedding.
    - Tensors: all matrices by Muon, all else by Adam.
    - Groups (dicts): their "algorithm"; without one, their "params" as above.
    """
    if isinstance(params, nn.Module):
        return _split(
            [(n, p) for n, p in params.named_parameters() if p.requires_grad], _linear_weights(params)
        )
    if isinstance(params, Tensor):
        raise TypeError(
            "Muon: params must be a module, or a list of parameters, pairs or groups, not one tensor"
        )
    items = list(params)
    if not items:
        raise ValueError("Muon: there are no parameters")
    groups: list[dict[str, Any]] = []
    if not isinstance(items[0], Mapping):
        items = [{"params": items}]
    count = 0
    for group in items:
        if not isinstance(group, Mapping):
            raise TypeError("Muon: parameters and groups cannot be mixed; make every item a group (a dict)")
        named, has_names = _named(group["params"], count)
        count += len(named)
        extra = {key: value for key, value in group.items() if key != "params"}
        algorithm = extra.get("algorithm")
        if algorithm is None:
            chosen = {id(p) for n, p in named if p.dim() == 2 and (not has_names or _is_linear_name(n))}
            groups += [{**extra, **part} for part in _split(named, chosen)]
        else:
            _check_algorithm(algorithm, named)
            groups.append({**extra, "params": named})
    return groups


def frozen_names(params: ParamsLike) -> list[str]:
    """Parameters of a module that no one trains."""
    return (
        [n for n, p in params.named_parameters() if not p.requires_grad]
        if isinstance(params, nn.Module)
        else []
    )


def _split(named: list[Named], muon: set[int]) -> list[dict[str, Any]]:
    if not named:
        raise ValueError("Muon: there are no parameters that require a gradient")
    parts = {
        "muon": [(n, p) for n, p in named if id(p) in muon],
        "adam": [(n, p) for n, p in named if id(p) not in muon],
    }
    return [{"params": part, "algorithm": algorithm} for algorithm, part in parts.items() if part]


def _linear_weights(module: nn.Module) -> set[int]:
    linear, tables = set(), set()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            linear.add(id(layer.weight))
        elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            tables.add(id(layer.weight))
    return linear - tables


def _is_linear_name(name: str) -> bool:
    *path, leaf = name.split(".")
    owner = path[-1].lower() if path else ""
    return leaf == "weight" and "embedding" not in owner and owner not in EMBEDDING_NAMES


def _named(params: Any, count: int) -> tuple[list[Named], bool]:
    """(name, tensor) pairs, made up as "param<i>" for tensors; and whether there were names."""
    items: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if not items:
        raise ValueError("Muon: a group has no parameters")
    has_names = isinstance(items[0], tuple)
    named: list[Named] = [x if has_names else (f"param{count + i}", x) for i, x in enumerate(items)]
    for item in named:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor)):
            raise TypeError(
                f"Muon: parameters must be tensors, or all (name, tensor) pairs; got {type(item).__name__}"
            )
    return named, has_names


def _check_algorithm(algorithm: Any, named: list[Named]) -> None:
    if algorithm not in ("muon", "adam"):
        raise ValueError(f"Muon: a group's algorithm must be 'muon' or 'adam', got {algorithm!r}")
    for name, p in named:
        if algorithm == "muon" and p.dim() != 2:
            raise ValueError(f"Muon: only matrices can go by Muon; {name} has a shape of {list(p.shape)}")


def check_tensors(groups: list[dict[str, Any]]) -> None:
    """Raises where a parameter comes twice, is no leaf, or has a dtype that no optimizer here can train."""
    seen: dict[int, str] = {}
    for group in groups:
        for name, p in group["params"]:
            if id(p) in seen:
                raise ValueError(f"Muon: a parameter comes twice, as {seen[id(p)]} and as {name}")
            seen[id(p)] = name
            if p.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise ValueError(f"Muon: {name} must be a floating-point parameter, got {p.dtype}")
