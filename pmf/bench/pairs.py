"""Cases common to all elementwise ops: value, value with tangent, and backward, against plain PyTorch.

These ops are memory-bound. A case's bytes are those that must move: each input read once, each output written
once. The yardstick is torch's copy: on a processor of as many bytes in the same rounds and into new memory,
since the rate depends on what caches still hold, on a GPU of a large buffer.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmf.bench.harness import Case, Planned, Setting, against
from pmf.check.tolerance import dtype_name, tensors, tolerance

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {
    "tiny": (_F32, _BF16),
    "cpu": (_F32, _BF16),
    "quick": (_BF16,),
    "full": (_BF16, _F16, _F32),
}
BATCH = {"tiny": 1, "cpu": 8, "quick": 128, "full": 128}
TOKENS = {"tiny": 20, "cpu": 276, "quick": 276, "full": 276}
COPY_ELEMENTS = {"tiny": 1 << 12, "quick": 1 << 29, "full": 1 << 29}
COPY = "torch clone"


class Pair(NamedTuple):
    """An op, its _jvp twin and its plain form, with inputs.

    op, plain: functions of (*inputs, *constants); the first `varying` inputs carry tangents.
    op_jvp: function of (*inputs, *constants, *tangents).
    differentiated: backward finds the gradients of this many of the first inputs; None: of all.
    linear: the op is linear in this many of the first inputs, so that backward does not read them.
    """

    op: Callable[..., Any]
    op_jvp: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: Sequence[Tensor]
    constants: Sequence[Tensor]
    varying: int
    differentiated: int | None = None
    linear: int = 0

    def tangents(self) -> list[Tensor]:
        return [torch.randn_like(x) for x in self.inputs[: self.varying]]


def copy_case(setting: Setting, dtype: torch.dtype) -> Planned:
    """The yardstick on a GPU: torch's copy of a buffer larger than the caches."""

    def build() -> Case:
        (source,) = setting.normal((COPY_ELEMENTS[setting.scale],), dtype=dtype)
        target = torch.empty_like(source)
        moved = 2.0 * source.numel() * source.element_size()
        return Case({"torch copy_": lambda: target.copy_(source)}, bytes=moved)

    name = dtype_name(dtype)
    return Planned(f"copy {name}", build, {"op": "copy", "dtype": name})


def _bytes(values: Sequence[Tensor]) -> float:
    return float(sum(x.numel() * x.element_size() for x in values))


def _exactly(values: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double() for x in values]


def pair_cases(
    name: str, setting: Setting, draw: Callable[[torch.dtype], Pair], shape: Sequence[int]
) -> Iterator[Planned]:
    """Value, value + JVP and backward of one op, in every dtype of the setting, and the yardstick.

    draw: creates the op's inputs. shape: of the first one, for the label.
    """
    kinds = {"forward": _forward, "forward + JVP": _forward_jvp, "backward": _backward}
    for dtype in DTYPES[setting.scale]:
        if setting.device.device.type != "cpu":
            yield copy_case(setting, dtype)
        for kind, build in kinds.items():
            facts = {"op": f"{name} {kind}", "shape": list(shape), "dtype": dtype_name(dtype)}
            label = f"{kind} {list(shape)} {dtype_name(dtype)}"
            yield Planned(label, functools.partial(lambda f, d: f(name, draw(d), d), build, dtype), facts)


def _case(
    name: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    truth: Any,
    read: Sequence[Tensor],
    written: Sequence[Tensor],
    dtype: torch.dtype,
    kind: str = "elementwise",
) -> Case:
    runs = {f"pmf {name}": ours, "plain PyTorch": theirs}
    error = against(dict(runs), tensors(truth))
    moved = _bytes(read) + sum(x.numel() for x in written) * dtype.itemsize
    if read[0].device.type == "cpu":
        source = torch.ones(round(moved / 2 / dtype.itemsize), dtype=dtype)
        runs[COPY] = source.clone
    return Case(runs, lambda name: None if name == COPY else error(name), tolerance(kind, dtype), bytes=moved)


def _forward(name: str, pair: Pair, dtype: torch.dtype) -> Case:
    given = (*pair.inputs, *pair.constants)
    truth = pair.plain(*_exactly(given))
    written = tensors(truth)
    return _case(name, lambda: pair.op(*given), lambda: pair.plain(*given), truth, given, written, dtype)


def _jvp_of(pair: Pair, primals: Sequence[Tensor], rest: Sequence[Tensor], along: Sequence[Tensor]) -> Any:
    out: Any = torch.func.jvp(lambda *x: pair.plain(*x, *rest), tuple(primals), tuple(along))
    return (*tensors(out[0]), *tensors(out[1]))


def _forward_jvp(name: str, pair: Pair, dtype: torch.dtype) -> Case:
    along = pair.tangents()
    given = (*pair.inputs, *pair.constants)
    moving, fixed = given[: pair.varying], given[pair.varying :]
    truth = _jvp_of(pair, _exactly(moving), _exactly(fixed), _exactly(along))
    return _case(
        name,
        lambda: pair.op_jvp(*given, *along),
        lambda: _jvp_of(pair, moving, fixed, along),
        truth,
        (*given, *along),
        truth,
        dtype,
    )


def _backward(name: str, pair: Pair, dtype: torch.dtype) -> Case:
    count = len(pair.inputs) if pair.differentiated is None else pair.differentiated
    fixed = (*pair.inputs[count:], *pair.constants)
    leaves = [x.detach().requires_grad_() for x in pair.inputs[:count]]
    exact_leaves = [x.requires_grad_() for x in _exactly(pair.inputs[:count])]
    exact_outs = tensors(pair.plain(*exact_leaves, *_exactly(fixed)))
    grads = [torch.randn_like(x, dtype=dtype) for x in exact_outs]
    exact_grads = _exactly(grads)
    truth = torch.autograd.grad(exact_outs, exact_leaves, exact_grads)
    passed_on = {x.data_ptr() for x in exact_grads}
    ours = functools.cache(lambda: tensors(pair.op(*leaves, *fixed)))
    theirs = functools.cache(lambda: tensors(pair.plain(*leaves, *fixed)))
    return _case(
        name,
        lambda: torch.autograd.grad(ours(), leaves, grads, retain_graph=True),
        lambda: torch.autograd.grad(theirs(), leaves, grads, retain_graph=True),
        truth,
        (*pair.inputs[pair.linear :], *pair.constants, *grads),
        [x for x in truth if x.data_ptr() not in passed_on],
        dtype,
        kind="gemm",  # gradients of weights sum over all tokens
    )
