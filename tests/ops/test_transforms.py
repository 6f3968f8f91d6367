"""Requirements on every op: derivatives under each PyTorch transform, none of them silently lost.

All comparisons are with the reference, in float64 unless stated. Numerics are tested in test_<op>.py.
"""

from typing import Any

import pytest
import torch
from helpers.ops import CASES, Case
from helpers.tolerance import assert_close, tolerance
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import pmf.ops as ops
import pmf.reference as reference
from pmf.ops._autograd import Gradients, KernelFunction
from pmf.ops.swiglu import _Swiglu

EXACT = 1e-12


def tuple_of(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def energy(function):
    """A scalar of all outputs that are not constants."""

    def scalar(*args: Tensor) -> Tensor:
        return sum(y.square().sum() for y in tuple_of(function(*args)))  # type: ignore[return-value]

    return scalar


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def gradients(function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(energy(function)(*inputs), inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """All cases share code objects, and torch.compile would reach its recompile limit."""
    torch.compiler.reset()


@pytest.fixture(params=sorted(CASES))
def case(request) -> Case:
    return CASES[request.param]


# values and tangents


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_and_tangent_at_every_level(case, level, dtype):
    args = tuple(x.to(dtype) for x in case.args)
    tangents = tuple(x.to(dtype) for x in case.directions())
    wide = tuple(x.double() for x in (*args, *tangents))
    limit = 4 * tolerance(case.kind, dtype)  # a few dozen values: single errors do not average out
    actual = case.jvp(ops)(*args, *tangents)
    assert all(y.dtype == dtype for y in actual)
    assert_close(actual, case.jvp(reference)(*wide), limit)
    assert_close(case.plain(ops)(*args), case.plain(reference)(*wide[: len(args)]), limit)


def test_absent_tangents_are_zero(case):
    args, tangents = case.args, case.directions()
    for i in range(len(tangents)):
        alone = tuple(t if i == j else None for j, t in enumerate(tangents))
        zeros = tuple(t if i == j else torch.zeros_like(t) for j, t in enumerate(tangents))
        assert_close(case.jvp(ops)(*args, *alone), case.jvp(reference)(*args, *zeros), EXACT)
    nothing = case.jvp(ops)(*args, *(None for _ in tangents))
    values = tuple_of(case.plain(ops)(*args))
    assert_close(nothing[: len(values)], values, 0.0)
    assert all((t == 0).all() for t in nothing[len(values) :])


def test_tangents_of_only_the_first_samples(case, level):
    args, tangents = case.args, case.directions()
    batched = case.args[0].shape[0]
    fewer = tuple(t[:1] if t.shape[0] == batched and t.dim() > 1 else t for t in tangents)
    values = tuple_of(case.plain(reference)(*args))
    expected = case.jvp(reference)(*args, *tangents)
    actual = case.jvp(ops, detach_tangent=True)(*args, *fewer)
    assert_close(actual[: len(values)], values, EXACT)
    assert_close(actual[len(values) :], [t[:1] for t in expected[len(values) :]], EXACT)


@pytest.mark.parametrize("op", ["rms_norm", "attention"])
def test_forward_mode_over_tangents_of_the_first_samples_names_the_remedy(op):
    x = torch.randn(2, 3, 4, 5)
    rest = {"rms_norm": (x[0, 0, 0], x[:1]), "attention": (x, x, x[:1], None, None)}[op]
    with pytest.raises(RuntimeError, match=f"{op}_jvp: forward mode .* needs detach_tangent=True"):
        torch.func.jvp(lambda y: getattr(ops, f"{op}_jvp")(y, *rest), (x,), (x,))


def test_two_runs_agree_bitwise(case):
    inputs = leaves(*(x.float() for x in (*case.args, *case.directions())))
    once, again = (gradients(case.jvp(ops), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# reverse mode


def test_gradcheck(case):
    plain, pair = case.plain(ops), case.jvp(ops)
    assert torch.autograd.gradcheck(plain, leaves(*case.args), check_forward_ad=True)
    inputs = leaves(*case.args, *case.directions())
    assert torch.autograd.gradcheck(pair, inputs, check_forward_ad=True)


def test_gradient_of_only_the_tangent(case):
    inputs = leaves(*case.args, *case.directions())
    half = len(tuple_of(case.plain(ops)(*case.args)))
    both = [
        torch.autograd.grad(
            energy(lambda *a, m=m: case.jvp(m)(*a)[half:])(*inputs), inputs, allow_unused=True
        )
        for m in (ops, reference)
    ]
    for actual, expected, x in zip(*both, inputs, strict=True):
        zero = torch.zeros_like(x)
        assert_close(zero if actual is None else actual, zero if expected is None else expected, EXACT)


def test_second_derivatives(case):
    scalar = energy(case.plain(ops)), energy(case.plain(reference))
    actual, expected = (torch.func.hessian(f)(*case.args) for f in scalar)
    assert_close(actual, expected, EXACT)
    inputs = leaves(*case.args, *case.directions())
    third = []
    for module in (ops, reference):
        first = torch.autograd.grad(energy(case.jvp(module))(*inputs), inputs, create_graph=True)
        third.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    assert_close(*third, EXACT)


def test_detached_tangent_is_a_constant(case, level):
    inputs = leaves(*case.args, *case.directions())
    outputs = case.jvp(ops, detach_tangent=True)(*inputs)
    values = tuple_of(case.plain(ops)(*inputs[: len(case.args)]))
    assert [y.requires_grad for y in outputs] == [True] * len(values) + [False] * len(values)
    n = len(case.args)
    actual = torch.autograd.grad(sum(y.square().sum() for y in outputs[: len(values)]), inputs[:n])
    assert_close(actual, gradients(case.plain(reference), inputs[:n]), EXACT)


# forward mode and torch.func


def test_forward_mode(case):
    args = case.args
    tangents = tuple(torch.randn_like(x) for x in args)
    expected = torch.func.jvp(case.plain(reference), args, tangents)[1]
    assert_close(torch.func.jvp(case.plain(ops), args, tangents)[1], expected, EXACT)
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(x, t) for x, t in zip(args, tangents, strict=True))
        outputs = tuple_of(case.plain(ops)(*duals))
        assert_close([forward_ad.unpack_dual(y).tangent for y in outputs], tuple_of(expected), EXACT)


def test_nested_forward_mode_loses_no_tangent(case):
    """A Function's jvp runs with forward mode disabled, so tangents left to plain operations were zero."""
    for form, args in ((case.plain, case.args), (case.jvp, (*case.args, *case.directions()))):
        tangents = tuple(torch.randn_like(x) for x in args)

        def third(module, form=form, args=args, tangents=tangents):
            f = energy(form(module))
            first = lambda *a: torch.func.jvp(f, a, tangents)[1]  # noqa: E731
            second = lambda *a: torch.func.jvp(first, a, tangents)[1]  # noqa: E731
            return second(*args), torch.func.jvp(second, args, tangents)[1]

        assert_close(third(ops), third(reference), EXACT)


def test_tangent_of_the_gradient_of_one_input(case):
    """Gradients that were not requested may be empty, and then so must their tangents be."""
    for form, args in ((case.plain, case.args), (case.jvp, (*case.args, *case.directions()))):
        for i in range(len(args)):

            def product(module, form=form, args=args, i=i):
                alone = lambda y: energy(form(module))(*args[:i], y, *args[i + 1 :])  # noqa: E731
                return torch.func.jvp(torch.func.grad(alone), (args[i],), (args[i],))[1]

            assert_close(product(ops), product(reference), EXACT)


def test_a_call_has_no_needless_bookkeeping(monkeypatch):
    """PyTorch inspects a signature in every call; and without derivatives nothing need be recorded."""
    x, weight = torch.randn(2, 8, requires_grad=True), torch.ones(8)
    monkeypatch.setattr("torch.autograd.Function.apply", None)
    ops.rms_norm(x, weight).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    monkeypatch.setattr("pmf.ops._autograd.KernelFunction.setup_context", None)
    with torch.no_grad():
        assert ops.rms_norm(x, weight).isfinite().all()
    with pytest.raises(TypeError, match="NoneType"):
        ops.rms_norm(x, weight)


def test_vmap_over_one_gate_for_each_sample():
    """An unmapped gate [B, 1, D] does not fit a batch into which vmap has folded its dimension."""
    x, branch, gate = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 4, 5), (2, 3, 4, 5), (3, 1, 5)))
    for args, name in (
        ((x, branch, gate), "gated_residual"),
        ((x, branch, gate, x, branch), "gated_residual_jvp"),
    ):
        dims = tuple(None if a is gate else 0 for a in args)
        actual, expected = (torch.func.vmap(getattr(m, name), dims)(*args) for m in (ops, reference))
        assert_close(actual, expected, EXACT)


def test_meta_tensors_get_shapes(case):
    args = (x.to("meta") for x in case.args)
    shapes = [y.shape for y in tuple_of(case.plain(ops)(*args))]
    assert shapes == [y.shape for y in tuple_of(case.plain(ops)(*case.args))]


def test_training_through_a_tangent_of_torch_func(case):
    args = case.args
    tangents = tuple(torch.randn_like(x) for x in args)
    every = tuple(range(len(args)))
    actual, expected = (
        torch.func.grad(energy(lambda *a, m=m: torch.func.jvp(case.plain(m), a, tangents)[1]), argnums=every)(
            *args
        )
        for m in (ops, reference)
    )
    assert_close(actual, expected, EXACT)


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev])
def test_jacobians(case, transform):
    actual, expected = (transform(case.plain(m))(*case.args) for m in (ops, reference))
    assert_close(actual, expected, EXACT)


