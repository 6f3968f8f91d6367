"""How the public functions treat tensor subclasses: decided here and nowhere else.

A kernel reads memory, and a subclass's memory need not contain its values: the memory of a `CausalBias` is
uninitialised, a masked tensor's contains what the mask hides. So every public function is wrapped in
`operation`, which passes plain tensors on immediately and inspects everything else:

    its own __torch_dispatch__    DTensor: `_sharded`; jagged: `_jagged`; others receive the raw op themselves
    nothing overridden            unwrapped; the result has the subclass again, as PyTorch's own have
    CausalBias as attn_mask       handled in `attention`
    anything else                 rejected by name
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Buffer, Parameter
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

__all__ = ["Layouts", "kind_of", "operation", "replace_tensors", "require_plain", "require_trainable"]

P = ParamSpec("P")
R = TypeVar("R")
Layouts = Mapping[str, str]
"""By argument, the dimensions along which a DTensor may be sharded: see `_sharded`."""

PLAIN = frozenset({Tensor, Parameter, Buffer, type(None), bool, int, float, str, torch.dtype})
"""Classes that need no inspection. (No tensor is a Buffer, but torch.compile reports buffers as such.)"""

# Attributes that a subclass may define without changing the meaning of its values.
HARMLESS = frozenset(
    "__annotate__ __annotate_func__ __annotations__ __annotations_cache__ __class_getitem__ __copy__ "
    "__deepcopy__ __dict__ __dir__ __doc__ __firstlineno__ __format__ __getstate__ __hash__ __init__ "
    "__init_subclass__ __module__ __new__ __orig_bases__ __parameters__ __qualname__ __reduce__ "
    "__reduce_ex__ __repr__ __setstate__ __slots__ __static_attributes__ __str__ __type_params__ "
    "__weakref__".split()
)
KNOWN_WRAPPERS = {
    "torch.distributed.tensor": "sharded",
    "torch.distributed._tensor": "sharded",
    "torch.nested._internal": "jagged",
    "torch.masked.maskedtensor": "refused",
    "torch.nn.attention.bias": "bias",
    "torchvision.tv_tensors": "plain",  # its __torch_function__ only keeps the class on some outputs
}


def operation(layouts: Layouts, *outputs: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function of tensors safe for any tensor; `layouts` of its arguments and outputs as DTensors."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        tensors = {
            name: "None" in str(p.annotation)
            for name, p in signature.parameters.items()
            if "Tensor" in str(p.annotation)
        }

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for x in args:
                if type(x) not in PLAIN:
                    return special(*args, **kwargs)
            for x in kwargs.values():
                if type(x) not in PLAIN:
                    return special(*args, **kwargs)
            return run(*args, **kwargs)

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except Exception as error:
                _explain(function.__name__, _bound(signature, tensors, args, kwargs), error)
                raise

        def special(*args: Any, **kwargs: Any) -> Any:
            if all(map(_is_plain, (*args, *kwargs.values()))):  # lists of matrices
                return run(*args, **kwargs)
            given = _bound(signature, tensors, args, kwargs)
            if given is None:
                return function(*args, **kwargs)  # raises as usual
            kinds = {name: kind_of(x) for name, x in given.items()}
            _refuse(function.__name__, given, kinds)
            found = set(kinds.values())
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            if "sharded" in found:
                from ._sharded import run_sharded

                return run_sharded(checked, arguments, given, layouts, outputs)
            if "jagged" in found:
                from ._jagged import run_jagged

                return run_jagged(checked, arguments, given)
            if "plain" in found:
                like = next(type(x) for name, x in given.items() if kinds[name] == "plain")
                arguments = replace_tensors(arguments, {name: _unwrap(x) for name, x in given.items()})
                return _wrap(checked(**arguments), like)  # type: ignore[call-arg]
            return run(*args, **kwargs)

        # torch.compile counts recompilations by code object: each function needs its own, with its name.
        own: Any = checked
        own.__code__ = own.__code__.replace(co_name=function.__name__)
        return checked

    return decorate


def require_plain(op: str, **tensors: Any) -> None:
    """For functions that accept only plain tensors: raise a TypeError that names the first special one.

    A subclass that overrides nothing counts as plain.
    """
    for name, x in tensors.items():
        if type(x) not in PLAIN and kind_of(x) in ("refused", "bias", "sharded", "jagged"):
            _raise_unknown(op, name, x)


def require_trainable(op: str, name: str, x: Tensor) -> None:
    """Raise TypeError unless an optimizer knows how x stores its values: plain memory, or a DTensor's."""
    if getattr(x, "_fsdp_flattened", False):
        raise TypeError(
            f"{op}: {name} is flattened by FullyShardedDataParallel (FSDP1) and has lost its matrices; "
            "shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if type(x) in PLAIN or kind_of(x) in ("plain", "sharded"):
        return
    if kind_of(x) == "dispatched" and type(x).__module__.startswith("torch._subclasses."):  # fake tensors
        return
    _raise_unknown(op, name, x)


def _bound(
    signature: inspect.Signature, tensors: Mapping[str, bool], args: Any, kwargs: Any
) -> dict[str, Any] | None:
    """The tensor arguments by name, list entries as "matrices[0]", without optional ones that are None; None
    if the arguments do not match the function.
    """
    given: dict[str, Any] = {}
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None
    for name, x in arguments.items():
        if name not in tensors:
            continue
        if isinstance(x, (list, tuple)):
            given.update({f"{name}[{i}]": y for i, y in enumerate(x)})
        elif x is not None or not tensors[name]:
            given[name] = x
    return given


def replace_tensors(arguments: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with these tensors replaced."""
    replaced = dict(arguments)
    for name, x in arguments.items():
        if name in given:
            replaced[name] = given[name]
        elif isinstance(x, (list, tuple)) and f"{name}[0]" in given:
            replaced[name] = [given[f"{name}[{i}]"] for i in range(len(x))]
    return replaced


def _is_plain(x: Any) -> bool:
    if type(x) in (list, tuple):
        return all(type(y) in PLAIN for y in x)
    return type(x) in PLAIN


def kind_of(x: Any) -> str:
    if type(x) in (Tensor, Parameter, Buffer):
        return "unchanged"
    return _kind(type(x)) if isinstance(x, Tensor) else "other"


def _kind(cls: Any) -> str:
    if cls not in _kinds:
        _kinds[cls] = _classify(cls)
    return _kinds[cls]


_kinds: dict[Any, str] = {}


def _classify(cls: Any) -> str:
    for module, kind in KNOWN_WRAPPERS.items():
        if any(base.__module__ == module or base.__module__.startswith(module + ".") for base in cls.__mro__):
            return kind
    if cls.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return "dispatched"
    if issubclass(cls, UninitializedTensorMixin):
        return "refused"
    return "plain" if not _overrides(cls) else "refused"


# The effect of torch.compiler.assume_constant_result, without importing torch._dynamo, which takes seconds.
_kind._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _overrides(cls: Any) -> list[str]:
    """The attributes of Tensor that a subclass overrides."""
    own = [base for base in cls.__mro__ if not issubclass(Tensor, base) and base is not Parameter]
    names = {name for base in own for name in vars(base) if name not in HARMLESS and hasattr(Tensor, name)}
    disabled = torch._C._disabled_torch_function_impl
    if getattr(cls.__torch_function__, "__func__", cls.__torch_function__) is disabled:
        names.discard("__torch_function__")
    return sorted(names)


def _unwrap(x: Any) -> Any:
    if kind_of(x) != "plain":
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def _wrap(result: Any, like: Any) -> Any:
    """The result as PyTorch's own functions return it for arguments of this class."""
    if not _keeps_class(like):
        return result
    if isinstance(result, (list, tuple)):
        return type(result)(_wrap(x, like) for x in result)
    with torch._C.DisableTorchFunctionSubclass():
        return result.as_subclass(like)


def _keeps_class(cls: Any) -> bool:
    ours = getattr(cls.__torch_function__, "__func__", None)
    return ours is getattr(Tensor.__torch_function__, "__func__", None) and not issubclass(cls, Parameter)


def _refuse(op: str, given: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    for name, x in given.items():
        if kinds[name] == "other":
            _raise_unknown(op, name, x)
        if kinds[name] == "refused" or (kinds[name] == "bias" and name != "attn_mask"):
            _raise_unknown(op, name, x)


def _raise_unknown(op: str, name: str, x: Any) -> NoReturn:
    cls = type(x)
    full = f"{cls.__module__}.{cls.__qualname__}"
    if not isinstance(x, Tensor):
        hint = " (make it a mask with torch.nn.attention.flex_attention.create_mask)"
        raise TypeError(
            f"{op}: {name} must be a tensor, got a {full}{hint if cls.__name__ == 'BlockMask' else ''}"
        )
    if isinstance(x, UninitializedTensorMixin):
        raise TypeError(f"{op}: {name} is a {full}, which has no values yet; run its module once before")
    raise TypeError(
        f"{op}: {name} is a {full}, an unknown tensor subclass, whose memory may not hold its values; "
        f"pass the values as a plain tensor ({name}.as_subclass(torch.Tensor) if it holds them)"
    )


def _explain(op: str, given: Mapping[str, Any] | None, error: Exception) -> None:
    """Raise a one-sentence TypeError if an argument is of a kind that no kernel can read."""
    for name, x in (given or {}).items():
        if not isinstance(x, Tensor):
            _raise_unknown(op, name, x)
        problem = _problem(x, error)
        if problem is not None:
            raise TypeError(f"{op}: {name} {problem}") from error


def _problem(x: Tensor, error: Exception) -> str | None:
    if kind_of(x) == "dispatched":
        missing = isinstance(error, NotImplementedError) or "__torch_dispatch__" in str(error)
        full = f"{type(x).__module__}.{type(x).__qualname__}"
        if not missing:
            return None
        return f"is a {full}, whose __torch_dispatch__ does not take the operators of torch.ops.pmf ({error})"
    if x.is_nested:
        return "is a nested tensor of strided layout; make it with layout=torch.jagged"
    if x.is_quantized:
        return "is quantized; call its dequantize() first"
    if x.layout != torch.strided:
        return f"has layout {x.layout}; make it dense with to_dense() first"
    if any(dim is not None for dim in getattr(x, "names", ())):  # PyTorch is about to remove them
        return "has named dimensions; remove the names with rename(None) first"
    if x.device.type not in ("cpu", "cuda", "meta"):
        return f"is on device {x.device.type}, for which there are no kernels; move it to the CPU or to CUDA"
    return None
