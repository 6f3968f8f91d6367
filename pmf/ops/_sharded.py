"""DTensors: every rank runs the op on its own shards, without communication in the forward pass.

A layout lists the dimensions along which an argument may be sharded, one word per dimension, from the right:

    "b h _ _"   batch and heads; "_" may not be sharded
    "... _"     any of the dimensions before the last
    "* _ _"     the same, and a size of 1 broadcasts: such an argument stays whole on every rank

Dimensions with the same name belong together. Along each mesh dimension all arguments that have the name are
sharded by it (replicated ones are sliced), and the gradient of an argument without it is summed over the
ranks.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ._subclasses import Layouts, kind_of, replace_tensors

__all__ = ["run_sharded"]

Name = str | int
CONSTANTS = ("attn_mask", "cos", "sin")
"""Plain tensors that every rank may hold in full, without a gradient."""


def run_sharded(
    op: Callable[..., Any],
    arguments: dict[str, Any],
    given: Mapping[str, Any],
    layouts: Layouts,
    outputs: tuple[str, ...],
) -> Any:
    name_of_op = op.__name__
    mesh = next(x.device_mesh for x in given.values() if isinstance(x, DTensor))
    tensors = {n: _as_dtensor(name_of_op, n, x, mesh) for n, x in given.items() if kind_of(x) != "bias"}
    dims = {n: _names(layouts[_base(n, layouts)], x.dim()) for n, x in tensors.items()}
    cut = [_cut_along(name_of_op, axis, mesh, tensors, dims) for axis in range(mesh.ndim)]
    sizes: dict[Name, int] = {}
    for n, x in tensors.items():
        for name, size in zip(dims[n], x.shape, strict=True):
            if name is not None:
                sizes[name] = max(sizes.get(name, 0), size)
    check = _Check(name_of_op, mesh, tensors, dims, layouts, sizes, bool(arguments.get("enable_gqa")))
    shards = {n: check.shard_of(n, x, cut) for n, x in tensors.items()}
    results = op(**replace_tensors(arguments, shards))
    if isinstance(results, Tensor):
        return _whole(results, outputs[0], mesh, cut, sizes)
    if isinstance(results, list):  # of matrices, none of them sharded
        return [_whole(y, outputs[0], mesh, cut, sizes) for y in results]
    return tuple(_whole(y, layout, mesh, cut, sizes) for y, layout in zip(results, outputs, strict=False))


def _as_dtensor(op: str, name: str, x: Tensor, mesh: DeviceMesh) -> DTensor:
    if isinstance(x, DTensor):
        if x.device_mesh != mesh:
            raise ValueError(f"{op}: {name} is a DTensor over {x.device_mesh}, and others are over {mesh}")
        return x
    if name in CONSTANTS and not x.requires_grad:
        return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    raise TypeError(
        f"{op}: {name} is a plain tensor beside DTensors; make it one too, for example with "
        "torch.distributed.tensor.distribute_tensor"
    )


def _base(name: str, layouts: Layouts) -> str:
    """The argument whose layout applies: a tangent uses its value's, and a list's entries share one."""
    name = name.split("[")[0]
    return name if name in layouts else name.removesuffix("_t")


def _names(layout: str, ndim: int) -> list[Name | None]:
    """The name of each dimension; those of "..." and "*" are counted from the right."""
    first, *rest = layout.split()
    if first not in ("...", "*"):
        rest, leading = [first, *rest], 0
    else:
        leading = max(ndim - len(rest), 0)
    names = [*(i - leading for i in range(leading)), *(None if word == "_" else word for word in rest)]
    return names[len(names) - ndim :]


def _cut_along(
    op: str,
    axis: int,
    mesh: DeviceMesh,
    tensors: Mapping[str, DTensor],
    dims: Mapping[str, list[Name | None]],
) -> Name | None:
    """The dimensions that one mesh dimension shards: their name, or None."""
    found: dict[Name, str] = {}
    for n, x in tensors.items():
        placement = x.placements[axis]
        if placement.is_replicate() or placement.is_partial():  # partial sums are reduced, as in PyTorch
            continue
        name = dims[n][placement.dim] if type(placement) is Shard else None
        if name is None:
            raise ValueError(
                f"{op}: {n} is a DTensor of placements {list(x.placements)}, along which the op cannot be "
                f"divided; redistribute it first, for example to {[Replicate()] * mesh.ndim}"
            )
        found[name] = n
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise ValueError(
            f"{op}: {first} and {second} are sharded along dimensions that do not belong together, "
            f"{list(tensors[first].placements)} and {list(tensors[second].placements)}; redistribute one"
        )
    return next(iter(found), None)


class _Local(torch.autograd.Function):
    """This rank's local part; backward sums gradients of which each rank has a part.

    DTensor's own redistribute and to_local would suffice, except for an argument without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: DTensor, placements: list[Placement], gradients: list[Placement]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.like, ctx.gradients = (x.device_mesh, x.placements, x.shape, x.stride()), gradients
        local = x.redistribute(placements=placements).to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return None, None, None
        mesh, placements, shape, stride = ctx.like
        found = DTensor.from_local(grad, mesh, ctx.gradients, run_check=False, shape=shape, stride=stride)
        return found.redistribute(placements=[_settled(p) for p in placements]), None, None