@pytest.mark.parametrize("mapped", ["all", "first", "last"])
def test_vmap(case, mapped):
    args = case.args
    which = {"all": range(len(args)), "first": (0,), "last": (len(args) - 1,)}[mapped]
    dims = tuple(x.dim() if i in which else None for i, x in enumerate(args))
    stacked = tuple(torch.stack((x, x + 1, 2 * x), -1) if i in which else x for i, x in enumerate(args))
    actual, expected = (torch.func.vmap(case.plain(m), dims)(*stacked) for m in (ops, reference))
    assert_close(actual, expected, EXACT)
    actual, expected = (
        torch.func.vmap(torch.func.grad(energy(case.plain(m))), dims)(*stacked) for m in (ops, reference)
    )
    assert_close(actual, expected, EXACT)


# torch.compile, checkpointing, autocast


def test_compiled_op_and_its_gradients(case):
    for form in (case.plain, case.jvp):
        inputs = leaves(*case.args, *(case.directions() if form == case.jvp else ()))
        compiled = torch.compile(form(ops), fullgraph=True, backend="aot_eager")
        assert_close(compiled(*inputs), form(reference)(*inputs), EXACT)
        assert_close(gradients(compiled, inputs), gradients(form(reference), inputs), EXACT)


def test_compiled_torch_func_jvp_keeps_the_tangent(case):
    tangents = tuple(torch.randn_like(x) for x in case.args)
    actual, expected = (
        lambda args, m=m: torch.func.jvp(case.plain(m), args, tangents)[1] for m in (ops, reference)
    )
    compiled = torch.compile(actual, fullgraph=True, backend="aot_eager")
    assert_close(compiled(case.args), expected(case.args), EXACT)


