"""Jagged nested tensors: sequences of different lengths [B, j, ...], stored contiguously.

Ops that treat tokens independently run on the values; attention reads the offsets. The result has the offsets
of its first argument, so that PyTorch can add the two.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._subclasses import kind_of
from .attention_varlen import attention_varlen, attention_varlen_jvp

__all__ = ["run_jagged"]

TOKENWISE = ("gated_residual", "rms_norm", "swiglu")


def run_jagged(op: Callable[..., Any], arguments: dict[str, Any], given: Mapping[str, Any]) -> Any:
    name = op.__name__
    for n, x in given.items():
        if kind_of(x) == "jagged" and (x.layout != torch.jagged or x._lengths is not None):
            raise TypeError(f"{name}: {n} is a nested tensor with holes; make it contiguous first")
    if name.removesuffix("_jvp") in TOKENWISE:
        return _tokenwise(op, arguments, given)
    if name.removesuffix("_jvp") == "attention":
        return _attention(op, arguments, given)
    if name == "newton_schulz" and set(given) == {"matrices"}:
        return _each_matrix(op, arguments)
    first = next(n for n, x in given.items() if kind_of(x) == "jagged")
    raise TypeError(
        f"{name}: {first} is a jagged nested tensor, which the op does not accept; pass one sample at a "
        "time (unbind()), or pad with to_padded_tensor()"
    )


class _Ragged(NamedTuple):
    """The location of the sequences in a jagged tensor."""

    offsets: Tensor  # [B + 1]
    dim: int
    extremes: tuple[int | None, int | None]

    @classmethod
    def of(cls, x: Any) -> "_Ragged":
        lengths = x._maybe_min_seqlen, x._maybe_max_seqlen
        return cls(x.offsets(), x._ragged_idx, lengths)

    def wrap(self, values: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(
            values,
            self.offsets,
            jagged_dim=self.dim,
            min_seqlen=self.extremes[0],
            max_seqlen=self.extremes[1],
        )

    def owners(self) -> Tensor:
        """For each token, the index of its sequence."""
        return torch.repeat_interleave(
            torch.arange(self.offsets.numel() - 1, device=self.offsets.device), self.offsets.diff()
        )


def _tokenwise(op: Callable[..., Any], arguments: dict[str, Any], given: Mapping[str, Any]) -> Any:
    name, main = op.__name__, next(iter(given))
    if kind_of(given[main]) != "jagged":
        raise TypeError(f"{name}: {main} must be a jagged nested tensor because another argument is")
    x: Any = given[main]
    where = _Ragged.of(x)
    if name.startswith("rms_norm") and where.dim == x.dim() - 1:
        raise ValueError(f"{name}: the last dimension of {main} is the ragged one; move it with transpose()")
    values = dict(arguments)
    for n, y in given.items():
        if kind_of(y) == "jagged":
            if y.shape != x.shape:  # the ragged size is a symbol of its offsets: equal only if those are
                raise ValueError(f"{name}: {n} and {main} must share one offsets tensor")
            values[n] = y.values()
        elif n in ("weight", "weight_t") or y.dim() == 1:
            values[n] = y
        elif n in ("gate", "gate_t") and where.dim == 1 and y.dim() == x.dim() and y.shape[0] == x.shape[0]:
            if any(size != 1 for size in y.shape[1:-1]):
                raise ValueError(f"{name}: {n} must be [D] or [B, 1, ..., D] beside jagged tokens")
            values[n] = y.squeeze(1).index_select(0, where.owners())
        else:
            raise TypeError(f"{name}: {n} must be a jagged nested tensor like {main}")
    results = op(**values)
    return where.wrap(results) if isinstance(results, Tensor) else tuple(where.wrap(y) for y in results)


def _each_matrix(op: Callable[..., Any], arguments: dict[str, Any]) -> Tensor:
    x: Any = arguments["matrices"]
    where = _Ragged.of(x)
    values = x.values()
    if values.dim() != 2:
        raise ValueError("newton_schulz: jagged matrices must be [B, j, n] or [B, m, j]")
    dim = where.dim - 1
    matrices = list(values.split(where.offsets.diff().tolist(), dim))
    found = op(**{**arguments, "matrices": matrices})
    return where.wrap(torch.cat(found, dim))


def _attention(op: Callable[..., Any], arguments: dict[str, Any], given: Mapping[str, Any]) -> Any:
    """`attention` or `attention_jvp` for jagged [B, H, j, D]."""
    name = op.__name__
    if arguments.get("attn_mask") is not None:
        raise TypeError(f"{name}: attn_mask is not supported with jagged nested tensors; use is_causal")
    names = ("query", "key", "value")
    for n in names:
        if kind_of(given[n]) != "jagged":
            raise TypeError(f"{name}: query, key and value must all be jagged nested tensors; {n} is not")
        if given[n].dim() != 4 or given[n]._ragged_idx != 2:
            raise ValueError(
                f"{name}: {n} must be jagged [B, H, j, D], as [B, j, H, D].transpose(1, 2) gives"
            )
    query, key, value = (given[n] for n in names)
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"{name}: key and value must share one offsets tensor")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"{name}: query has {query.shape[0]} sequences, and key {key.shape[0]}")
    for n in names:
        tangent = given.get(f"{n}_t")
        if tangent is not None and (kind_of(tangent) != "jagged" or tangent.shape != given[n].shape):
            raise ValueError(f"{name}: {n}_t must be a jagged nested tensor like {n}")
    return _attention_varlen(op, arguments, given)


def _attention_varlen(op: Callable[..., Any], arguments: dict[str, Any], given: Mapping[str, Any]) -> Any:
    """Call the op on the values [H, T, D], which are packed sequences."""
    options = {n: x for n, x in arguments.items() if n not in given and n not in ("attn_mask", "dropout_p")}
    if dropout_p := arguments.get("dropout_p"):
        raise ValueError(f"attention: dropout_p must be 0, because dropout is not supported, got {dropout_p}")
    packed = {n: x.values().transpose(0, 1) for n, x in given.items()}
    where, others = _Ragged.of(given["query"]), _Ragged.of(given["key"])
    cuts = {"cu_seqlens_q": where.offsets, "cu_seqlens_k": others.offsets}
    packing: Callable[..., Any] = attention_varlen if op.__name__ == "attention" else attention_varlen_jvp
    results = packing(**packed, **cuts, **options)

    def ragged(y: Tensor) -> Tensor:
        return where.wrap(y if y.dim() == 2 else y.transpose(0, 1))  # lse is [H, T]

    return ragged(results) if isinstance(results, Tensor) else tuple(map(ragged, results))
