"""Derivatives of the compiled kernels: reverse mode, forward mode, vmap, and torch.compile.

PyTorch offers two mechanisms, and neither suffices alone:

- A custom op with `register_autograd` compiles, but has no forward mode: under `torch.func.jvp` its tangent
  is silently zero.
- `torch.autograd.Function` has `jvp` and `vmap`, but torch.compile traces into it, drops its `jvp` and
  differentiates the traced forward instead: with a custom op inside, again a silent zero.

So every public function is an autograd.Function around a custom op, and torch.compile is told to keep the
call in its graph unchanged (`allow_in_graph`). AOTAutograd then applies the transforms to the Function itself
and finds its rules, and Inductor sees the custom op. Only the tangents of `torch.autograd.forward_ad` are
lost by torch.compile before our code runs: there `call` (`_dispatch`) raises.

Every kernel has a reference: the same function in plain PyTorch. Derivatives that no kernel computes (of a
mask, of a gradient) come from the reference: correct but slower.

PyTorch's interface is positional; everything below refers to arguments and outputs by name.
"""

import inspect
from collections import namedtuple
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from pmf import checked, kernels

from ._plain import jvp, vjp

__all__ = [
    "Gradients",
    "JvpFunction",
    "KernelFunction",
    "detached",
    "named",
    "pick",
    "reference_gradients",
]

_Keys = torch._C.DispatchKey
# With the record of views: a result in transposed memory would be one, and could not be modified in place.
_AUTOGRAD = torch._C.DispatchKeySet(_Keys.AutogradFunctionality).add(_Keys.ADInplaceOrView)

Args = tuple[Any, ...]
Names = tuple[str, ...]
Outputs = Any  # the raw op's result: a Tensor, or a tuple of them


def named(*names: str, defaults: Any = ()) -> Any:
    """A named-tuple type with these fields."""
    return namedtuple("named", names, defaults=defaults)


def pick(kind: Any, source: Any) -> Any:
    """The fields of a named tuple that `kind` also has."""
    return kind(*(getattr(source, name) for name in kind._fields))


