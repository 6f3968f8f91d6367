"""Derivatives of the compiled kernels: reverse mode, forward mode, vmap, and torch.compile.

PyTorch offers two doors, and neither is enough alone:

- A custom op with `register_autograd` compiles, but has no forward mode: under `torch.func.jvp` its tangent
  is silently zero.
- `torch.autograd.Function` has `jvp` and `vmap`, but torch.compile traces into it, drops its `jvp` and
  differentiates the traced forward instead: with a custom op inside, again a silent zero.

So every public function is an autograd.Function around a custom op, and torch.compile is told to put the call
into its graph as it is (`allow_in_graph`). AOTAutograd then runs the transforms on the Function itself and
finds its rules, and Inductor sees the custom op. What torch.compile loses before our code runs are the
tangents of `torch.autograd.forward_ad`: there `call` raises.

Every kernel has a reference: the same function in plain PyTorch. Derivatives that no kernel computes (of a
mask, of a gradient) are the reference's, so they are always right, and only ever slower.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pmf import _library

__all__ = [
    "KernelFunction",
    "call",
    "functions",
    "in_float32",
    "register",
    "register_fake",
    "vjp",
]

Args = tuple[Any, ...]
Outputs = Any  # a Tensor, or a tuple of them: what the raw op returns


class KernelFunction(torch.autograd.Function):
    """A kernel as a differentiable function of positional arguments, all that the raw op takes.

    A subclass names the raw op and its reference; it overrides `gradient` and `tangent` where kernels compute
    them.
    """

    op: ClassVar[str]
    """The raw op: torch.ops.pmf.<op>."""
    constants: ClassVar[int] = 0
    """How many of the last outputs have no derivative."""
    residuals: ClassVar[tuple[int, ...]] = ()
    """Outputs that the backward reads (row statistics)."""
    unsaved: ClassVar[tuple[int, ...]] = ()
    """Tensor arguments whose values the backward does not read."""
    by_reference: ClassVar[tuple[int, ...]] = ()
    """Arguments whose derivative no kernel computes: if one is asked for, the reference computes them all."""
    samples: ClassVar[tuple[int, ...]] = ()
    """Arguments and, always, outputs whose dimension 0 is the batch: vmap folds into it. None: vmap loops."""

    @staticmethod
    def reference(*args: Any) -> tuple[Tensor, ...]:
        """The outputs without the constants, in plain PyTorch."""
        raise NotImplementedError

    @classmethod
    def gradient(cls, grads: Args, args: Args, residuals: Args, needed: Sequence[bool]) -> Args:
        """Gradients of the arguments that need them, given the outputs' (None is zero; not all are None)."""
        return vjp(cls.reference, args, grads)

    @classmethod
    def tangent(cls, args: Args, tangents: Args) -> tuple[Tensor, ...]:
        """Tangents of the outputs without the constants, by differentiable operations (None is zero)."""
        found = jvp(cls.reference, args, tangents)
        rows = [args[i].shape[0] for i in cls.samples if isinstance(args[i], Tensor)]
        if rows and found[-1].shape[0] != min(rows):  # the reference spread the few tangents over all samples
            raise RuntimeError(
                f"{cls.op.removesuffix('_forward')}: forward mode over tangents of the first samples alone "
                "needs detach_tangent=True"
            )
        return found

    @classmethod
    def shares_the_rest(cls, args: Args) -> bool:
        """Whether the arguments outside `samples` are the same for all samples, so that vmap can fold."""
        return True

    @classmethod
    def complete(cls, args: Args) -> Args:
        """The raw op's arguments, with those that it takes beside the Function's."""
        return args

    # What follows is torch.autograd.Function's interface; subclasses leave it alone.

    @classmethod
    def forward(cls, *args: Any) -> Outputs:
        return getattr(torch.ops.pmf, cls.op)(*cls.complete(args))

    @classmethod
    def setup_context(cls, ctx: Any, inputs: Args, output: Outputs) -> None:
        cls.save(ctx, inputs, output)
        ctx.save_for_forward(*(x for x in inputs if isinstance(x, Tensor)))

    @classmethod
    def save(cls, ctx: Any, inputs: Args, output: Outputs) -> None:
        outputs = _tuple(output)
        saved = [x if isinstance(x, Tensor) and i not in cls.unsaved else None for i, x in enumerate(inputs)]
        # Residuals first: if a checkpointed block is computed again with PyTorch's attention, which saves
        # query, key and value first, torch.utils.checkpoint sees that the saved tensors differ.
        ctx.save_for_backward(*(outputs[i] for i in cls.residuals), *saved)
        ctx.mark_non_differentiable(*outputs[len(outputs) - cls.constants :])
        ctx.set_materialize_grads(False)
        ctx.inputs = tuple(None if isinstance(x, Tensor) else x for x in inputs)
        ctx.is_tensor = tuple(isinstance(x, Tensor) for x in inputs)
        ctx.is_single = isinstance(output, Tensor)

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor | None) -> Any:
        n = len(ctx.inputs)
        saved = ctx.saved_tensors  # read once: checkpointing allows no more
        residuals, saved = saved[: len(saved) - n], saved[len(saved) - n :]
        args = tuple(s if t else x for s, t, x in zip(saved, ctx.is_tensor, ctx.inputs, strict=True))
        outputs = grads[: len(grads) - cls.constants]
        if all(g is None for g in outputs):
            return (None,) * n
        if any(ctx.needs_input_grad[i] for i in cls.by_reference):
            found = vjp(cls.reference, args, outputs)
        else:
            found = cls.gradient(outputs, args, residuals, ctx.needs_input_grad)
        # A raw op's defaults, last among its inputs, have no place among its gradients.
        return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False))

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Tensor | None) -> Any:
        # PyTorch switches forward mode off in here, and with it an outer jvp's, whose tangents would be zero.
        # Switched on, the inputs must not carry this level's tangents: it would differentiate once more.
        with forward_ad._set_fwd_grad_enabled(True):
            saved = iter(forward_ad.unpack_dual(x, level=0).primal for x in ctx.saved_tensors)
            args = tuple(next(saved) if t else x for t, x in zip(ctx.is_tensor, ctx.inputs, strict=True))
            if any(tangents[i] is not None for i in cls.by_reference):
                found = jvp(cls.reference, args, tangents)
            else:
                found = cls.tangent(args, tangents)
        return found[0] if ctx.is_single else (*found, *(None,) * cls.constants)

    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Outputs, Any]:
        mapped = [i for i, dim in enumerate(in_dims) if dim is not None]
        rows = {_unmapped_rows(args[i], in_dims[i]) for i in cls.samples if isinstance(args[i], Tensor)}
        is_batch = len(rows) == 1 and None not in rows
        if set(mapped) <= set(cls.samples) and is_batch and cls.shares_the_rest(args):
            folded = [
                _fold(x, in_dims[i], info.batch_size) if i in cls.samples else x for i, x in enumerate(args)
            ]
            output = cls.apply(*folded)
            outputs = tuple(x.unflatten(0, (info.batch_size, -1)) for x in _tuple(output))
        else:
            each = [
                cls.apply(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
                for i in range(info.batch_size)
            ]
            output = each[0]
            outputs = tuple(torch.stack(same) for same in zip(*map(_tuple, each), strict=True))
        return (outputs[0], 0) if isinstance(output, Tensor) else (outputs, (0,) * len(outputs))


functions: dict[str, type[KernelFunction]] = {}


def call(name: str, *args: Any) -> Any:
    """Run a registered KernelFunction so that every derivative is right, or raise."""
    _library.require()
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args) and _on_cuda(args):
        return _plain(name, args)
    if not torch.compiler.is_compiling():
        return functions[name].apply(*args)
    from . import _compiled  # imports torch._dynamo, which costs seconds

    # Read here, where torch.compile guards it: a graph compiled before is not reused inside a dual_level.
    if forward_ad._current_level >= 0 and not _compiled.in_func_jvp():
        op = name.removesuffix("_detached").removesuffix("_jvp")
        raise RuntimeError(
            f"{op}: torch.compile drops the tangents of torch.autograd.forward_ad; "
            f"call pmf.ops.{op}_jvp with explicit tangents, or torch.func.jvp, instead"
        )
    return _compiled.apply(name, *args)


