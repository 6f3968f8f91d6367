"""Tangents alongside the values of a network that runs as usual: a dispatch mode below autograd.

The network is called normally. Below autograd the mode intercepts every operator and computes its value,
which autograd above records as usual, and its tangent, which autograd never sees. A tangent therefore costs
only its own products, saves nothing for backward, and leaves an ordinary forward pass for hooks, checkpoints,
DDP and FSDP. The rules for single operators are in `rules`.

A tangent has the sizes and strides of its value, and aliases of a value have aliases of its tangent, so that
writing to a view also writes to the tangent of its base. Existing memory without a tangent gets a shadow, a
tangent for its whole storage, when a value with a tangent is written to it.

What the mode cannot see raises: calls of PyTorch's autograd by the network itself, whose saved values carry
no tangents; third-party autograd.Functions, whose derivative may differ from that of their forward; tensor
subclasses made of values, whether they share their memory or hold them.
"""

import functools
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._C._dynamo import eval_frame
from torch._ops import OpOverload
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

_PLAIN = (Tensor, torch.nn.Parameter)
"""Classes that need no inspection."""

LARGE = 1 << 20
"""Tangents of at least this many bytes take turns in a few buffers."""


def is_active() -> bool:
    """Whether this thread is inside a network whose tangents are being computed."""
    return any(isinstance(mode, TangentMode) for mode in _get_current_dispatch_mode_stack())


# Inside a compiled part of the network Dynamo is active, and is to compile neither the mode nor its callees.
# PyTorch wraps __torch_dispatch__ for that, four calls per operator; to mark its code once takes none.
_MARKS_CODE = all(
    hasattr(eval_frame, name) for name in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")
)


class TangentMode(TorchDispatchMode):
    """The tangents of all values while the mode is active; rules use `value`, `get`, `set` and `write`."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[int, tuple[weakref.ref[Tensor], Tensor | None]] = {}
        self._shadows: dict[int, tuple[StorageWeakRef, Tensor]] = {}
        self._buffers: dict[int, UntypedStorage] = {}
        self._graph_task = torch._C._current_graph_task_id()
        from .rules import rules  # which imports this module

        self._rules = rules

    @staticmethod
    def value(func: Any, *args: Any, **kwargs: Any) -> Any:
        """What an operator returns, computed once; rules also run where it already exists (`samples`)."""
        return func(*args, **kwargs)

    def stored(self, x: Any) -> Tensor | None:
        """The tangent of a value, in `FirstSamples` perhaps only that of these; None means zero."""
        entry = self._of.get(id(x))
        if entry is not None and entry[0]() is x:
            if entry[1] is None:
                raise NotImplementedError(
                    "Jvp: the network reads the mean or the deviation that a norm's operator returns beside "
                    "its result, whose tangents are not computed: use mean() and var()"
                )
            return entry[1]
        if self._shadows and isinstance(x, Tensor) and x.layout is torch.strided:
            found = self._shadows.get(x.untyped_storage()._cdata)
            if found is not None and found[1].dtype.to_real() == x.dtype.to_real():
                return found[1].view(x.dtype).as_strided(x.size(), x.stride(), x.storage_offset())
        return None

    get = stored
    """The tangent of a value, for all samples."""

    def both(self, x: Any, y: Any) -> tuple[Tensor | None, Tensor | None]:
        """The tangents of two values, for the same samples."""
        return self.get(x), self.get(y)

    def set(self, x: Tensor, tangent: Tensor | None) -> None:
        """Set the tangent of a new value, in its dtype, sizes and strides."""
        if tangent is None or not (x.is_floating_point() or x.is_complex()):
            return
        if tangent.dtype != x.dtype:
            tangent = tangent.to(x.dtype)
        fits = tangent.shape == x.shape and same_strides(tangent, x)
        buffer = None if fits and tangent.untyped_storage()._cdata in self._buffers else self.buffer(x)
        if buffer is not None:
            tangent = buffer.copy_(tangent)
        elif not fits:
            tangent = torch.empty_like(x).copy_(tangent)
        self.alias(x, tangent)

    def alias(self, x: Tensor, tangent: Tensor | None) -> None:
        """Give a view of a value the same view of its tangent; None forbids that it is ever asked for."""
        if type(x) not in _PLAIN:
            self.check_class(x, is_result=True)
        # The reference calls pop(key, itself) when x dies, before another value can have its id.
        self._of[id(x)] = (weakref.ref(x, functools.partial(self._of.pop, id(x))), tangent)

    def leave(self, *statistics: Tensor) -> None:
        """Compute no tangent of what hardly any network reads."""
        for x in statistics:
            self.alias(x, None)

    def detach(self, x: Tensor) -> None:
        """Make a value a constant. Where its memory has a shadow it gets a zero tangent of its own.

        So have its views, then, and so has what is written to them.
        """
        self._of.pop(id(x), None)
        if self._shadows and self.stored(x) is not None:
            self.alias(x, torch.zeros_like(x))

    def write(self, x: Tensor, by: Tensor | None) -> None:
        """Record that x has been overwritten in place by a value; None is a constant."""
        here, tangent = self.both(x, by)
        if here is not None:
            here.zero_() if tangent is None else here.copy_(tangent)
        elif tangent is not None and (x.is_floating_point() or x.is_complex()):
            storage = x.untyped_storage()
            for address in [a for a, (reference, _) in self._shadows.items() if reference.expired()]:
                del self._shadows[address]
            # Whole complex numbers: the same storage may hold real values and show them as complex ones.
            numbers = -(-storage.nbytes() // 16) * 16 // x.element_size()
            shadow = torch.zeros(numbers, dtype=x.dtype, device=x.device)
            self._shadows[storage._cdata] = (StorageWeakRef(storage), shadow)  # keeps the address taken
            self._of.pop(id(x), None)
            shadow.as_strided(x.size(), x.stride(), x.storage_offset()).copy_(tangent)

    def buffer(self, like: Tensor) -> Tensor | None:
        """Memory for the tangent of a value, if it is large; None leaves that to PyTorch.

        Tangents die long before the values that autograd saves. On malloc's heap, saved values would settle
        in the holes that large tangents leave, and each new tangent would extend the heap; so large tangents
        take turns in a few buffers, and operators that allocate their own are copied there at once.
        """
        if type(like) is not Tensor or (size := like.numel() * like.element_size()) < LARGE:
            return None
        if like.device.type != "cpu" or not _is_dense(like):
            return None
        storage = self._idle_buffer(size)
        if storage is None:
            storage = UntypedStorage(size)
            self._buffers[storage._cdata] = storage
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.size(), like.stride())

    def _idle_buffer(self, size: int) -> UntypedStorage | None:
        """The smallest idle buffer of up to 2 size bytes; without one, drop those that a new one replaces."""
        idle = [s for s in self._buffers.values() if torch._C._storage_Use_Count(s._cdata) == 1]
        best = None
        for storage in idle:
            if size <= storage.nbytes() <= (2 * size if best is None else best.nbytes()):
                best = storage
        if best is None:
            for storage in idle:
                if storage.nbytes() < size < 2 * storage.nbytes():
                    del self._buffers[storage._cdata]
        return best

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator with its tangent."""
        return self._rules[func](self, func, args, kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return not _MARKS_CODE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._current_graph_task_id() != self._graph_task:
            raise RuntimeError(DIFFERENTIATES)
        # Function modes, ours and others', see the network's calls but not the operators that these become.
        with torch._C.DisableTorchFunction():
            known = lazy = False
            for x in tensors_of((*args, *kwargs.values()) if kwargs else args):
                if type(x) not in _PLAIN:
                    self.check_class(x)
                known = known or self.stored(x) is not None
                lazy = lazy or x.is_complex() or x.is_neg()
            if not torch._C._is_fwd_grad_enabled():
                self._check_function(known)
            if not known:
                return func(*args, **kwargs)
            if not isinstance(func, OpOverload):
                raise NotImplementedError(
                    f"Jvp: {func.name()} is a higher-order operator and has no tangents: use ordinary "
                    "operators"
                )
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

    def check_class(self, x: Tensor, is_result: bool = False) -> None:
        """Subclasses are made of values, and taken apart again, where no mode sees it."""
        if _keeps_tangents(type(x)):
            return
        wraps = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if wraps and not is_result and (held := _held(x)):
            if all(self.stored(y) is None for y in held):  # such as a sharded weight
                return
        raise NotImplementedError(  # x * 2 would hide a TypeError
            f"Jvp: the network computes with a {type(x).__name__}, a tensor subclass, which would lose "
            "tangents: use plain tensors"
        )

    def _check_function(self, known: bool) -> None:
        """Forward mode is disabled inside an autograd.Function's forward, whatever torch.no_grad says.

        The Function's inputs count even if the operator's do not: it may allocate what a kernel then fills.
        """
        name, given = _foreign_function()
        if name is not None and (known or any(self.stored(x) is not None for x in tensors_of(given))):
            raise RuntimeError(
                f"Jvp: {name} is an autograd.Function, whose derivative may not be that of its forward: call "
                "with detach_tangent=False, which is torch.func.jvp and asks for the Function's jvp"
            )


if _MARKS_CODE:
    _skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(
        TangentMode.__torch_dispatch__.__code__, eval_frame._FrameExecStrategy(_skip, _skip)
    )


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors among an operator's arguments, which may be lists."""
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)) and x and not isinstance(x[0], int):
            found += tensors_of(x)
    return found


