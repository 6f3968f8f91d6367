"""Everything an elementwise op computes, against the float64 reference on the same rounded inputs."""

from collections.abc import Callable
from typing import Any

import torch
from helpers.levels import LEVELS, at_level
from helpers.tolerance import assert_close, tolerance
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pmf import ops, reference
from pmf.check import cases
from pmf.check.cases import DTYPES, Form

few_examples = settings(max_examples=60, deadline=None, derandomize=True)

# A sum of few terms may be much smaller than the terms; its result lacks the digits that cancel.
FEW_TERMS = 16


def levels() -> st.SearchStrategy[str]:
    return st.sampled_from(LEVELS)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from(DTYPES)


# ---- memory layouts


def _gaps(x: Tensor) -> Tensor:
    """Rows with NaN before and after them."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), torch.nan)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


def _repeated(x: Tensor) -> Tensor:
    """The first sample repeated, with stride 0."""
    return x[:1].expand_as(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "gaps between rows": _gaps,
    "samples inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last dimension strided": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "one sample repeated": _repeated,
}


def layouts() -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(LAYOUTS))


# ---- results


def normal(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(cases.normal(*shapes, seed=seed))


def results(
    module: Any, name: str, inputs: Any, tangents: Any, dtype: torch.dtype, constants: int = 0, **options: Any
) -> dict[str, Any]:
    """By direction (`pmf.check.cases.results`); the last `constants` inputs take no gradient."""
    form, last = (
        Form(name, tuple(range(len(tangents))), options=options),
        range(len(inputs) - constants, len(inputs)),
    )
    return cases.results(module, form, inputs, tangents, dtype, last)


def check(
    level: str, name: str, inputs: Any, tangents: Any, *, terms: int = 1, constants: int = 0, **options: Any
) -> None:
    """Check the op against the float64 reference in everything; `terms` widens the limit (FEW_TERMS)."""
    dtype = inputs[0].dtype
    exact = results(reference, name, _double(inputs), _double(tangents), dtype, constants, **options)
    with at_level(level):
        found = results(ops, name, inputs, tangents, dtype, constants, **options)
    for what, expected in exact.items():
        assert all(y.dtype == dtype for y in found[what])
        try:
            assert_close(found[what], expected, terms * tolerance("elementwise", dtype))
        except AssertionError as problem:
            raise AssertionError(f"{name}, {what}, {dtype}, {level}: {problem}") from None


def check_first_samples(name: str, inputs: Any, tangents: Any, shared: Any, **options: Any) -> None:
    """Tangents of the first n samples: bit for bit what the op gives for those samples alone.

    `shared`: the positions of inputs without a batch dimension (weights, tables). With detached tangents, the
    gradients of the values are the plain op's.
    """
    batch = inputs[0].shape[0]
    plain, jvp = getattr(ops, name), getattr(ops, name + "_jvp")
    values = _tuple(plain(*inputs, **options))
    for n in range(batch + 1):
        cut = [None if t is None else t[:n] for t in tangents]
        first = [x if i in shared else x[:n] for i, x in enumerate(inputs)]
        alone = _tuple(jvp(*first, *cut, **options))
        found = _tuple(jvp(*inputs, *cut, **options))
        half = len(values)
        for y, y_t, expected, expected_t in zip(
            found[:half], found[half:], values, alone[half:], strict=True
        ):
            assert torch.equal(y, expected)
            assert torch.equal(y_t, expected_t)
        leaves = [x.detach().requires_grad_() for x in inputs]
        detached = _tuple(jvp(*leaves, *cut, detach_tangent=True, **options))
        assert not any(y_t.requires_grad for y_t in detached[half:])
        used = [x for i, x in enumerate(leaves) if i < 4]  # rotary's tables take no gradient
        grads = torch.autograd.grad([y.sum() for y in detached[:half]], used)
        expected_grads = torch.autograd.grad([y.sum() for y in _tuple(plain(*leaves, **options))], used)
        assert all(map(torch.equal, grads, expected_grads))


def check_repeatable(name: str, inputs: Any, tangents: Any, constants: int = 0, **options: Any) -> None:
    """Two runs agree bitwise, and so do one thread and two."""
    runs = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        runs.append(results(ops, name, inputs, tangents, inputs[0].dtype, constants, **options))
    for again in runs[1:]:
        for what, tensors in runs[0].items():
            assert all(map(torch.equal, tensors, again[what])), what


def _tuple(y: Any) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else tuple(y)


def _double(tensors: Any) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]
