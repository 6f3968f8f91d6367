"""Cases that every elementwise op shares: value, value with tangent, and backward, against plain PyTorch.

These ops are bound by memory. The bytes of a case are what must move: each input read once, each output
written once; a large copy, in the table too, shows what this machine can do.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pmf.bench.harness import Case, relative_error

DTYPES = (torch.float32, torch.bfloat16)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
COPY_ELEMENTS = 1 << 24


def copy_case(dtype: torch.dtype) -> Case:
    """The ceiling: torch's copy of a buffer larger than the caches."""
    source = torch.randn(COPY_ELEMENTS).to(dtype)
    target = torch.empty_like(source)
    moved = 2.0 * source.numel() * source.element_size()
    return Case(
        f"copy {str(dtype).removeprefix('torch.')}",
        {"torch copy_": lambda: target.copy_(source)},
        bytes=moved,
    )


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _bytes(tensors: Sequence[Tensor]) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


def pair_cases(
    name: str,
    op: Callable[..., Any],
    op_jvp: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    varying: int,
    dtype: torch.dtype,
) -> Iterator[Case]:
    """value, value + JVP and backward of one op at one size.

    op, plain: functions of (*inputs, *constants); the first ``varying`` inputs carry tangents.
    op_jvp: function of (*inputs, *constants, *tangents).
    """
    what = f"{list(inputs[0].shape)} {str(dtype).removeprefix('torch.')}"
    tangents = tuple(torch.randn_like(x) for x in inputs[:varying])
    fixed = (*inputs[varying:], *constants)
    limit = LIMITS[dtype]

    def exact(*tensors: Tensor) -> list[Tensor]:
        return [x.double() for x in tensors]

    def case(
        kind: str, ours: Callable[[], Any], theirs: Callable[[], Any], truth: Any, read: Sequence[Tensor]
    ) -> Case:
        runs = {f"pmf {name}": ours, "plain PyTorch": theirs}
        errors = {key: relative_error(_tensors(run()), _tensors(truth)) for key, run in runs.items()}
        return Case(f"{kind} {what}", runs, errors, limit, bytes=_bytes(read) + _bytes(_tensors(ours())))

    arguments = (*inputs, *constants)
    yield case(
        "forward", lambda: op(*arguments), lambda: plain(*arguments), plain(*exact(*arguments)), arguments
    )

    def jvp_of(
        function: Callable[..., Any], primals: Sequence[Tensor], rest: Sequence[Tensor], along: Any
    ) -> Any:
        pair: Any = torch.func.jvp(lambda *x: function(*x, *rest), tuple(primals), tuple(along))
        return (*_tensors(pair[0]), *_tensors(pair[1]))

    yield case(
        "forward + JVP",
        lambda: op_jvp(*arguments, *tangents),
        lambda: jvp_of(plain, inputs[:varying], fixed, tangents),
        jvp_of(plain, exact(*inputs[:varying]), exact(*fixed), exact(*tangents)),
        (*arguments, *tangents),
    )

    leaves = [x.detach().requires_grad_() for x in inputs]
    outs, plain_outs = _tensors(op(*leaves, *constants)), _tensors(plain(*leaves, *constants))
    grads = [torch.randn_like(x) for x in outs]
    exact_leaves = [x.detach().double().requires_grad_() for x in inputs]
    exact_outs = _tensors(plain(*exact_leaves, *exact(*constants)))
    yield case(
        "backward",
        lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True),
        lambda: torch.autograd.grad(plain_outs, leaves, grads, retain_graph=True),
        torch.autograd.grad(exact_outs, exact_leaves, exact(*grads)),
        (*arguments, *grads),
    )