@functools.cache
def _keeps_tangents(cls: type[Tensor]) -> bool:
    """Whether operators alone give values this class; a parameter's class is never theirs."""
    if cls is Tensor or cls.__module__.startswith("torch._subclasses."):  # while PyTorch traces
        return True
    function = getattr(cls.__torch_function__, "__func__", cls.__torch_function__)
    wraps = cls.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return function is torch._C._disabled_torch_function_impl and not wraps


def _held(x: Any) -> list[Tensor]:
    """The tensors that a wrapper consists of."""
    names = x.__tensor_flatten__()[0] if hasattr(x, "__tensor_flatten__") else vars(x)
    return [y for name in names if isinstance(y := getattr(x, name), Tensor)]


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have the same strides where these matter."""
    if a.stride() == b.stride():
        return True
    return all(s == t or n <= 1 for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def _is_dense(x: Tensor) -> bool:
    """Whether x's elements fill their memory, each once, in any order of dimensions."""
    return x.is_contiguous() or torch.empty_like(x, device="meta").stride() == x.stride()


def _foreign_function() -> tuple[str | None, Any]:
    """The autograd.Function that is being applied, unless it is PyTorch's or ours, and to what."""
    frame: Any = sys._getframe(2)
    inside = torch.is_inference_mode_enabled()  # which disables it too
    while frame is not None:
        applies = frame.f_code.co_name in ("apply", "call")  # PyTorch's and, in `KernelFunction`, ours
        function = frame.f_locals.get("cls") if applies else None
        if isinstance(function, type) and issubclass(function, torch.autograd.Function):
            if function.__module__.partition(".")[0] not in ("torch", "pmf"):
                return function.__qualname__, frame.f_locals.get("args", ())
            inside = True
        frame = frame.f_back
    return None if inside else "a function in C++", ()
