"""Value and tangent of any network, as a module."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import (
    TreeSpec,
    register_pytree_node,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

from pmf import ops
from pmf.wrappers import refuse_data_parallel

from .mode import DIFFERENTIATES, TangentMode, is_active
from .samples import FirstSamples
from .scripted import without_torchscript
from .sdpa import attention, is_plain, replace_attribute, replace_sdpa, torchs

__all__ = ["Jvp"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Directions = Sequence[Tensor | None]
"""Tangents of the primals' leaves, in order."""


class Jvp(nn.Module):
    """Any network with the tangent of its output, as an ordinary differentiable module.

        out, out_t = pmf.Jvp(network)((z, t, r), (z_t, t_t, None), label=label)

        out = f(z, t, r),  out_t = df(z, t, r) [z_t, t_t, 0]

    Args of a call:
        primals: the network's positional arguments; pytrees of tensors, other leaves are passed through.
        tangents: their tangents, in their shapes and dtypes; None is zero, for a tensor or a whole argument.
            If the first dimension of all primals is the batch, they may cover only the first n samples, and
            cost only theirs as long as the network treats samples independently.
        detach_tangent: the tangent is a constant for autograd and for transforms around the call: it saves
            nothing, and backward costs the same as for the network alone. False is torch.func.jvp within
            `replace_sdpa`, differentiable throughout.
        constants: the network's keyword arguments, which have no tangents.

    Returns (out, out_t), structured like the network's output; the tangent of a non-tensor is None, and of a
    tensor that does not depend on the primals zero. With tangents for n samples, out_t has the first n rows.

    The network is called once, as usual: hooks, checkpoints, buffers, random numbers, autocast, DDP, FSDP2
    (around this module or around its layers) and torch.compile around this module see an ordinary forward
    pass, in which attention is `pmf.ops.attention`. Under a torch.func transform it is torch.func.jvp.

    Parameters and buffers are the network's own; their names in a state dict start with "network.".

    Raises TypeError or ValueError if tangents do not fit, NotImplementedError for an operator without forward
    mode and for tensor subclasses, and RuntimeError for what a detached tangent cannot follow: derivatives in
    the network, autograd.Functions other than PyTorch's and this library's, values that leave PyTorch.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"Jvp: network must be a torch.nn.Module, got {type(network).__name__}")
        for name, module in network.named_modules():  # whose threads would know no tangents
            refuse_data_parallel(module, f"Jvp: the network's {name}" if name else "Jvp: the network")
        self.network = network

    def forward(
        self, primals: Sequence[Any], tangents: Sequence[Any], detach_tangent: bool = True, **constants: Any
    ) -> tuple[Any, Any]:
        primals, given, count = _pair(primals, tangents)
        compiling = torch.compiler.is_compiling()
        transformed = not detach_tangent or _in_transform(compiling)
        samples = None
        if count is not None:
            refuse_data_parallel(self, "Jvp: with tangents of the first samples, this module")
            batches = _batches(primals, given)
            if count == 0:
                given = [None] * len(given)
            elif not transformed and all(batch == batches[0] for batch in batches):
                samples = count, batches[0]
            else:
                given = _completed(primals, given)
        if transformed:
            with contextlib.ExitStack() as entered:
                entered.enter_context(replace_sdpa())
                if not compiling:  # Dynamo traces no locks, and TorchScript only by itself
                    entered.enter_context(without_torchscript())
                    entered.enter_context(_Lstms())
                out, out_t = _by_transform(self.network, primals, given, constants)
        elif compiling:
            from . import _compiled

            out, out_t = _compiled.call(self.network, primals, given, constants, samples)
        else:
            with replace_attribute(), _in_one_sentence(), _freed_early():
                out, out_t = beside(self.network, primals, given, constants, samples)
        if detach_tangent:
            out_t = tree_map_only(Tensor, torch.Tensor.detach, out_t)
        if count is not None:
            out_t = tree_map_only(Tensor, lambda t: t[:count] if t.dim() else t, out_t)
        return out, out_t


def beside(
    network: nn.Module,
    primals: Sequence[Any],
    given: Directions,
    constants: dict[str, Any],
    samples: tuple[int, int] | None = None,
) -> tuple[Any, Any]:
    """One pass of the network with its tangents, which may be those of the first n of B samples."""
    if is_active():
        raise RuntimeError(
            "Jvp: the network of a Jvp calls another Jvp; use torch.func.jvp for higher derivatives"
        )
    mode = TangentMode() if samples is None else FirstSamples(*samples)
    leaves, spec = tree_flatten(tuple(primals))
    for i, t in enumerate(given):
        if t is not None:
            # A separate tensor: the same one may be passed twice, or also be a constant.
            leaves[i] = leaves[i].view_as(leaves[i])
            if isinstance(mode, FirstSamples):
                mode.set_first(leaves[i], t.detach().clone(), 0)
            else:
                mode.alias(leaves[i], torch.empty_like(leaves[i]).copy_(t.detach()))
    with mode, _FromAbove(mode), without_torchscript():
        out = network(*tree_unflatten(leaves, spec), **constants)
    out_leaves, out_spec = _flatten(out)
    out_ts = [_tangent_of(mode, y) for y in out_leaves]
    return out, tree_unflatten(out_ts, out_spec)


class _FromAbove(TorchFunctionMode):
    """What a dispatch mode does not see, or sees only in pieces or without a derivative.

    Tensor.detach_ and data, values that leave PyTorch, RMS normalisation, LSTMs, and attention whose name was
    imported before it was replaced.
    """

    def __init__(self, mode: TangentMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs is None:
            kwargs = {}
        if func in _LEAVES:
            self._require_constants(_LEAVES[func], args)
        if func is F.rms_norm and (found := _rms_norm(*args, **kwargs)) is not None:
            return found
        if func is torchs:
            return attention(*args, **kwargs)
        if func is torch.lstm:
            return _lstm(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _DETACHES:
            self.mode.detach(out)
        return out

    def _require_constants(self, what: str, args: Any) -> None:
        if any(self.mode.stored(x) is not None for x in args):
            raise RuntimeError(
                f"Jvp: the network uses {what} of a value with a tangent, which cannot follow: use PyTorch's "
                "operators, or detach() the value if it is a constant"
            )


_LEAVES = {
    torch.Tensor.numpy: "numpy()",
    torch.Tensor.__array__: "numpy()",
    torch.Tensor.__dlpack__: "DLPack",
    torch.Tensor.data_ptr: "data_ptr()",
    torch.Tensor.untyped_storage: "the storage",
    torch.Tensor.__deepcopy__: "Python's deepcopy",
    torch.Tensor.data.__set__: "an assignment to or from .data",  # type: ignore[attr-defined]
}
"""What no operator sees: it takes a value's memory away, or replaces it."""
_DETACHES = {torch.Tensor.detach_, torch.detach_, torch.Tensor.data.__get__}  # type: ignore[attr-defined]


