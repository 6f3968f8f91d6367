"""Nested optimizer state as tensors plus a JSON skeleton, so that resuming never unpickles."""

from typing import Any

import torch


def pack(tree: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move every tensor in ``tree`` into ``tensors``, keyed by path under ``name``; return the JSON rest.

    Dicts become lists of pairs because JSON has no integer keys. Raises TypeError for any other object.
    """
    if isinstance(tree, torch.Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[key, pack(value, f"{name}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [pack(value, f"{name}/{index}", tensors) for index, value in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"cannot save {name}: it is a {type(tree).__name__}")


def unpack(skeleton: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `pack`."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(value, tensors) for key, value in content}
    values = [unpack(value, tensors) for value in content]
    return values if kind == "list" else tuple(values)