def _settled(placement: Placement) -> Placement:
    """For a partial sum, each rank's part has the gradient of the whole."""
    return Replicate() if placement.is_partial() else placement


class _Check:
    """Takes each argument's shard if the op can run on shards; raises ValueError otherwise."""

    def __init__(
        self,
        op: str,
        mesh: DeviceMesh,
        tensors: Mapping[str, DTensor],
        dims: Mapping[str, list[Name | None]],
        layouts: Layouts,
        sizes: Mapping[Name, int],
        groups: bool,
    ) -> None:
        self.op, self.mesh, self.tensors, self.dims, self.layouts = op, mesh, tensors, dims, layouts
        self.sizes, self.groups = sizes, groups

    def shard_of(self, name: str, x: DTensor, cut: list[Name | None]) -> Tensor:
        placements: list[Placement] = []
        gradients: list[Placement] = []
        for by in cut:
            here = by is not None and by in self.dims[name] and not self._broadcasts(name, x, by)
            if here:
                dim = self.dims[name].index(by)
                self._fits(name, x, dim, by, cut)
                placements.append(Shard(dim))
                gradients.append(Shard(dim))
            else:
                placements.append(Replicate())
                gradients.append(Replicate() if by is None else Partial())
        return _Local.apply(x, placements, gradients)

    def _broadcasts(self, name: str, x: DTensor, by: Name) -> bool:
        layout = self.layouts[_base(name, self.layouts)]
        if not layout.startswith("*") or isinstance(by, str):
            return False
        return x.shape[self.dims[name].index(by)] == 1 and self.sizes[by] != 1

    def _fits(self, name: str, x: DTensor, dim: int, by: Any, cut: list[Name | None]) -> None:
        ranks = 1
        for axis, other in enumerate(cut):
            ranks *= self.mesh.size(axis) if other == by else 1
        size, whole = x.shape[dim], self.sizes[by]
        if size == whole and (by != "h" and not (self.groups and by == -1)):
            return
        is_heads = by == "h" or (self.groups and by == -1)
        if is_heads and size % ranks == 0 and whole % ranks == 0 and self._is_like_its_value(name, x, dim):
            return
        raise ValueError(
            f"{self.op}: {name} has size {size} in dimension {dim}, which is sharded over {ranks} ranks, "
            f"where others have {whole}: a rank cannot tell which belong together; replicate them all"
        )

    def _is_like_its_value(self, name: str, x: DTensor, dim: int) -> bool:
        value = self.tensors.get(name.removesuffix("_t"), x)
        return value.shape[dim] == x.shape[dim]


def _whole(
    y: Tensor, layout: str, mesh: DeviceMesh, cut: list[Name | None], sizes: Mapping[Name, int]
) -> DTensor:
    names = _names(layout, y.dim())
    placements = [Replicate() if by is None else Shard(names.index(by)) for by in cut]
    shape = list(y.shape)
    for by in {by for by in cut if by is not None}:
        dim, ranks = names.index(by), math.prod(mesh.size(i) for i, other in enumerate(cut) if other == by)
        shape[dim] = shape[dim] * ranks if by == "h" else sizes[by]  # queries and keys differ in heads
    stride, step = [0] * y.dim(), 1
    for d in sorted(range(y.dim()), key=lambda d: (y.stride(d), -d)):
        stride[d], step = step, step * max(shape[d], 1)
    return DTensor.from_local(
        y, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
