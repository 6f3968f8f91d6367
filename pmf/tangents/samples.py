"""Tangents of only the first samples: n of B, at the cost of n.

Such a tangent is smaller than its value in one dimension, where it covers the first n of the B equal parts of
the value's. Its memory is that of n samples, with the value's strides: the samples are outermost in memory.
An operator that treats all samples alike and independently runs once for the values, and its rule runs on the
first n samples of the arguments. For any other operator, or if samples are not outermost, `FirstSamples.get`
pads tangents with zeros, and the network continues with tangents for all.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import rules
from .mode import TangentMode, same_strides, tensors_of

__all__ = ["FirstSamples"]

aten = torch.ops.aten

Named = dict[str, Any]
"""An operator's arguments by name."""
Samples = dict[int, int]
"""Maps the id of a tensor with a tangent to the dimension that holds its samples."""
Plan = tuple[Named, tuple[int | None, ...]] | None
"""The arguments for the first samples, and the dimension of samples in each result; None if that fails."""


class FirstSamples(TangentMode):
    """Tangents of the first count of batch samples, where these lie outermost in memory, else of all."""

    def __init__(self, count: int, batch: int) -> None:
        super().__init__()
        self.count, self.batch = count, batch

    def get(self, x: Any) -> Tensor | None:
        t = self.stored(x)
        return t if t is None or (dim := _dimension(x, t)) is None else self._complete(x, t, dim)

    def both(self, x: Any, y: Any) -> tuple[Tensor | None, Tensor | None]:
        t_x, t_y = self.stored(x), self.stored(y)
        alike = t_x is not None and t_y is not None and x.shape == y.shape and t_x.shape == t_y.shape
        return (t_x, t_y) if t_y is None or alike else super().both(x, y)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        found = self._by_sample(func, args, kwargs)
        return super().run(func, args, kwargs) if found is NotImplemented else found

    def _by_sample(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The operator with tangents for the first samples; NotImplemented if it needs complete ones."""
        dims: Samples = {}
        for x in tensors_of((*args, *kwargs.values()) if kwargs else args):
            if x.is_complex():
                return NotImplemented
            if (t := self.stored(x)) is not None:
                if (dim := _dimension(x, t)) is None:
                    return NotImplemented
                dims[id(x)] = dim
        if not dims:
            return NotImplemented
        rule = self._rules[func]
        if func is aten._unsafe_view.default or rule is rules._view:
            return self._view(func, args, kwargs, dims)
        plan, names = _plans[func]
        if plan is None or rule is rules._composite:
            return NotImplemented
        first: Any = _First(self, dims)
        named = dict(zip(names, args, strict=False)) | kwargs
        if plan is _natively:
            if any(dim != 0 for dim in dims.values()) or not _are_samples(args, dims):
                return NotImplemented
            if named.get("cu_seqlens_k") is not None:
                return NotImplemented
            first.takes_whole = True
            out = rule(first, func, args, kwargs)
            for value in out if isinstance(out, tuple) else (out,):
                self.set_first(value, first.get(value), 0)
            return out
        made = plan(first, named)
        if made is None:
            return NotImplemented
        named, places = made
        if any(id(x) in dims for x in named.values()):  # in two roles, one of them not narrowed
            return NotImplemented
        out = func(*args, **kwargs)
        values = out if isinstance(out, tuple) else (out,)
        first.value_is([x if d is None else first.narrow(x, d) for x, d in zip(values, places, strict=True)])
        given = [named[name] for name in names[: len(args)]]
        found = rule(first, func, given, {name: named[name] for name in kwargs})
        found = found if isinstance(found, tuple) else (found,)
        for value, sub, d in zip(values, found, places, strict=True):
            if id(sub) in first.left:
                self.leave(value)
            elif d is not None:
                self.set_first(value, first.get(sub), d)
        return out

    def _view(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], dims: Samples) -> Any:
        """A view: the same view of the tangent's memory, if it shows the same part of every sample."""
        x = args[0]
        t = self.stored(x)
        out = func(*args, **kwargs)
        assert t is not None
        views = [out] if isinstance(out, Tensor) else list(out)
        sample = self._sample(x, dims[id(x)])
        first = [self._same_view(x, t, sample, y) for y in views]
        if any(y is None for y in first):
            return NotImplemented
        for y, y_t in zip(views, first, strict=True):
            self.alias(y, y_t)
        return out

    def _sample(self, x: Tensor, dim: int) -> int:
        """How many elements lie between two samples of a value that has them in this dimension."""
        return x.shape[dim] * x.stride(dim) // self.batch

    def _same_view(self, x: Tensor, t: Tensor, sample: int, view: Tensor) -> Tensor | None:
        """The view of a tangent for the first samples.

        None if it does not show the same part of every sample, along one dimension.
        """
        if view.dtype != x.dtype:
            return None
        offset = t.storage_offset() + view.storage_offset() - x.storage_offset()
        shape, strides = view.shape, view.stride()
        for d, size in enumerate(shape):
            if size * strides[d] == self.batch * sample and size % self.batch == 0:
                sizes = [*shape[:d], size // self.batch, *shape[d + 1 :]]
                if 0 <= offset and offset + _reach(sizes, strides) < sample and view.numel() > 0:
                    sizes[d] *= self.count
                    return t.as_strided(sizes, strides, offset)
        return None

    def set_first(self, x: Tensor, tangent: Tensor | None, dim: int) -> None:
        """Set the tangent of a new value's first samples, in dimension dim.

        It is completed if samples are not outermost in the value's memory.
        """
        if tangent is None or not (x.is_floating_point() or x.is_complex()):
            return
        if tangent.dtype != x.dtype:
            tangent = tangent.to(x.dtype)
        shape, strides = list(x.shape), x.stride()
        dense = x.is_contiguous() or _reach(shape, strides) + 1 == x.numel()
        outermost = dense and shape[dim] * strides[dim] == x.numel() and not x.is_complex()
        shape[dim] = self.share(shape[dim])
        if not outermost:
            whole = torch.zeros_like(x)
            whole.narrow(dim, 0, shape[dim]).copy_(tangent)
            self.alias(x, whole)
            return
        fits = list(tangent.shape) == shape and same_strides(tangent, x)
        if not fits or tangent.storage_offset() != 0:
            tangent = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).copy_(tangent)
        self.alias(x, tangent)

    def share(self, size: int) -> int:
        """The size of the first samples, in a dimension that holds all."""
        return size // self.batch * self.count

    def _complete(self, x: Tensor, t: Tensor, dim: int) -> Tensor:
        """Extend the tangent of the first samples to all, and with it those of all views of its memory."""
        sample, storage = self._sample(x, dim), t.untyped_storage()
        whole, held = t.new_zeros(self.batch * sample), self.count * sample
        whole[:held] = t.as_strided((held,), (1,), 0)
        for key, (reference, other) in list(self._of.items()):
            y = reference()
            if y is not None and other is not None and other.untyped_storage()._cdata == storage._cdata:
                view = whole.as_strided(y.size(), y.stride(), other.storage_offset())
                self._of[key] = reference, view
        found = self.stored(x)
        assert found is not None
        return found


class _First:
    """What a rule sees of a TangentMode while it runs on the first samples."""

    takes_whole = False
    left: frozenset[int] = frozenset()
    """The ids of results whose tangents are not computed."""

    def __init__(self, mode: FirstSamples, dims: Samples) -> None:
        self.mode, self.dims = mode, dims
        self._of: dict[int, tuple[Tensor, Tensor | None]] = {}

    def get(self, x: Any) -> Tensor | None:
        if (entry := self._of.get(id(x))) is not None:
            return entry[1]
        return self.mode.stored(x) if self.takes_whole and isinstance(x, Tensor) else None

    def set(self, x: Tensor, tangent: Tensor | None) -> None:
        self._of[id(x)] = x, tangent  # which keeps its id taken

    alias = set

    def leave(self, *statistics: Tensor) -> None:
        self.left = frozenset(map(id, statistics))

    def buffer(self, like: Tensor) -> Tensor | None:
        return self.mode.buffer(like)

    def value(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """The value for the first samples, which already exists."""
        return func(*args, **kwargs) if self.takes_whole else self._value

    def value_is(self, values: Sequence[Any]) -> None:
        self._value = values[0] if len(values) == 1 else tuple(values)

    def narrow(self, x: Tensor, dim: int) -> Tensor:
        """The first samples of x, whose dimension dim holds samples."""
        part = x.narrow(dim, 0, self.mode.share(x.shape[dim]))
        if id(x) in self.dims:
            self.set(part, self.mode.stored(x))
        return part


def _dimension(x: Tensor, t: Tensor) -> int | None:
    """The dimension in which a value is larger than its tangent, if any."""
    for d, n in enumerate(t.shape):
        if n != x.shape[d]:
            return d
    return None


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How far the last element of a tensor is from its first."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True) if n > 0)


Planner = Callable[[_First, Named], Plan]

# Plans: which part of each argument belongs to the first samples.


def _pointwise(first: _First, named: Named) -> Plan:
    """Arguments broadcast: dimensions count from the last."""
    given = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    if any(isinstance(x, (list, tuple)) and tensors_of(x) for x in named.values()):
        return None
    places = {first.dims[id(x)] - x.dim() for x in given.values() if id(x) in first.dims}
    if len(places) != 1:
        return None
    (place,) = places
    for name, x in given.items():
        if x.dim() >= -place and x.shape[place] != 1:
            named[name] = first.narrow(x, x.dim() + place)
    rank = max(x.dim() for x in given.values())
    return named, (rank + place,)


def _dropout(first: _First, named: Named) -> Plan:
    x = named["input"]
    d = first.dims[id(x)]
    named["input"] = first.narrow(x, d)
    return named, (d, None if named["train"] is False else d)


def _rows_of(*factors: str) -> Planner:
    """A product: samples are rows of the first factor, or matrices of both."""

    def plan(first: _First, named: Named) -> Plan:
        left, right = (named[name] for name in factors)
        batched = left.dim() == 3
        if first.dims.keys() - ({id(left), id(right)} if batched else {id(left)}):
            return None
        if any(d != 0 for d in first.dims.values()):
            return None
        for name in factors if batched else factors[:1]:
            named[name] = first.narrow(named[name], 0)
        rest = [x for name, x in named.items() if isinstance(x, Tensor) and name not in factors]
        if any(x.dim() != 1 for x in rest):
            return None
        return named, (0,)

    return plan


def _alone(name: str, dims: Callable[[Named, int], bool], results: int = 1) -> Planner:
    """One argument has samples, in a dimension that `dims` accepts and each result keeps."""

    def plan(first: _First, named: Named) -> Plan:
        x = named[name]
        if first.dims.keys() != {id(x)} or not dims(named, d := first.dims[id(x)]):
            return None
        named[name] = first.narrow(x, d)
        return named, (d,) * results

    return plan


def _listed(named: Named, name: str, rank: int) -> set[int]:
    """Dimensions in an argument; all of them if there are none."""
    found = named.get(name)
    found = [found] if isinstance(found, int) else found
    return {d % rank for d in found} if found else set(range(rank))


def _other_dimension(x: str, name: str) -> Callable[[Named, int], bool]:
    return lambda named, d: d not in _listed(named, name, named[x].dim())


def _reduced(first: _First, named: Named) -> Plan:
    x = named["self"]
    d, gone = first.dims[id(x)], _listed(named, "dim", x.dim())
    if first.dims.keys() != {id(x)} or d in gone:
        return None
    named["self"] = first.narrow(x, d)
    return named, (d if named.get("keepdim") else d - sum(other < d for other in gone),)


def _joined(first: _First, named: Named) -> Plan:
    parts, dim = named["tensors"], named.get("dim", 0)
    places = {first.dims[id(x)] for x in parts if id(x) in first.dims}
    if len(places) != 1 or len({x.dim() for x in parts}) != 1:
        return None
    (d,), dim = places, dim % parts[0].dim()
    if d == dim:
        return None
    named["tensors"] = [first.narrow(x, d) for x in parts]
    return named, (d,)


def _stacked(first: _First, named: Named) -> Plan:
    parts = named["tensors"]
    places = {first.dims[id(x)] for x in parts if id(x) in first.dims}
    if len(places) != 1:
        return None
    (d,) = places
    named["tensors"] = [first.narrow(x, d) for x in parts]
    return named, (d + (named.get("dim", 0) % (parts[0].dim() + 1) <= d),)


def _group_norm(first: _First, named: Named) -> Plan:
    x = named["input"]
    if first.dims != {id(x): 0} or x.shape[0] != named["N"]:
        return None
    named["input"], named["N"] = first.narrow(x, 0), first.mode.share(named["N"])
    return named, (0, 0, 0)


def _natively(first: _First, named: Named) -> Plan:
    """Operators of this library whose tangents may cover the first samples only."""
    raise AssertionError


def _are_samples(args: Sequence[Any], dims: Samples) -> bool:
    """Whether only arguments that consist of samples have tangents, and one of the first two has.

    Masks, weights and gates, which may be the same for all samples, have no tangents of the first alone.
    """
    given = [i for i, x in enumerate(args) if id(x) in dims]
    return given[0] < 2 and given[-1] < 3 and all(1 < args[i].dim() == args[0].dim() for i in given)


def _images(rank: int) -> Callable[[Named, int], bool]:
    return lambda named, d: d == 0 and named["self"].dim() == rank


_along_dim = _alone("self", _other_dimension("self", "dim"))
_along_dims = _alone("self", _other_dimension("self", "dims"))
_PLANS: dict[Any, Planner] = {
    aten.clone.default: _pointwise,
    aten._to_copy.default: _pointwise,
    aten.hardswish.default: _pointwise,
    aten.native_dropout.default: _dropout,
    aten.mm.default: _rows_of("self", "mat2"),
    aten.bmm.default: _rows_of("self", "mat2"),
    aten.addmm.default: _rows_of("mat1", "mat2"),
    aten._softmax.default: _along_dim,
    aten._log_softmax.default: _along_dim,
    aten.cumsum.default: _along_dim,
    aten.index_select.default: _along_dim,
    aten.roll.default: _along_dims,
    aten.flip.default: _along_dims,
    aten.sum.dim_IntList: _reduced,
    aten.mean.dim: _reduced,
    aten.amax.default: _reduced,
    aten.amin.default: _reduced,
    aten.logsumexp.default: _reduced,
    aten.var.correction: _reduced,
    aten.std.correction: _reduced,
    aten.linalg_vector_norm.default: _reduced,
    aten.cat.default: _joined,
    aten.stack.default: _stacked,
    aten.native_group_norm.default: _group_norm,
    aten.native_layer_norm.default: _alone(
        "input", lambda named, d: d < named["input"].dim() - len(named["normalized_shape"]), 3
    ),
    aten.constant_pad_nd.default: _alone(
        "self", lambda named, d: d < named["self"].dim() - len(named["pad"]) // 2
    ),
    aten.convolution.default: _alone(
        "input", lambda named, d: d == 0 and named["input"].dim() == named["weight"].dim()
    ),
    aten.avg_pool2d.default: _alone("self", _images(4)),
    aten._adaptive_avg_pool2d.default: _alone("self", _images(4)),
    aten.max_pool2d_with_indices.default: _alone("self", _images(4), 2),
    aten.upsample_nearest1d.default: _alone("self", _images(3)),
    aten.upsample_nearest2d.default: _alone("self", _images(4)),
    aten.upsample_bilinear2d.default: _alone("self", _images(4)),
}


class _Plans(dict[Any, tuple[Planner | None, list[str]]]):
    """Each operator's plan, and the names of its arguments."""

    def __missing__(self, func: Any) -> tuple[Planner | None, list[str]]:
        names = [argument.name for argument in func._schema.arguments]
        found = self[func] = _PLANS.get(func, _other_plan(func)), names
        return found


_plans = _Plans()


def _other_plan(func: Any) -> Planner | None:
    name = func._schema.name
    if name in ("pmf::attention_forward", "pmf::rms_norm", "pmf::swiglu", "pmf::gated_residual"):
        return _natively
    if name in ("pmf::product", "pmf::add_product"):
        return _rows_of("left", "right")
    if torch.Tag.pointwise in func.tags and not func._schema.is_mutable and len(func._schema.returns) == 1:
        return _pointwise
    return None
