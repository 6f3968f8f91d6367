"""One parameter, one owner: how ranks share Muon's work and state.

Orthogonalising a matrix needs all of it, so each parameter, with all its matrices, is assigned to one rank,
its owner, the only one to keep its momentum. Parameters are assigned in decreasing order of work, each to the
rank with the least so far (Graham, 1969). A step moves each gradient to its owner and each update back, once:

    replicated parameters (DDP)     reduce-scatter of gradients, all-gather of updates
    sharded by rows (FSDP2)         all-to-all of row shards, both ways; FSDP2 has averaged the gradients

Ranks send buffers of equal length (the longest, padded), or exactly their rows. Everything else in the step
is elementwise and local.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

__all__ = ["Exchange", "assign_owners", "make_exchange"]

# torch 2.13 renamed these two.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def assign_owners(works: Sequence[int], ranks: int) -> list[int]:
    """Assign each parameter to an owner by the work of its matrices; the same on every rank."""
    load, owners = [0] * ranks, [0] * len(works)
    for i in sorted(range(len(works)), key=lambda i: -works[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += works[i]
    return owners


class Exchange(Protocol):
    """Moves gradients to owners and updates back."""

    owned: list[int]
    """Whether each parameter is owned by this rank."""

    def collect(self, grads: list[Tensor]) -> list[Tensor]:
        """Full mean gradients of the owned parameters, from every rank's local gradients of all."""
        ...

    def give_back(self, directions: list[Tensor]) -> list[Tensor]:
        """Local updates of all parameters, from the owners' full ones."""
        ...

    def average(self, grads: list[Tensor]) -> list[Tensor]:
        """Mean gradients, each where it was."""
        ...


def make_exchange(params: list[Tensor], works: list[int] | None, group: dist.ProcessGroup | None) -> Exchange:
    """The exchange for parameters of one kind: DTensors, whose mesh gives the ranks, or plain tensors.

    works: the work of each parameter's matrices; None for Adam's parameters, which have no owner.
    """
    if not isinstance(params[0], DTensor):
        assert group is not None
        return _Replicated(params, works, group)
    mesh = params[0].device_mesh
    for p in params:
        assert isinstance(p, DTensor)
        if mesh.ndim != 1 or p.device_mesh != mesh or tuple(p.placements) != (Shard(0),):
            raise ValueError(
                f"Muon: sharded parameters must be sharded by rows over a one-dimensional mesh, as "
                f"fully_shard does, got {p.placements} over {p.device_mesh}"
            )
    return _RowShards(params, works, mesh.get_group())


class _Replicated:
    """Every rank has every parameter, and the gradient of its own samples."""

    def __init__(self, params: list[Tensor], works: list[int] | None, group: dist.ProcessGroup) -> None:
        self._group, self._ranks = group, dist.get_world_size(group)
        self._shapes = [p.shape for p in params]
        self._of = _by_owner(works, self._ranks)
        self.owned = self._of[dist.get_rank(group)]
        self._length = max(sum(self._shapes[i].numel() for i in of) for of in self._of)
        self._empty = _empty(params[0])

    def collect(self, grads: list[Tensor]) -> list[Tensor]:
        parts = self._empty.new_zeros(self._ranks, self._length)
        for part, of in zip(parts, self._of, strict=True):
            _fill(part, [grads[i] for i in of])
        mine = self._empty.new_empty(self._length)
        _reduce_scatter(mine, parts.flatten(), group=self._group)
        return _cut(mine.div_(self._ranks), [self._shapes[i] for i in self.owned])

    def give_back(self, directions: list[Tensor]) -> list[Tensor]:
        mine = self._empty.new_zeros(self._length)
        _fill(mine, directions)
        parts = self._empty.new_empty(self._ranks * self._length)
        _all_gather(parts, mine, group=self._group)
        found: dict[int, Tensor] = {}
        for part, of in zip(parts.view(self._ranks, -1), self._of, strict=True):
            found.update(zip(of, _cut(part, [self._shapes[i] for i in of]), strict=True))
        return [found[i] for i in range(len(self._shapes))]

    def average(self, grads: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat, group=self._group)
        return _cut(flat.div_(self._ranks), self._shapes)


class _RowShards:
    """Every rank has some rows of every parameter and of its gradient, which is already averaged."""

    def __init__(self, params: list[Tensor], works: list[int] | None, group: dist.ProcessGroup) -> None:
        self._group, self._ranks, self._rank = group, dist.get_world_size(group), dist.get_rank(group)
        self._shapes = [p.shape for p in params]
        self._of = _by_owner(works, self._ranks)
        self.owned = self._of[self._rank]
        self._empty = _empty(params[0])

    def collect(self, grads: list[Tensor]) -> list[Tensor]:
        sent = [[grads[i] for i in of] for of in self._of]
        received = self._swap(sent, [[self._shard(i, rank) for i in self.owned] for rank in self._all()])
        return [torch.cat(rows) for rows in zip(*received, strict=True)]

    def give_back(self, directions: list[Tensor]) -> list[Tensor]:
        rows = [
            d.split([self._shard(i, rank)[0] for rank in self._all()])
            for i, d in zip(self.owned, directions, strict=True)
        ]
        sent = [[shards[rank] for shards in rows] for rank in self._all()]
        received = self._swap(sent, [[self._shard(i, self._rank) for i in of] for of in self._of])
        found = {
            i: d for of, part in zip(self._of, received, strict=True) for i, d in zip(of, part, strict=True)
        }
        return [found[i] for i in range(len(self._shapes))]

    def average(self, grads: list[Tensor]) -> list[Tensor]:
        return grads

    def _all(self) -> range:
        return range(self._ranks)

    def _shard(self, i: int, rank: int) -> torch.Size:
        """The shape of a rank's rows: split like torch.chunk, so the last ranks may have fewer or none."""
        rows, *rest = self._shapes[i]
        most = -(-rows // self._ranks)
        return torch.Size((max(0, min(most, rows - rank * most)), *rest))

    def _swap(self, sent: list[list[Tensor]], shapes: list[list[torch.Size]]) -> list[list[Tensor]]:
        """Send each rank its list, and receive tensors of these shapes from each."""
        counts = [sum(shape.numel() for shape in of) for of in shapes]
        received = self._empty.new_empty(sum(counts))
        buffer = torch.cat([self._empty, *(part.flatten() for parts in sent for part in parts)])
        lengths = [sum(part.numel() for part in parts) for parts in sent]
        dist.all_to_all_single(received, buffer, counts, lengths, group=self._group)
        return [_cut(part, of) for part, of in zip(received.split(counts), shapes, strict=True)]


def _by_owner(works: list[int] | None, ranks: int) -> list[list[int]]:
    """The parameters of each rank."""
    owners = assign_owners(works or [], ranks)
    return [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]


def _empty(p: Tensor) -> Tensor:
    """An empty tensor with the dtype and device of the parameter's step."""
    return torch.empty(0, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32, device=p.device)


def _fill(flat: Tensor, parts: list[Tensor]) -> None:
    if parts:
        torch.cat([part.flatten() for part in parts], out=flat[: sum(part.numel() for part in parts)])


def _cut(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The beginning of a flat tensor as tensors of these shapes: views."""
    sizes = [shape.numel() for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]
