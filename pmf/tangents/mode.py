"""Tangents alongside the values of a network that runs as usual: a dispatch mode below autograd.

The network is called normally. Below autograd the mode intercepts every operator and computes its value,
which autograd above records as usual, and its tangent, which autograd never sees. A tangent therefore costs
only its own products, saves nothing for backward, and leaves an ordinary forward pass for hooks, checkpoints,
DDP and FSDP. The rules for single operators are in `rules`.

A tangent has the sizes and strides of its value, and aliases of a value have aliases of its tangent, so that
writing to a view also writes to the tangent of its base. Existing memory without a tangent gets a shadow, a
tangent for its whole storage, when a value with a tangent is written to it.

What the mode cannot see raises: calls of PyTorch's autograd by the network itself, whose saved values carry
no tangents, and third-party autograd.Functions, whose derivative may differ from that of their forward.
"""

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

__all__ = ["LAZY", "TangentMode", "is_active"]

_Keys = torch._C.DispatchKey
# Excluded below autograd, but needed for tensors with a conjugate or negative bit.
LAZY = (_Keys.Conjugate, _Keys.Negative, _Keys.ZeroTensor)
# Values arrive already cast, and tangents follow them.
_AUTOCAST = tuple(getattr(_Keys, name) for name in ("AutocastCPU", "AutocastCUDA"))

DIFFERENTIATES = (
    "Jvp: the network differentiates within its forward (torch.autograd or torch.func), which detached "
    "tangents do not follow: call it with detach_tangent=False, which is torch.func.jvp"
)

LARGE = 1 << 20
"""Tangents of at least this many bytes take turns in a few buffers."""


def is_active() -> bool:
    """Whether this thread is inside a network whose tangents are being computed."""
    return any(isinstance(mode, TangentMode) for mode in _get_current_dispatch_mode_stack())


