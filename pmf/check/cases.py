"""An op at one shape: its inputs, everything it computes, and the distance from float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pmf import ops, reference

from .tolerance import relative_error, spread, tensors, tolerance

__all__ = ["DTYPES", "Case", "Form", "gradients", "limits", "normal", "prepare", "results"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Results = dict[str, Sequence[Tensor]]
Errors = dict[str, float]
"""By direction, in units of the limit: up to 1 is correct."""


def _behind(args: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    return (*args, *tangents)


@dataclass(frozen=True)
class Form:
    """How an op in pmf.ops and pmf.reference is called.

    tangents: positions of the arguments that have a tangent in the op's _jvp form.
    kind: whose limits apply to the gradients (`tolerance.FACTORS`); values use those without " gradient".
    weave: (arguments, tangents) -> the arguments of the _jvp form.
    """

    name: str
    tangents: tuple[int, ...]
    kind: str = "elementwise"
    options: Mapping[str, Any] = field(default_factory=dict)
    weave: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]] = _behind

    def plain(self, module: Any) -> Callable[..., Any]:
        op = getattr(module, self.name)
        return lambda *args: op(*args, **self.options)

    def jvp(self, module: Any, **more: Any) -> Callable[..., Any]:
        """A function of the arguments followed by their tangents."""
        op, n = getattr(module, self.name + "_jvp"), len(self.tangents)
        return lambda *args: op(
            *self.weave(args[: len(args) - n], args[len(args) - n :]), **self.options, **more
        )


@dataclass(frozen=True)
class Case(Form):
    """An op at one shape.

    shapes: of the arguments. Those at `constants` are numbers in (0, 1) without gradients: float32, or
    float64 for float64.
    samples: positions of the arguments whose dimension 0 is the batch; if any, tangents of the first half of
    the samples are tested too.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    constants: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shapes[0]))}{self.note}"


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Standard normal numbers in float64, identical everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in shapes]


def results(
    module: Any,
    form: Form,
    args: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    dtype: torch.dtype,
    constants: Sequence[int] = (),
) -> Results:
    """Everything an op in pmf.ops or pmf.reference computes, by direction.

    Gradients are those of the values, through the tangents only (the last half of the outputs), and through
    both; the incoming gradients are rounded to dtype.
    """
    x = [t if i in constants else t.detach().requires_grad_() for i, t in enumerate(args)]
    x_t = [None if t is None else t.detach().requires_grad_() for t in tangents]
    leaves = [t for i, t in enumerate(x) if i not in constants]
    values = tensors(form.plain(module)(*x))
    both = tensors(form.jvp(module)(*x, *x_t))
    half, arriving = len(values), gradients(both, dtype)
    every_leaf = [*leaves, *(t for t in x_t if t is not None)]
    return {
        "forward": [y.detach() for y in values],
        "jvp": [y.detach() for y in both],
        "backward": torch.autograd.grad(values, leaves, gradients(values, dtype)),
        "backward of tangent": torch.autograd.grad(
            both[half:], every_leaf, arriving[half:], retain_graph=True, materialize_grads=True
        ),
        "backward of jvp": torch.autograd.grad(both, every_leaf, arriving, materialize_grads=True),
    }


def gradients(outputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Normal numbers, rounded to dtype, as incoming gradients of the outputs."""
    drawn = normal(*(tuple(y.shape) for y in outputs), seed=3)
    return [g.to(dtype).to(y.device, y.dtype) for g, y in zip(drawn, outputs, strict=True)]


def limits(kind: str, dtype: torch.dtype) -> dict[str, float]:
    """Limits for the entries of `results`. Weight gradients sum over all tokens, like a matrix product."""
    value, gradient = kind.removesuffix(" gradient"), "gemm" if kind == "elementwise" else kind
    return {
        "forward": tolerance(value, dtype),
        "jvp": tolerance(value, dtype),
        "jvp of first samples": tolerance(value, dtype),
        "backward": tolerance(gradient, dtype),
        "backward of tangent": tolerance(gradient, dtype),
        "backward of jvp": tolerance(gradient, dtype),
    }


def prepare(case: Case, dtype: torch.dtype, device: torch.device) -> Callable[[], Errors]:
    """Draw the inputs and compute the exact result; the returned function runs the op and compares."""
    drawn, wide = normal(*case.shapes), torch.promote_types(dtype, torch.float32)
    args = [
        x.sigmoid().to(device, wide) if i in case.constants else x.to(device, dtype)
        for i, x in enumerate(drawn)
    ]
    along = normal(*(case.shapes[i] for i in case.tangents), seed=2)
    tangents = [
        x.to(device, wide if i in case.constants else dtype)
        for i, x in zip(case.tangents, along, strict=True)
    ]
    here = _at(case, device)
    exact = results(
        reference, here, [x.double() for x in args], [x.double() for x in tangents], dtype, case.constants
    )
    of_direction = limits(case.kind, dtype)
    half = args[0].shape[0] // 2 if case.samples else 0
    if half:
        outputs = len(exact["forward"])
        exact["jvp of first samples"] = [y[:half] if i >= outputs else y for i, y in enumerate(exact["jvp"])]

    def measure() -> Errors:
        found = results(ops, here, args, tangents, dtype, case.constants)
        if half:
            cut = [t[:half] if i in case.samples else t for i, t in zip(case.tangents, tangents, strict=True)]
            first = here.jvp(ops, detach_tangent=True)(*args, *cut)
            found["jvp of first samples"] = tensors(first)
        return {what: _worst(found[what], exact[what], of_direction[what]) for what in exact}

    return measure


def _worst(found: Sequence[Tensor], exact: Sequence[Tensor], limit: float) -> float:
    pairs = zip(found, exact, strict=True)
    return max(relative_error(one, truth) / (limit * spread(truth)) for one, truth in pairs)


def _at(case: Case, device: torch.device) -> Form:
    """The same with the options' tensors on the device."""
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.options.items()}
    return Form(case.name, case.tangents, case.kind, options, case.weave)
