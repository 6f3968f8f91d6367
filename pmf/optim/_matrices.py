"""The matrices in a Muon parameter: itself, row blocks, heads of a block, or experts.

[rows, columns]             one matrix; with split_sizes one per row block, with num_heads one per head of
                            each block
[experts, rows, columns]    the same for each expert
[out, ...] with flatten     the matrix [out, everything else], as above: a convolution's weight
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pmf.arguments import is_whole

__all__ = ["SCALES", "Layout", "check_layouts", "layout_of"]

SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "none": lambda rows, columns: 1.0,
}


@dataclass(frozen=True)
class Layout:
    """A parameter's matrices, in memory order."""

    rows: tuple[int, ...]
    """The number of rows of each matrix, or of each matrix of one expert."""
    columns: int
    experts: int | None = None

    @property
    def _is_one(self) -> bool:
        return self.experts is None and len(self.rows) == 1

    def cut(self, x: Tensor) -> list[Tensor]:
        """The matrices of a tensor with the parameter's shape: views if it is contiguous."""
        if self._is_one:
            return [x if x.dim() == 2 else x.flatten(1)]
        if self.experts is None:
            return list(x.flatten(1).split(self.rows))
        if len(self.rows) == 1:
            return list(x.unbind())
        return [part for expert in x.unbind() for part in expert.split(self.rows)]

    def parts(self, x: Tensor) -> list[Tensor]:
        """Like `cut`, but always views, which keep the dimensions that `flatten` merges."""
        return [x] if self._is_one else list(x.split(self.rows)) if self.experts is None else self.cut(x)

    def join(self, matrices: list[Tensor], like: Tensor) -> Tensor:
        """The inverse of `cut`, in the shape of `like`."""
        if not matrices:  # zero experts
            return torch.empty_like(like)
        return (matrices[0] if self._is_one else torch.cat(matrices)).reshape(like.shape)

    def scales(self, scale: str) -> list[float]:
        """The factor on each matrix's step under the named rule."""
        one = [SCALES[scale](rows, self.columns) if rows and self.columns else 1.0 for rows in self.rows]
        return one * (1 if self.experts is None else self.experts)

    def work(self) -> int:
        """Multiply-adds of a Newton-Schulz step: A = X X^T, A^2 and (b A + c A^2) X, for wide X."""
        return (1 if self.experts is None else self.experts) * sum(
            2 * short * short * long + short**3
            for short, long in (sorted((rows, self.columns)) for rows in self.rows)
        )


def layout_of(group: Mapping[str, Any], shape: torch.Size) -> Layout:
    """The layout of a parameter of this shape in a group; ValueError, without its name, if it has none."""
    return _layout(
        tuple(shape), _hashable(group["split_sizes"]), _hashable(group["num_heads"]), group["flatten"]
    )


def check_layouts(group: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first parameter of a Muon group that does not fit its settings."""
    if not isinstance(group["flatten"], bool):
        raise ValueError(f"Muon: flatten must be True or False, got {group['flatten']!r}")
    for name in ("split_sizes", "num_heads"):
        given = group[name]
        counts = [given] if name == "num_heads" and not isinstance(given, (list, tuple)) else given
        if given is None:
            continue
        if not isinstance(counts, (list, tuple)) or not counts or not all(map(_is_count, counts)):
            what = (
                "a list of whole numbers"
                if name == "split_sizes"
                else "a whole number, or one for each part,"
            )
            raise ValueError(f"Muon: {name} must be {what} of at least 1, got {given!r}")
    for name, p in zip(group["param_names"], group["params"], strict=True):
        try:
            layout_of(group, p.shape)
        except ValueError as error:
            raise ValueError(f"Muon: {name} of shape {list(p.shape)} {error}") from None


@lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, ...],
    split_sizes: tuple[int, ...] | None,
    num_heads: tuple[int, ...] | int | None,
    flatten: bool,
) -> Layout:
    if len(shape) < 2:
        raise ValueError(
            "is not a matrix, and Muon only steps matrices: put it in a group with algorithm 'adam'"
        )
    if len(shape) > 3 and not flatten:
        raise ValueError(
            "has more than three dimensions: flatten=True in its group treats a convolution's weight as the "
            "matrix [out, everything else]"
        )
    experts, total = (shape[0], shape[1]) if len(shape) == 3 and not flatten else (None, shape[0])
    columns = math.prod(shape[1:]) if experts is None else shape[2]
    parts = (total,) if split_sizes is None else split_sizes
    if sum(parts) != total:
        raise ValueError(f"has {total} rows, but its group's split_sizes {list(parts)} sum to {sum(parts)}")
    heads = num_heads if isinstance(num_heads, tuple) else (num_heads or 1,) * len(parts)
    if len(heads) != len(parts):
        raise ValueError(f"has {len(parts)} parts, but its group's num_heads are {len(heads)}: {list(heads)}")
    rows: list[int] = []
    for size, count in zip(parts, heads, strict=True):
        if size % count:
            raise ValueError(
                f"has a part of {size} rows, which its group's num_heads {count} does not divide"
            )
        rows += [size // count] * count
    return Layout(tuple(rows), columns, experts)


def _hashable(setting: Any) -> Any:
    return tuple(setting) if isinstance(setting, list) else setting


def _is_count(x: Any) -> bool:
    return is_whole(x) and x >= 1