def test_compiled_forward_ad_raises(case):
    compiled = torch.compile(case.plain(ops), fullgraph=True, backend="aot_eager")
    compiled(*case.args)  # the graph is there before the tangents are
    with forward_ad.dual_level(), pytest.raises(Exception, match=f"call pmf.ops.{case.name}_jvp"):
        compiled(*(forward_ad.make_dual(x, x) for x in case.args))


def test_checkpoint(case):
    inputs = leaves(*case.args, *case.directions())
    actual = gradients(lambda *a: checkpoint(case.jvp(ops), *a, use_reentrant=False), inputs)
    assert_close(actual, gradients(case.jvp(reference), inputs), EXACT)


def test_autocast(case):
    args = tuple(x.float() for x in case.args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = tuple_of(case.plain(ops)(*args))
    is_matmul = case.kind != "elementwise"
    assert all(y.dtype == (torch.bfloat16 if is_matmul else torch.float32) for y in outputs)
    limit = 8 * tolerance(case.kind, torch.bfloat16)  # the inputs are rounded too
    assert_close(outputs, case.plain(reference)(*case.args), limit)


# the raw ops


def test_autocast_joins_16_bit_activations_and_32_bit_parameters():
    x, weight = torch.randn(2, 6).bfloat16(), torch.randn(6)
    calls = (
        lambda: ops.rms_norm(x, weight),
        lambda: ops.rms_norm_jvp(x, weight, x.float())[1],
        lambda: ops.gated_residual(x, x, weight),
        lambda: ops.gated_residual_jvp(x, x, weight, x, None)[1],
        lambda: ops.swiglu(x, x),
    )
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert call().dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            ops.gated_residual(x.float(), x, weight).dtype == torch.float32
        )  # a 32-bit residual stream stays
    with pytest.raises(ValueError, match="dtype"):
        ops.rms_norm(x, weight)


def test_a_single_gradient_traces_as_a_tensor():
    """A schema that returns one Tensor rejects a tuple of one under torch.compile."""

    class Single(Gradients):
        of = _Swiglu
        op = "swiglu_backward"
        outputs = ("gate",)

    gate, up = torch.ones(2, 3), torch.ones(2, 3)
    found = Single.fake(torch.ones(2, 3), gate, up)
    assert isinstance(found, Tensor) and found.shape == gate.shape


def test_opcheck(case, monkeypatch):
    """torch.library.opcheck on each raw op, with the arguments that the public functions pass."""
    seen: dict[str, tuple] = {}
    forward = KernelFunction.forward.__func__

    def spy(cls, *args):
        seen.setdefault(cls.op, args)
        return forward(cls, *args)

    monkeypatch.setattr(KernelFunction, "forward", classmethod(spy))
    gradients(case.plain(ops), leaves(*case.args))
    gradients(case.jvp(ops), leaves(*case.args, *case.directions()))
    assert len(seen) >= 2
    for op, args in seen.items():
        inputs = tuple(
            x.detach().clone().requires_grad_("backward" not in op)
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for x in args
        )
        torch.library.opcheck(getattr(torch.ops.pmf, op).default, inputs)