def _rms_norm(
    input: Any, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor | None:
    """F.rms_norm as one operator where ours applies; PyTorch's is six, each with a tangent.

    Not in a checkpointed block, whose recomputation must save what this pass does, nor under autocast, which
    changes the dtype.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if weight is None or torch._C._is_any_autocast_enabled() or (hooks and hooks[0] is not _pack):
        return None
    if not is_plain(input) or not is_plain(weight) or input.is_nested or input.dtype != weight.dtype:
        return None
    if not weight.shape == input.shape[-1:] == tuple(normalized_shape) or input.dtype not in _FLOATING:
        return None
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    return ops.rms_norm(input, weight, eps)


def _lstm(*args: Any, **kwargs: Any) -> Any:
    """torch.lstm by elementary operators: oneDNN's, for 16 and 32 bits on the CPU, has no forward mode."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return torch.lstm(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(before)


class _Lstms(TorchFunctionMode):
    """The same under torch.func.jvp."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_lstm if func is torch.lstm else func)(*args, **(kwargs or {}))


def _by_transform(
    network: nn.Module, primals: Sequence[Any], given: Directions, constants: dict[str, Any]
) -> tuple[Any, Any]:
    """torch.func.jvp, for networks that return more than tensors."""
    leaves, spec = tree_flatten(tuple(primals))
    where = [i for i, t in enumerate(given) if t is not None]
    found: list[Any] = []

    def moved(*x: Tensor) -> tuple[Tensor, ...]:
        inputs = list(leaves)
        for i, value in zip(where, x, strict=True):
            inputs[i] = value
        found[:] = _flatten(network(*tree_unflatten(inputs, spec), **constants))
        return tuple(y for y in found[0] if isinstance(y, Tensor))

    if where:
        directions = tuple(t for t in given if t is not None)
        values, tangents = torch.func.jvp(moved, tuple(leaves[i] for i in where), directions)[:2]
    else:
        values = moved()
        tangents = tuple(torch.zeros_like(y) for y in values)
    (out_leaves, out_spec), each, each_t = found, iter(values), iter(tangents)
    out = [next(each) if isinstance(y, Tensor) else y for y in out_leaves]
    out_t = [next(each_t) if isinstance(y, Tensor) else None for y in out_leaves]
    return tree_unflatten(out, out_spec), tree_unflatten(out_t, out_spec)


class Constant:
    """What a graph of torch.compile returns besides tensors, as part of the structure of its output."""

    def __init__(self, value: Any) -> None:
        self.value = value


register_pytree_node(Constant, lambda held: ([], held.value), lambda _, value: value)


def _pair(primals: Any, tangents: Any) -> tuple[tuple[Any, ...], Directions, int | None]:
    """The primals, the tangents of their leaves, and the number of samples these cover, if not all."""
    if not isinstance(primals, (tuple, list)) or not isinstance(tangents, (tuple, list)):
        raise TypeError(
            "Jvp: primals and tangents must be tuples, one entry for each argument of the network"
        )
    if len(primals) != len(tangents):
        raise ValueError(f"Jvp: there are {len(primals)} primals and {len(tangents)} tangents")
    given: list[Tensor | None] = []
    for i, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):
        x, spec = tree_flatten(primal)
        t, spec_t = ([None] * len(x), spec) if tangent is None else tree_flatten(tangent)
        if spec != spec_t:
            raise ValueError(f"Jvp: tangent {i} has a different structure from its primal: {spec_t}, {spec}")
        for value, direction in zip(x, t, strict=True):
            _check(i, value, direction)
        given += t
    leaves, _ = tree_flatten(tuple(primals))
    fewer = [len(t) for x, t in zip(leaves, given, strict=True) if t is not None and t.shape != x.shape]
    if not fewer:
        return tuple(primals), given, None
    count = fewer[0]  # a set would make torch.compile fix it
    if any(t is not None and (t.dim() == 0 or len(t) != count) for t in given):
        raise ValueError("Jvp: all tangents must cover the same first samples")
    return tuple(primals), given, count


def _batches(primals: Sequence[Any], given: Directions) -> list[int]:
    """The first dimension of each primal with a tangent."""
    leaves, _ = tree_flatten(tuple(primals))
    return [len(x) for x, t in zip(leaves, given, strict=True) if t is not None]


def _completed(primals: Sequence[Any], given: Directions) -> Directions:
    """Tangents for all samples, zero after the first."""
    leaves, _ = tree_flatten(tuple(primals))
    return [
        None if t is None else torch.cat((t, t.new_zeros((len(x) - len(t), *x.shape[1:]))))
        for x, t in zip(leaves, given, strict=True)
    ]


def _check(i: int, value: Any, tangent: Any) -> None:
    if isinstance(value, Tensor) and (not is_plain(value) or value.is_nested):
        kind = "a nested tensor" if value.is_nested else f"a {type(value).__name__}"
        raise TypeError(f"Jvp: primal {i} is {kind}; pass plain tensors")
    if tangent is None:
        return
    if not isinstance(value, Tensor) or not isinstance(tangent, Tensor):
        kinds = f"{type(value).__name__} and {type(tangent).__name__}"
        raise TypeError(
            f"Jvp: primal {i} and its tangent must be tensors, got {kinds}; None is a zero tangent"
        )
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"Jvp: primal {i} is {value.dtype}, which has no tangent: pass None")
    if tangent.dtype != value.dtype or tangent.device != value.device:
        raise TypeError(
            f"Jvp: tangent {i} must be {value.dtype} on {value.device} like its primal, "
            f"got {tangent.dtype} on {tangent.device}"
        )
    fits = (
        tangent.dim() == value.dim() > 0
        and tangent.shape[1:] == value.shape[1:]
        and len(tangent) <= len(value)
    )
    if tangent.shape != value.shape and not fits:
        raise ValueError(
            f"Jvp: tangent {i} must have the shape of its primal {list(value.shape)}, or of its first "
            f"samples, got {list(tangent.shape)}"
        )


def _in_transform(compiling: bool) -> bool:
    """Whether a torch.func transform is active, in which the mode would see wrapped tensors."""
    if not compiling:
        return torch._C._functorch.maybe_current_level() is not None
    from pmf.ops import _compiled

    return _compiled.in_transform()


def _flatten(out: Any) -> tuple[list[Any], TreeSpec]:
    leaves, spec = tree_flatten(out)
    for y in leaves:
        if not isinstance(y, Tensor) and (kind := _hides_tensors(y)):
            raise TypeError(
                f"Jvp: the network returns tensors in an object of class {kind}, which must be registered by "
                "torch.utils._pytree.register_pytree_node"
            )
    if not any(isinstance(y, Tensor) for y in leaves):
        raise TypeError(f"Jvp: the network returns no tensor but {type(out).__name__}: return a tensor")
    return leaves, spec


def _hides_tensors(value: Any) -> str | None:
    """The name of a class that holds tensors and that PyTorch does not look into."""
    held = [*getattr(value, "__dict__", {}).values()]
    held += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
    if isinstance(value, (dict, list, tuple, set)):
        held += value.values() if isinstance(value, dict) else value
    found = any(isinstance(x, Tensor) for each in held for x in tree_leaves(each))
    return type(value).__name__ if found else None


def _tangent_of(mode: TangentMode, value: Any) -> Tensor | None:
    """The tangent of an output: zero if it is constant, of the first samples only if that is all."""
    if not isinstance(value, Tensor):
        return None
    mode.check_class(value)
    t = mode.stored(value)
    if t is not None and t.shape[1:] != value.shape[1:]:
        t = mode.get(value)
    return torch.zeros_like(value) if t is None else t


@contextlib.contextmanager
def _in_one_sentence() -> Iterator[None]:
    """Errors of torch.func about the surroundings that this module creates."""
    try:
        yield
    except RuntimeError as error:
        if "saved tensor hooks" in str(error) or "Nested forward mode" in str(error):
            raise RuntimeError(DIFFERENTIATES) from error
        raise


def _freed_early() -> contextlib.AbstractContextManager[Any]:
    """Let autograd save aliases, so that a value and its tangent are freed after their last use.

    The user's own hooks remain active: those of checkpointing and offloading do not keep values either.
    """
    hooks_there = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if not torch.is_grad_enabled() or hooks_there:
        return contextlib.nullcontext()

    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(x: Tensor) -> tuple[Tensor, int]:
    unseen = torch._C._DisableTorchDispatch()
    alias = x.detach()
    del unseen
    return alias, x._version


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    alias, version = saved
    if alias._version != version:  # autograd's own check, which it leaves to hooks
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {list(alias.shape)} is at version {alias._version}; expected version {version}"
        )
    return alias