def _on_cuda(args: Args) -> bool:
    return _library.takes_cuda_kernel(next(x for x in args if isinstance(x, Tensor)))


def _plain(name: str, args: Args) -> Outputs:
    """float64 on CUDA: the reference, which PyTorch differentiates; None for what only a backward reads."""
    function = functions[name]
    if name.endswith("_detached"):
        outputs = _plain_detached(functions[name.removesuffix("_detached")], function, args)
    else:
        outputs = function.reference(*args)
    read = (None,) * len(function.residuals)
    return outputs[0] if len(outputs) == 1 and not read else (*outputs, *read)


def _plain_detached(
    jvp: type[KernelFunction], detached: type[KernelFunction], args: Args
) -> tuple[Tensor, ...]:
    """The reference wants tangents of all samples: zeros follow the first n, and come off again."""
    rows = [args[i].shape[0] for i in jvp.samples if isinstance(args[i], Tensor)]
    count, batch = min(rows), max(rows)

    def whole(i: int, x: Any) -> Any:
        per_sample = i in jvp.samples or (i in detached.unsaved and isinstance(x, Tensor) and x.dim() > 1)
        if not isinstance(x, Tensor) or not per_sample or x.shape[0] != count:
            return x
        return torch.cat((x, x.new_zeros((batch - count, *x.shape[1:]))))

    outputs = jvp.reference(*(whole(i, x) for i, x in enumerate(args)))
    half = len(outputs) // 2
    return (*outputs[:half], *(y[:count].detach() for y in outputs[half:]))