class KernelFunction(torch.autograd.Function):
    """A kernel as a differentiable function of all arguments of the raw op.

    A subclass names the raw op and its outputs; the parameters of its reference name the arguments. It
    overrides `gradient` and `tangent` if kernels compute them.
    """

    op: ClassVar[str]
    """The raw op: torch.ops.pmf.<op>."""
    outputs: ClassVar[Names] = ("y",)
    constants: ClassVar[Names] = ()
    """Outputs without a derivative."""
    residuals: ClassVar[Names] = ()
    """Outputs that backward reads, such as row statistics."""
    unsaved: ClassVar[Names] = ()
    """Tensor arguments whose values backward does not read."""
    unsaved_samples: ClassVar[Names] = ()
    """Tensor arguments of which `gradient` reads only dtype and shape: they are saved with zero samples."""
    by_reference: ClassVar[Names] = ()
    """Arguments whose derivative no kernel computes: if one is needed, the reference computes all."""
    samples: ClassVar[Names] = ()
    """Arguments whose dimension 0 is the batch, as in every output: vmap folds into it; if None, it loops.
    """

    name: ClassVar[str]
    """The name under which `call` finds it."""
    Arguments: ClassVar[Any]
    """The arguments as a named tuple, with the reference's defaults."""
    Results: ClassVar[Any]
    """The outputs with a derivative, as a named tuple."""
    Residuals: ClassVar[Any]

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor, ...]:
        """The results in plain PyTorch."""
        raise NotImplementedError

    @classmethod
    def gradient(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> dict[str, Tensor | None]:
        """Gradients of the arguments, given those of the results (None means zero; not all are None).

        grads, args, residuals and needed (whether an argument needs its gradient) are named tuples. Arguments
        without a gradient may be omitted.
        """
        return dict(zip(args._fields, vjp(cls.reference, args, grads), strict=True))

    @classmethod
    def tangent(cls, args: Any, tangents: Any) -> tuple[Tensor, ...]:
        """Tangents of the results as differentiable operations, given the arguments'; None means zero."""
        found = jvp(cls.reference, args, tangents)
        rows = [getattr(args, name).shape[0] for name in cls.batched(args)]
        if rows and found[-1].shape[0] != min(rows):  # the reference expanded the few tangents to all samples
            raise RuntimeError(
                f"{cls.name}: forward mode over tangents of only the first samples needs detach_tangent=True"
            )
        return found

    @classmethod
    def batched(cls, args: Any) -> Names:
        """The arguments named in `samples` that are tensors in this call."""
        return tuple(name for name in cls.samples if isinstance(getattr(args, name), Tensor))

    @classmethod
    def shares_the_rest(cls, args: Any) -> bool:
        """Whether the other arguments are the same for all samples, so that vmap can fold."""
        return True

    @classmethod
    def complete(cls, args: Args) -> Args:
        """The raw op's arguments, given the Function's."""
        return args

    @classmethod
    def plain(cls, args: Any) -> dict[str, Tensor]:
        """The results by name, for PyTorch to differentiate."""
        return dict(zip(cls.Results._fields, cls.reference(*args), strict=True))

    # The rest implements torch.autograd.Function's interface; subclasses do not override it.

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "reference" in vars(cls) and "Arguments" not in vars(cls):
            parameters = inspect.signature(cls.reference).parameters.values()
            defaults = [p.default for p in parameters if p.default is not p.empty]
            cls.Arguments = named(*(p.name for p in parameters), defaults=defaults)
        cls.Results = named(*(y for y in cls.outputs if y not in cls.constants))
        cls.Residuals = named(*cls.residuals)

    @classmethod
    def call(cls, *args: Any) -> Outputs:
        """`apply`, without what it need not do, which is most of a small call's time.

        Where no derivative is due, `forward` alone; else without inspecting `forward` for default arguments.
        """
        if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
            return cls.apply(*args)
        if forward_ad._current_level >= 0 or _requires_grad(args):
            return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]
        return cls.forward(*args)

    @classmethod
    def pull_back(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> dict[str, Tensor | None]:
        """`gradient`, or the reference's."""
        if any(getattr(needed, name) for name in cls.by_reference):
            return dict(zip(args._fields, vjp(cls.reference, args, grads), strict=True))
        return cls.gradient(grads, args, residuals, needed)

    @classmethod
    def push_forward(cls, args: Any, tangents: Any) -> tuple[Tensor, ...]:
        """`tangent`, or the reference's."""
        if any(getattr(tangents, name) is not None for name in cls.by_reference):
            return jvp(cls.reference, args, tangents)
        return cls.tangent(args, tangents)

    @classmethod
    def family(cls) -> str:
        """The op whose kernel this is, of `kernels.NAMES`."""
        return max((name for name in kernels.NAMES if cls.name.startswith(name)), key=len)

    @classmethod
    def forward(cls, *args: Any) -> Outputs:
        checked.remind(next(x for x in args if isinstance(x, Tensor)))
        # This Function is the derivative; the raw op's own, for its direct callers, would only take time.
        with torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD):
            return getattr(torch.ops.pmf, cls.op).default(*cls.complete(args))

    @classmethod
    def setup_context(cls, ctx: Any, inputs: Args, output: Outputs) -> None:
        cls.save(ctx, inputs, output)
        ctx.save_for_forward(*(x for x in inputs if isinstance(x, Tensor)))

    @classmethod
    def save(cls, ctx: Any, inputs: Args, output: Outputs) -> None:
        outputs = dict(zip(cls.outputs, _tuple(output), strict=True))
        needed = cls.Arguments(*ctx.needs_input_grad[: len(inputs)])  # a raw op has one more
        empty = () if any(getattr(needed, name) for name in cls.by_reference) else cls.unsaved_samples
        saved = [
            x.new_empty((0, *x.shape[1:]))
            if name in empty
            else x
            if isinstance(x, Tensor) and name not in cls.unsaved
            else None
            for name, x in zip(cls.Arguments._fields, inputs, strict=False)
        ]
        # Residuals first: if a checkpointed block is recomputed with PyTorch's attention, which saves query,
        # key and value first, torch.utils.checkpoint notices that the saved tensors differ.
        ctx.save_for_backward(*(outputs[name] for name in cls.residuals), *saved)
        ctx.mark_non_differentiable(*(outputs[name] for name in cls.constants))
        ctx.set_materialize_grads(False)
        ctx.inputs = tuple(None if isinstance(x, Tensor) else x for x in inputs)
        ctx.is_tensor = tuple(isinstance(x, Tensor) for x in inputs)
        ctx.is_single = isinstance(output, Tensor)

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # read once: checkpointing allows no more
        residuals, saved = saved[: len(cls.residuals)], saved[len(cls.residuals) :]
        args = cls.Arguments(*_merged(ctx, saved))
        each = dict(zip(cls.outputs, grads, strict=True))
        results = cls.Results(*(each[y] for y in cls.Results._fields))
        found: dict[str, Tensor | None] = {}
        if any(g is not None for g in results):
            needed = cls.Arguments(*ctx.needs_input_grad)
            found = cls.pull_back(results, args, cls.Residuals(*residuals), needed)
        # A raw op's defaults, last among its inputs, have no gradients.
        needs = zip(args._fields, ctx.needs_input_grad, strict=False)
        return tuple(found.get(name) if needs_gradient else None for name, needs_gradient in needs)

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Tensor | None) -> Any:
        # PyTorch disables forward mode here, including that of an outer jvp, whose tangents would then be
        # zero. With it enabled, the inputs must not carry this level's tangents, or they would be
        # differentiated again.
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [forward_ad.unpack_dual(x, level=0).primal for x in ctx.saved_tensors]
            args = cls.Arguments(*_merged(ctx, _spread(ctx, saved)))
            found = cls.push_forward(args, cls.Arguments(*tangents))
        each = dict(zip(cls.Results._fields, found, strict=True))
        return found[0] if ctx.is_single else tuple(each.get(y) for y in cls.outputs)

    @classmethod
    def vmap(cls, info: Any, in_dims: Args, *given: Any) -> tuple[Outputs, Any]:
        size, args = info.batch_size, cls.Arguments(*given)
        dims = dict(zip(args._fields, in_dims, strict=False))
        batched = cls.batched(args)
        rows = {_unmapped_rows(getattr(args, name), dims[name]) for name in batched}
        is_batch = len(rows) == 1 and None not in rows
        maps_samples = all(dim is None or name in batched for name, dim in dims.items())
        if maps_samples and is_batch and cls.shares_the_rest(args):
            output = cls.apply(
                *(
                    _fold(x, dims[name], size) if name in batched else x
                    for name, x in zip(args._fields, given, strict=False)
                )
            )
            outputs = tuple(x.unflatten(0, (size, -1)) for x in _tuple(output))
        else:
            each = [
                cls.apply(*(x if d is None else x.select(d, i) for x, d in zip(given, in_dims, strict=True)))
                for i in range(size)
            ]
            output = each[0]
            outputs = tuple(torch.stack(same) for same in zip(*map(_tuple, each), strict=True))
        return (outputs[0], 0) if isinstance(output, Tensor) else (outputs, (0,) * len(outputs))


