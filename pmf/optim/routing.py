"""Assign parameters to Muon: the weights of linear layers, and nothing else unless a group says so."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pmf.ops._subclasses import require_trainable
from pmf.wrappers import plain_names

from ._settings import LAYOUT, check_keys, check_read, plain_counts, reads

__all__ = ["Named", "ParamsLike", "check_tensors", "frozen_names", "route"]

Named = tuple[str, Tensor]
ParamsLike = nn.Module | Iterable[Tensor] | Iterable[Named] | Iterable[Mapping[str, Any]]
Layouts = dict[int, dict[str, Any]]
"""Muon's parameters: id of the parameter -> the settings that define its matrices."""

EMBEDDING_WORDS = {"embed", "emb", "wte", "wpe"}
"""Words in the names of embedding modules, such as embed_tokens, besides names that contain "embedding"."""
SEPARATE_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The weights that nn.MultiheadAttention has instead of in_proj_weight if keys or values differ in width."""


class Routed(dict[str, Any]):
    """A group already processed by `route`, which then returns it unchanged."""


def route(params: ParamsLike, defaults: Mapping[str, Any] = LAYOUT, *, before: int = 0) -> list[Routed]:
    """Parameter groups, each with its "algorithm", "muon" or "adam", and "params" as (name, tensor) pairs.

    - A module: Muon for weights of `nn.Linear`, unless an `nn.Embedding` shares them, and for
      `nn.MultiheadAttention`'s `in_proj_weight` in three parts; Adam for everything else.
    - (name, tensor) pairs: Muon for matrices named `<module>.weight`, unless that module is an embedding, and
      for `in_proj_weight` as above; Adam for everything else.
    - Tensors: Muon for all matrices, Adam for everything else.
    - Groups (dicts): their "algorithm"; without one, their "params" as above.

    With flatten, in a group or in defaults, Muon also takes convolution weights: a module's, or by name or
    among tensors those with more than two dimensions.

    Names are those of the model inside DistributedDataParallel and torch.compile (`pmf.wrappers`); tensors
    are numbered, from `before` on.

    Raises ValueError for a setting that is unknown or unused by its group's parameters.
    """
    if isinstance(params, nn.Module):
        named = _plainly_named([(n, p) for n, p in params.named_parameters() if p.requires_grad])
        return _split(named, _of_module(params, defaults["flatten"]), {})
    if isinstance(params, (Tensor, Mapping)) or not isinstance(params, Iterable):
        got = "one tensor" if isinstance(params, Tensor) else type(params).__name__
        raise TypeError(f"Muon: params must be a module, or a list of parameters, pairs or groups, not {got}")
    items = list(params)
    if not items:
        raise ValueError("Muon: there are no parameters")
    groups: list[Routed] = []
    if not isinstance(items[0], Mapping):
        items = [{"params": items}]
    count = before
    for group in items:
        if not isinstance(group, Mapping):
            raise TypeError("Muon: parameters and groups cannot be mixed; make every item a group (a dict)")
        if isinstance(group, Routed):
            groups.append(group)
            continue
        if "params" not in group:
            raise ValueError('Muon: a group has no "params"')
        check_keys(group)
        named, has_names = _named(group["params"], count)
        count += len(named)
        extra = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        extra |= {key: plain_counts(extra[key]) for key in ("split_sizes", "num_heads") if key in extra}
        algorithm = extra.get("algorithm")
        if algorithm is None:
            flatten = bool(extra.get("flatten", defaults["flatten"]))
            chosen = _by_name(named, flatten) if has_names else _by_shape(named, flatten)
            parts = _split(named, chosen, extra)
        elif algorithm in ("muon", "adam"):
            parts = [Routed(extra, params=named)]
        else:
            raise ValueError(f"Muon: a group's algorithm must be 'muon' or 'adam', got {algorithm!r}")
        check_read(extra, (part["algorithm"] for part in parts), defaults)
        groups += parts
    return groups


def frozen_names(params: ParamsLike) -> list[str]:
    """The parameters of a module that do not require gradients."""
    if not isinstance(params, nn.Module):
        return []
    every = list(params.named_parameters())
    names = plain_names(name for name, _ in every)
    return [name for name, (_, p) in zip(names, every, strict=True) if not p.requires_grad]


def _split(named: list[Named], muon: Layouts, extra: dict[str, Any]) -> list[Routed]:
    """One group per set of matrix settings, then Adam's, each with the settings it reads."""
    if not named:
        raise ValueError("Muon: there are no parameters that require a gradient")
    parts: dict[str, list[Named]] = defaultdict(list)
    settings: dict[str, dict[str, Any]] = {}
    for name, p in named:
        algorithm = "muon" if id(p) in muon else "adam"
        mine = muon.get(id(p), {}) | {key: x for key, x in extra.items() if reads(algorithm, key)}
        key = repr(mine) + algorithm
        settings[key] = mine | {"algorithm": algorithm}
        parts[key].append((name, p))
    groups = [Routed(settings[key], params=part) for key, part in parts.items()]
    # Whole matrices first, Adam's last.
    return sorted(groups, key=lambda g: (g["algorithm"] == "adam", g.get("split_sizes") is not None))