def register(name: str, function: type[KernelFunction], fake: Callable[..., Outputs] | None = None) -> None:
    """Let `call` find `function`; with `fake`, give its raw op shapes, a gradient and a vmap.

    The raw op's own gradient and vmap are for those who call torch.ops.pmf directly: `call` never needs them.
    """
    functions[name] = function
    if fake is None or _library.missing():
        return
    register_fake(function.op, fake)
    torch.library.register_autograd(f"pmf::{function.op}", function.backward, setup_context=function.save)
    torch.library.register_vmap(f"pmf::{function.op}", function.vmap)


def register_fake(op: str, fake: Callable[..., Outputs]) -> None:
    """Give a raw op its shapes alone."""
    if not _library.missing():
        torch.library.register_fake(f"pmf::{op}", fake)


def vjp(function: Callable[..., tuple[Tensor, ...]], args: Args, cotangents: Args) -> Args:
    """Gradients of plain PyTorch code for all its arguments: None where an argument is no floating tensor."""
    pure, tensors, where = _of_tensors(function, args)
    outputs, pull = torch.func.vjp(pure, *tensors)[:2]
    grads: list[Tensor | None] = [None] * len(args)
    found = pull(
        tuple(torch.zeros_like(y) if c is None else c for y, c in zip(outputs, cotangents, strict=True))
    )
    for i, grad in zip(where, found, strict=True):
        grads[i] = grad
    return tuple(grads)


def jvp(function: Callable[..., tuple[Tensor, ...]], args: Args, tangents: Args) -> tuple[Tensor, ...]:
    """Tangents of plain PyTorch code; a tangent of None is zero.

    J t is the gradient of <J^T c, t> in c, for any c: two reverse passes, because forward-mode levels do not
    nest.
    """
    pure, tensors, where = _of_tensors(function, args)
    given = (tangents[i] for i in where)
    directions = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(tensors, given, strict=True))
    cotangents = tuple(torch.zeros_like(y) for y in pure(*tensors))
    pull = torch.func.vjp(lambda *c: torch.func.vjp(pure, *tensors)[1](c), *cotangents)[1]
    return pull(directions)


def in_float32(
    function: Callable[..., tuple[Tensor, ...]], like: int = 0, wide: tuple[int, ...] = ()
) -> Callable[..., tuple[Tensor, ...]]:
    """Let plain PyTorch code compute 16-bit inputs in float32, in spite of autocast, and round once: to the
    dtype of argument `like`, but for the outputs `wide`.
    """

    @functools.wraps(function)
    def wrapper(*args: Any) -> tuple[Tensor, ...]:
        with torch.autocast(args[like].device.type, enabled=False):
            found = function(*map(_widen, args))
            return tuple(y if i in wide else y.to(args[like].dtype) for i, y in enumerate(found))

    return wrapper


def _of_tensors(
    function: Callable[..., Any], args: Args
) -> tuple[Callable[..., Any], tuple[Tensor, ...], list[int]]:
    """`function` as one of its floating tensors alone, these tensors, and their positions."""
    where = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]

    def pure(*tensors: Tensor) -> Any:
        full = list(args)
        for i, x in zip(where, tensors, strict=True):
            full[i] = x
        return function(*full)

    return pure, tuple(args[i] for i in where), where


def _widen(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


def _tuple(output: Outputs) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _unmapped_rows(x: Tensor, dim: int | None) -> int | None:
    """The length of dimension 0 as the function sees it; None where it sees no batch beside the features."""
    shape = list(x.shape)
    if dim is not None:
        shape.pop(dim)
    return shape[0] if len(shape) >= 2 else None


def _fold(x: Any, dim: int | None, size: int) -> Any:
    """Merge the mapped dimension (or `size` copies) into dimension 0."""
    if not isinstance(x, Tensor):
        return x
    return (x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