class Gradients(KernelFunction):
    """The backward kernel of a function: (its results' gradients, residuals and arguments) -> gradients.

    `outputs` names the arguments whose gradients it returns; the gradient of a None argument is empty.
    """

    of: ClassVar[type[KernelFunction]]

    def __init_subclass__(cls, **options: Any) -> None:
        if "reference" not in vars(cls):
            of, results = cls.of, len(cls.of.Results._fields)
            before = results + len(of.residuals)
            grads = [f"grad_{y}" for y in of.Results._fields]
            cls.Arguments = named(*grads, *of.residuals, *of.Arguments._fields)

            def reference(*args: Any) -> tuple[Tensor, ...]:
                return reference_gradients(of, cls.outputs, args[:results], *args[before:])

            cls.reference = staticmethod(reference)  # type: ignore[method-assign]
        super().__init_subclass__(**options)

    @classmethod
    def by_name(cls, *args: Any) -> dict[str, Tensor | None]:
        """The gradients by argument name."""
        return dict(zip(cls.outputs, _tuple(cls.call(*args)), strict=True))

    @classmethod
    def fake(cls, *args: Any) -> Outputs:
        """Every gradient has its argument's shape and layout; a single one is a tensor, not a tuple."""
        like = next(x for x in args if isinstance(x, Tensor))
        values = (getattr(cls.Arguments(*args), name) for name in cls.outputs)
        found = tuple(like.new_empty(0) if x is None else torch.empty_like(x) for x in values)
        return found if len(found) > 1 else found[0]