def _of_module(module: nn.Module, flatten: bool) -> Layouts:
    chosen: Layouts = {}
    tables = set()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            chosen[id(layer.weight)] = {}
        elif isinstance(layer, nn.MultiheadAttention):
            if layer.in_proj_weight is not None:
                chosen[id(layer.in_proj_weight)] = _thirds(layer.in_proj_weight)
            else:
                chosen |= {id(getattr(layer, name)): {} for name in SEPARATE_PROJECTIONS}
        elif flatten and isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            chosen[id(layer.weight)] = {"flatten": True}
        elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            tables.add(id(layer.weight))
    return {key: layout for key, layout in chosen.items() if key not in tables}


def _by_name(named: list[Named], flatten: bool) -> Layouts:
    chosen: Layouts = {}
    for name, p in named:
        *path, leaf = name.split(".")
        owner = path[-1].lower() if path else ""
        if p.dim() < 2 or (p.dim() > 2 and not flatten):
            continue
        if leaf == "in_proj_weight" and p.dim() == 2 and p.shape[0] == 3 * p.shape[1]:
            chosen[id(p)] = _thirds(p)
        elif leaf == "weight" and "embedding" not in owner and EMBEDDING_WORDS.isdisjoint(owner.split("_")):
            chosen[id(p)] = {"flatten": True} if p.dim() > 2 else {}
        elif leaf in SEPARATE_PROJECTIONS:
            chosen[id(p)] = {}
    return chosen


def _by_shape(named: list[Named], flatten: bool) -> Layouts:
    return {
        id(p): {"flatten": True} if p.dim() > 2 else {}
        for _, p in named
        if p.dim() == 2 or (flatten and p.dim() > 2)
    }


def _thirds(weight: Tensor) -> dict[str, Any]:
    """Queries, keys and values."""
    return {"split_sizes": [weight.shape[0] // 3] * 3}


def _named(params: Any, count: int) -> tuple[list[Named], bool]:
    """(name, tensor) pairs, with names "param<i>" for tensors; and whether names were given."""
    if isinstance(params, nn.Module) or not isinstance(params, Iterable):
        raise TypeError(
            f"Muon: a group's params must be parameters or (name, parameter) pairs, got "
            f"{type(params).__name__}: for a module, give module.named_parameters()"
        )
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
    return (_plainly_named(named) if has_names else named), has_names


def _plainly_named(named: list[Named]) -> list[Named]:
    names = plain_names(name for name, _ in named)
    return [(name, p) for name, (_, p) in zip(names, named, strict=True)]


def check_tensors(groups: list[Routed]) -> None:
    """Raise if a parameter is repeated or has a dtype that cannot be trained here."""
    seen: dict[int, str] = {}
    for group in groups:
        for name, p in group["params"]:
            if id(p) in seen:
                raise ValueError(f"Muon: a parameter is given twice, as {seen[id(p)]} and as {name}")
            seen[id(p)] = name
            require_trainable("Muon", name, p)
            if p.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise ValueError(f"Muon: {name} must be a floating-point parameter, got {p.dtype}")