class TangentMode(TorchDispatchMode):
    """The tangents of all values while the mode is active; rules use `value`, `get`, `set` and `write`.

    samples: (n, B) if tangents cover the first n of B samples (`samples`).
    """

    supports_higher_order_operators = True

    def __init__(self, samples: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.samples = samples
        self._of: dict[int, tuple[weakref.ref[Tensor], Tensor | None]] = {}
        self._shadows: dict[int, tuple[StorageWeakRef, Tensor]] = {}
        self._buffers: list[UntypedStorage] = []
        self._graph_task = torch._C._current_graph_task_id()
        from .rules import rule_of  # which imports this module
        from .samples import by_sample

        self.rule_of, self._by_sample = rule_of, by_sample

    @staticmethod
    def value(func: Any, *args: Any, **kwargs: Any) -> Any:
        """What an operator returns, computed once; rules for its tangent also run on the first samples."""
        return func(*args, **kwargs)

    def get(self, x: Any) -> Tensor | None:
        """The tangent of a value, for all samples; None means zero."""
        if not isinstance(x, Tensor):
            return None
        t = self.stored(x)
        return t if self.samples is None or t is None or t.shape == x.shape else self._complete(x, t)

    def stored(self, x: Tensor) -> Tensor | None:
        """The tangent of a value, perhaps for the first samples only."""
        entry = self._of.get(id(x))
        if entry is not None and entry[0]() is x:
            return entry[1]
        if self._shadows and (found := self._shadows.get(x.untyped_storage()._cdata)) is not None:
            return found[1].as_strided(x.size(), x.stride(), x.storage_offset())
        return None

    def set(self, x: Tensor, tangent: Tensor | None) -> None:
        """Set the tangent of a new value, in its dtype, sizes and strides."""
        if tangent is None or not (x.is_floating_point() or x.is_complex()):
            return
        if tangent.dtype != x.dtype:
            tangent = tangent.to(x.dtype)
        fits = tangent.shape == x.shape and _same_strides(tangent, x)
        if not (fits and self._in_buffer(tangent)):
            buffer = self.buffer(x)
            if buffer is not None:
                tangent = buffer.copy_(tangent)
            elif not fits:
                tangent = torch.empty_like(x).copy_(tangent)
        self.alias(x, tangent)

    def set_first(self, x: Tensor, tangent: Tensor | None, dim: int) -> None:
        """Set the tangent of a new value's first samples, in dimension dim.

        It is completed if samples are not outermost in the value's memory.
        """
        if tangent is None or not (x.is_floating_point() or x.is_complex()):
            return
        tangent = tangent.to(x.dtype)
        reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        if x.is_complex() or reach + 1 != x.numel() or x.shape[dim] * x.stride(dim) != x.numel():
            whole = torch.zeros_like(x)
            whole.narrow(dim, 0, tangent.shape[dim]).copy_(tangent)
            self.alias(x, whole)
            return
        held = tangent.untyped_storage().nbytes() // tangent.element_size()
        if not _same_strides(tangent, x) or tangent.storage_offset() != 0 or held != tangent.numel():
            tangent = torch.empty_strided(tangent.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(
                tangent
            )
        self.alias(x, tangent)

    def same_view(self, x: Tensor, t: Tensor, view: Tensor) -> Tensor | None:
        """The view of a tangent for the first samples.

        None if it does not show the same part of every sample, along one dimension.
        """
        assert self.samples is not None
        count, batch = self.samples
        if view.dtype != x.dtype:
            return None
        sample = t.untyped_storage().nbytes() // t.element_size() // count
        offset = t.storage_offset() + view.storage_offset() - x.storage_offset()
        for d, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
            if size % batch == 0 and size * stride == batch * sample:
                sizes = [n // batch if i == d else n for i, n in enumerate(view.shape)]
                reach = sum((n - 1) * s for n, s in zip(sizes, view.stride(), strict=True) if n > 0)
                if 0 <= offset and offset + reach < sample and view.numel() > 0:
                    sizes[d] *= count
                    return t.as_strided(sizes, view.stride(), offset)
        return None

    def share(self, size: int) -> int:
        """The size of the first samples, in a dimension that holds all."""
        assert self.samples is not None
        count, batch = self.samples
        return size // batch * count

    def _complete(self, x: Tensor, t: Tensor) -> Tensor:
        """Extend the tangent of the first samples to all, and with it those of all views of its memory."""
        assert self.samples is not None
        count, batch = self.samples
        storage = t.untyped_storage()
        held = storage.nbytes() // t.element_size()
        whole = t.new_zeros(held // count * batch)
        whole[:held] = t.as_strided((held,), (1,), 0)
        for key, (reference, other) in list(self._of.items()):
            y = reference()
            if y is not None and other is not None and other.untyped_storage()._cdata == storage._cdata:
                view = whole.as_strided(y.size(), y.stride(), other.storage_offset())
                self._of[key] = reference, view
        found = self.stored(x)
        assert found is not None
        return found

    def alias(self, x: Tensor, tangent: Tensor | None) -> None:
        """Give a view of a value the same view of its tangent; None keeps it zero despite a shadow."""
        key, of = id(x), self._of

        def forget(reference: Any) -> None:
            if (entry := of.get(key)) is not None and entry[0] is reference:
                del of[key]

        of[key] = (weakref.ref(x, forget), tangent)

    def write(self, x: Tensor, by: Tensor | None) -> None:
        """Record that x has been overwritten in place by a value; None is a constant."""
        if self.samples is not None and (first := self.both_first(x, by)) is not None:
            first[0].copy_(first[1])
            return
        here, tangent = self.get(x), self.get(by)
        if here is not None:
            here.zero_() if tangent is None else here.copy_(tangent)
        elif tangent is not None and (x.is_floating_point() or x.is_complex()):
            storage = x.untyped_storage()
            for address in [a for a, (reference, _) in self._shadows.items() if reference.expired()]:
                del self._shadows[address]
            shadow = torch.zeros(storage.nbytes() // x.element_size(), dtype=x.dtype, device=x.device)
            self._shadows[storage._cdata] = (StorageWeakRef(storage), shadow)  # keeps the address taken
            self._of.pop(id(x), None)
            shadow.as_strided(x.size(), x.stride(), x.storage_offset()).copy_(tangent)

    def both_first(self, x: Tensor, y: Any) -> tuple[Tensor, Tensor] | None:
        """The tangents of two values of equal shape, if both cover the same first samples only."""
        if not isinstance(y, Tensor) or x.shape != y.shape:
            return None
        t_x, t_y = self.stored(x), self.stored(y)
        fits = t_x is not None and t_y is not None and t_x.shape == t_y.shape != x.shape
        return (t_x, t_y) if fits else None  # type: ignore[return-value]

    def buffer(self, like: Tensor) -> Tensor | None:
        """Memory for the tangent of a value, if it is large; None leaves that to PyTorch.

        Tangents die long before the values that autograd saves. On malloc's heap, saved values would settle
        in the holes that large tangents leave, and each new tangent would extend the heap; so large tangents
        take turns in a few buffers, and operators that allocate their own are copied there at once.
        """
        size = like.numel() * like.element_size()
        if size < LARGE or type(like) is not Tensor or like.device.type != "cpu" or not _is_dense(like):
            return None
        storage = self._idle_buffer(size)
        if storage is None:
            storage = UntypedStorage(size)
            self._buffers.append(storage)
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.size(), like.stride())

    def _idle_buffer(self, size: int) -> UntypedStorage | None:
        """The smallest idle buffer of size to 2 size bytes; without one, drop those that a new one replaces.

        Tangents of the first samples must fill their storage.
        """
        ratio = 2 if self.samples is None else 1
        idle = [s for s in self._buffers if torch._C._storage_Use_Count(s._cdata) == 1]
        fitting = [s for s in idle if size <= s.nbytes() <= ratio * size]
        if fitting:
            return min(fitting, key=UntypedStorage.nbytes)
        replaced = {s._cdata for s in idle if s.nbytes() < size < ratio * s.nbytes()}
        self._buffers = [s for s in self._buffers if s._cdata not in replaced]
        return None

    def _in_buffer(self, tangent: Tensor) -> bool:
        address = tangent.untyped_storage()._cdata
        return any(storage._cdata == address for storage in self._buffers)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator with its tangent."""
        if self.samples is not None and not any(x.is_complex() for x in tensors_of(args)):
            found = self._by_sample(self, func, args, kwargs)
            if found is not NotImplemented:
                return found
        return self.rule_of(func)(self, func, args, kwargs)

    @property
    def has_shadows(self) -> bool:
        return bool(self._shadows)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._current_graph_task_id() != self._graph_task:
            raise RuntimeError(DIFFERENTIATES)
        tensors = tensors_of((*args, *kwargs.values()) if kwargs else args)
        if all(self.stored(x) is None for x in tensors):
            return func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            raise NotImplementedError(
                f"Jvp: {func.name()} is a higher-order operator and has no tangents: use ordinary operators"
            )
        _check_function()
        lazy = any(x.is_complex() or x.is_neg() for x in tensors)
        if not lazy and not torch._C._is_any_autocast_enabled():
            return self.run(func, args, kwargs)
        include, exclude = (
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )
        for key in LAZY:
            exclude = exclude.remove(key)
        for key in _AUTOCAST:
            exclude = exclude.add(key)
        with torch._C._ForceDispatchKeyGuard(include, exclude):
            return self.run(func, args, kwargs)


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors among an operator's arguments, which may be lists."""
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)) and x and not isinstance(x[0], int):
            found += tensors_of(x)
    return found


def _same_strides(a: Tensor, b: Tensor) -> bool:
    if a.stride() == b.stride():
        return True
    return all(s == t or n <= 1 for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def _is_dense(x: Tensor) -> bool:
    """Whether x's elements fill their memory, each once, in any order of dimensions."""
    return x.is_contiguous() or torch.empty_like(x, device="meta").stride() == x.stride()


def _check_function() -> None:
    # Disabled inside an autograd.Function's forward, whatever torch.no_grad says.
    if not torch._C._is_fwd_grad_enabled() and (name := _foreign_function()) is not None:
        raise RuntimeError(
            f"Jvp: {name} is an autograd.Function, whose derivative may not be that of its forward: call "
            "with detach_tangent=False, which is torch.func.jvp and asks for the Function's jvp"
        )


def _foreign_function() -> str | None:
    """The autograd.Function that is being applied, unless it is PyTorch's or ours."""
    frame: Any = sys._getframe(2)
    inside = torch.is_inference_mode_enabled()  # which disables it too
    while frame is not None:
        function = frame.f_locals.get("cls") if frame.f_code.co_name == "apply" else None
        if isinstance(function, type) and issubclass(function, torch.autograd.Function):
            if function.__module__.partition(".")[0] not in ("torch", "pmf"):
                return function.__qualname__
            inside = True
        frame = frame.f_back
    return None if inside else "a function in C++"