class JvpFunction(KernelFunction):
    """A function and its tangent: the value's arguments and results, and tangents of both."""

    value: ClassVar[type[KernelFunction]]
    detaches: ClassVar[bool] = False
    """Whether the tangent is a constant: backward and forward mode are then those of the value."""
    tangents: ClassVar[Names]
    """The outputs that are tangents of the value's results."""

    def __init_subclass__(cls, **options: Any) -> None:
        value = cls.value
        if "outputs" in vars(cls):
            cls.tangents = tuple(y for y in cls.outputs if y not in (*value.Results._fields, *cls.constants))
        if cls.detaches:
            cls.constants = tuple(y for y in cls.outputs if y not in value.Results._fields)
            cls.residuals, cls.by_reference = value.residuals, value.by_reference
            tangents = (name for name in cls.Arguments._fields if name not in value.Arguments._fields)
            cls.unsaved, cls.unsaved_samples = (*value.unsaved, *tangents), value.unsaved_samples
        super().__init_subclass__(**options)

    @classmethod
    def pull_back(cls, grads: Any, args: Any, residuals: Any, needed: Any) -> dict[str, Tensor | None]:
        if not cls.detaches and any(getattr(grads, y) is not None for y in cls.tangents):
            return super().pull_back(grads, args, residuals, needed)
        value = cls.value
        return value.pull_back(
            pick(value.Results, grads),
            pick(value.Arguments, args),
            pick(value.Residuals, residuals),
            pick(value.Arguments, needed),
        )

    @classmethod
    def push_forward(cls, args: Any, tangents: Any) -> tuple[Tensor, ...]:
        if not cls.detaches:
            return super().push_forward(args, tangents)
        arguments = cls.value.Arguments
        return cls.value.push_forward(pick(arguments, args), pick(arguments, tangents))

    @classmethod
    def plain(cls, args: Any) -> dict[str, Tensor]:
        """The reference needs a tangent for every sample, so it receives only the first n samples."""
        batched = cls.batched(args)
        rows = [getattr(args, name).shape[0] for name in batched]
        count = min(rows, default=0)
        first = args._replace(**{name: getattr(args, name)[:count] for name in batched})
        names = [y for y in cls.outputs if y in (*cls.value.Results._fields, *cls.tangents)]
        found = dict(zip(names, cls.reference(*first), strict=True))
        if cls.detaches:
            found |= {y: found[y].detach() for y in cls.tangents}
        if count != max(rows, default=0):
            found |= cls.value.plain(pick(cls.value.Arguments, args))
        return found


def detached(function: type[JvpFunction]) -> type[JvpFunction]:
    """`function` with its tangent as a constant."""
    return type(f"{function.__name__}Detached", (function,), {"detaches": True})


def reference_gradients(
    function: type[KernelFunction], names: Names, grads: Args, *args: Any
) -> tuple[Tensor, ...]:
    """The gradients of the named arguments from the reference; the gradient of a None argument is empty."""
    each = dict(zip(function.Arguments._fields, vjp(function.reference, args, grads), strict=False))
    like = next(g for g in grads if g is not None)
    found = (each[name] for name in names)
    return tuple(like.new_empty(0) if x is None else x for x in found)


def _merged(ctx: Any, saved: Any) -> Args:
    """Reassemble the inputs: the saved tensors and the non-tensors."""
    return tuple(s if t else x for s, t, x in zip(saved, ctx.is_tensor, ctx.inputs, strict=True))


def _spread(ctx: Any, tensors: list[Tensor]) -> list[Tensor | None]:
    each = iter(tensors)
    return [next(each) if t else None for t in ctx.is_tensor]


def _requires_grad(args: Args) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _tuple(output: Outputs) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _unmapped_rows(x: Tensor, dim: int | None) -> int | None:
    """The length of dimension 0 as the function sees it; None if it sees no batch dimension."""
    shape = list(x.shape)
    if dim is not None:
        shape.pop(dim)
    return shape[0] if len(shape) >= 2 else None


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Merge the mapped dimension (or `size` copies) into dimension 0."""
    return (x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
