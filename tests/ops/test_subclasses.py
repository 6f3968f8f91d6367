"""Tensor subclasses: supported, unwrapped, or rejected by name; never read as plain memory."""

import time

import pytest
import torch
import torch.nn.functional as F
from helpers import emulator
from helpers.kernels import PLACES, at_place
from helpers.levels import EMULATED
from helpers.ops import CASES
from torch import Tensor, nn
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing._internal.logging_tensor import LoggingTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from pmf import ops, replace_sdpa
from pmf.nn import AttentionBranch, MlpBranch, RMSNorm, rotary_tables
from pmf.ops import _subclasses
from pmf.optim import EMA, Muon

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch warns about its prototypes


class Plain(Tensor):
    """Overrides nothing."""


class Child(Plain):
    def norm_of_rows(self) -> Tensor:
        return self.norm(dim=-1)


class Unread(Tensor):
    """Its memory does not represent its values."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Overriding(Tensor):
    def __add__(self, other):
        return super().__add__(other).neg()


class Deaf(Tensor):
    @staticmethod
    def __new__(cls, x):
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention_inputs(nq: int, nk: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    sizes = (nq, nk, nk, nq, nk, nk)
    return tuple(randn(2, 2, n, 8, seed=i, dtype=dtype) for i, n in enumerate(sizes))


@pytest.mark.parametrize(("nq", "nk"), [(3, 7), (7, 3), (5, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_is_the_mask_that_it_stands_for(bias, nq, nk, compiled):
    """Its memory is uninitialised: read as a mask, it gave a different result each time."""
    ahead = nk - nq if bias is causal_lower_right else 0
    mask = torch.ones(nq, nk, dtype=torch.bool).tril(ahead)
    x = [t.requires_grad_() for t in attention_inputs(nq, nk)]
    expected = torch.nan_to_num(F.scaled_dot_product_attention(*x[:3], mask))
    own, jvp = ops.attention, ops.attention_jvp
    if compiled:
        if (nq, nk) not in ((3, 7), (7, 3)):
            pytest.skip("the eager cases have them")
        torch.compiler.reset()
        own, jvp = (torch.compile(f, backend="aot_eager", fullgraph=True) for f in (own, jvp))
    out = own(*x[:3], bias(nq, nk))
    torch.testing.assert_close(out, expected)
    seed = randn(*out.shape, seed=9, dtype=torch.float64)
    if nq <= nk or ahead == 0:  # PyTorch's gradients of rows without keys are NaN in some versions
        grads = (torch.autograd.grad(y, x[:3], seed) for y in (out, expected))
        for found, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(found, wanted)
    for found, wanted in zip(jvp(*x, bias(nq, nk)), ops.attention_jvp(*x, mask), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_causal_bias_of_wrong_lengths_or_as_another_argument_is_rejected():
    q, k, v = attention_inputs(3, 7)[:3]
    with pytest.raises(ValueError, match=r"CausalBias of \[4, 7\], but query and key have lengths \[3, 7\]"):
        ops.attention(q, k, v, causal_lower_right(4, 7))
    with pytest.raises(TypeError, match="swiglu: gate is a torch.nn.attention.bias.CausalBias"):
        ops.swiglu(causal_upper_left(3, 7), randn(3, 7))


def each_tensor_in_turn():
    """Every public function, with the position of one tensor argument."""
    for case in CASES.values():
        for i in range(len(case.args)):
            yield pytest.param(case.plain(ops), case.args, i, id=f"{case.name}-{i}")
        both = (*case.args, *case.directions())
        for i in range(len(both)):
            yield pytest.param(case.jvp(ops), both, i, id=f"{case.name}_jvp-{i}")
    yield pytest.param(ops.newton_schulz, (CASES["swiglu"].args[0],), 0, id="newton_schulz")
    yield pytest.param(lambda x: ops.newton_schulz([x]), (CASES["attention"].args[0][0, 0],), 0, id="list")


@pytest.mark.parametrize(("function", "args", "i"), list(each_tensor_in_turn()))
def test_every_argument_may_be_a_plain_subclass_but_not_an_unknown_one(function, args, i):
    expected = function(*args)
    given = (*args[:i], args[i].as_subclass(Child), *args[i + 1 :])
    found = function(*given)
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    for y, wanted in pairs:
        assert type(y) is Child
        torch.testing.assert_close(y.as_subclass(Tensor), wanted, rtol=0, atol=0)
    for cls in (Unread, Overriding):
        with pytest.raises(TypeError, match=rf"is a .*{cls.__name__}, an unknown tensor subclass"):
            function(*args[:i], args[i].as_subclass(cls), *args[i + 1 :])


def test_a_gradient_reaches_a_plain_subclass():
    x, up = randn(3, 4).as_subclass(Plain).requires_grad_(), randn(3, 4, seed=1)
    ops.swiglu(x, up).sum().backward()
    y = x.detach().as_subclass(Tensor).clone().requires_grad_()
    ops.swiglu(y, up).sum().backward()
    torch.testing.assert_close(x.grad.as_subclass(Tensor), y.grad, rtol=0, atol=0)


def test_parameters_buffers_and_fake_tensors_pass():
    x, w = randn(3, 4), randn(4, seed=1)
    expected = ops.rms_norm(x, w)
    found = ops.rms_norm(nn.Buffer(x), nn.Parameter(w))
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch._subclasses.FakeTensorMode():
        fake = ops.rms_norm(torch.empty(3, 4), torch.empty(4))
    assert fake.shape == (3, 4)
    assert ops.rms_norm(x.to("meta"), w.to("meta")).is_meta


@pytest.mark.filterwarnings("error")
def test_compiled_code_may_have_parameters_buffers_and_jagged_tensors():
    """torch.compile calls a module's buffers nn.Buffer, and inspects caches."""
    module = nn.Module()
    module.weight, module.scale = nn.Parameter(randn(4)), nn.Buffer(randn(4, seed=1))

    def function(x: Tensor) -> Tensor:
        return ops.rms_norm(ops.rms_norm(x, module.weight), module.scale)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(randn(3, 4)), function(randn(3, 4)))
    x, _ = jagged([2, 3], 4)
    module.double()
    torch.testing.assert_close(compiled(x).values(), function(x).values())


def test_compiled_code_breaks_at_a_plain_subclass():
    x, w = randn(3, 4), randn(4, seed=1)
    found = torch.compile(ops.rms_norm, backend="aot_eager")(x.as_subclass(Plain), w)
    torch.testing.assert_close(found.as_subclass(Tensor), ops.rms_norm(x, w))
    with pytest.raises(TypeError, match="rms_norm: x is a .*Unread"):
        torch.compile(ops.rms_norm, backend="aot_eager")(x.as_subclass(Unread), w)


@pytest.mark.parametrize("dropout_p", [0.0, 1e-9])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_where_sdpa_is_replaced(bias, dropout_p):
    """It compares the called function with torch.nn.functional's, which is replaced then."""
    q, k, v = attention_inputs(3, 7)[:3]
    expected = F.scaled_dot_product_attention(q, k, v, bias(3, 7))
    with replace_sdpa():
        found = F.scaled_dot_product_attention(q, k, v, bias(3, 7), dropout_p)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)


def test_a_subclass_with_its_own_dispatch_gets_the_raw_op():
    a, b = randn(3, 4), randn(3, 4, seed=1)
    expected = ops.swiglu(a, b)
    found = ops.swiglu(TwoTensor(a, 2 * a), TwoTensor(b, b))
    torch.testing.assert_close(found.a, expected, rtol=0, atol=0)
    torch.testing.assert_close(found.b, ops.swiglu(2 * a, b), rtol=0, atol=0)
    logged = ops.swiglu(LoggingTensor(a), LoggingTensor(b))
    torch.testing.assert_close(logged.elem, expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match="swiglu: gate is a .*Deaf, whose __torch_dispatch__"):
        ops.swiglu(Deaf(a), b)


# Not subclasses, but unreadable by kernels too.
STRANGE = {
    "masked": (lambda x: masked_tensor(x, x > 0), "MaskedTensor"),
    "sparse": (lambda x: x.to_sparse(), "layout torch.sparse_coo"),
    "sparse rows": (lambda x: x.to_sparse_csr(), "layout torch.sparse_csr"),
    "mkldnn": (lambda x: x.to_mkldnn(), "layout torch._mkldnn"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is quantized"),
    "strided nested": (lambda x: torch.nested.nested_tensor([x, x]), "nested tensor of strided layout"),
    "array": (lambda x: x.numpy(), "must be a tensor, got a numpy.ndarray"),
    "number": (lambda x: 1.0, "must be a tensor, got a builtins.float"),
    "nothing": (lambda x: None, "must be a tensor, got a builtins.NoneType"),
    "uninitialised": (lambda x: nn.UninitializedParameter(), "which has no values yet"),
}


@pytest.mark.parametrize(("make", "words"), STRANGE.values(), ids=STRANGE)
def test_tensors_that_no_kernel_reads_are_named(make, words):
    x, w = randn(3, 4), randn(4)
    with pytest.raises(TypeError, match=rf"^rms_norm: x .*{words}"):
        ops.rms_norm(make(x), w)
    with pytest.raises(
        TypeError, match=rf"^attention_jvp: query_t .*{words}" if words[-4:] != "Type" else "."
    ):
        ops.attention_jvp(x, x, x, make(x) if make(x) is not None else 1, None, None)


def test_a_block_mask_and_a_missing_argument_are_named():
    from torch.nn.attention.flex_attention import create_block_mask

    q = randn(1, 1, 128, 8)
    mask = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 128, 128, device="cpu")
    with pytest.raises(TypeError, match=r"attn_mask must be a tensor, got a .*BlockMask .*create_mask"):
        ops.attention(q, q, q, mask)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'up'"):
        ops.swiglu(q)
    with pytest.raises(TypeError, match="unexpected keyword argument 'window_size'"):
        ops.attention(q, q, q, window_size=3)


def test_lazy_bits_are_resolved():
    """Conjugate and negative views, and zero tensors without memory, differ from their memory's contents."""
    z = torch.complex(randn(2, 2, 5, 8), randn(2, 2, 5, 8, seed=1))
    lazy, solid = z.conj().imag, -z.imag
    assert lazy.is_neg()
    for op, n in ((ops.attention, 3), (ops.swiglu, 2), (ops.attention_jvp, 6), (ops.newton_schulz, 1)):
        for found, expected in zip(op(*[lazy] * n), op(*[solid.clone()] * n), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(ops.newton_schulz([lazy[0, 0]])[0], ops.newton_schulz(solid[0, 0]))
    nothing, zeros = torch._efficientzerotensor(solid.shape), torch.zeros_like(solid)
    for a, b in zip(
        ops.swiglu_jvp(solid, lazy, nothing, lazy), ops.swiglu_jvp(solid, solid, zeros, solid), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def jagged(lengths: list[int], *rest: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A leaf, and its sequences as separate leaves."""
    parts = [randn(n, *rest, seed=seed + i, dtype=torch.float64) for i, n in enumerate(lengths)]
    whole = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    return whole, [p.requires_grad_() for p in parts]


def same(found: Tensor, expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found.unbind(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def heads(x: Tensor) -> Tensor:
    """[..., N, 8] -> [..., 2, N, 4]"""
    return x.unflatten(-1, (2, 4)).transpose(-3, -2)


LENGTHS = [3, 1, 6]


@pytest.mark.parametrize("place", PLACES)
def test_jagged_attention_on_a_gpu_pads_nothing(place):
    """Values, tangents and gradients of each sequence, from as many launches as one sequence takes."""
    parts = [randn(n, 8, seed=n).float() for n in LENGTHS]
    with at_place(place) as device:
        single = [p.to(device).requires_grad_() for p in parts]
        x = torch.nested.nested_tensor(parts, layout=torch.jagged, device=device, requires_grad=True)
        out, out_t = ops.attention_jvp(*map(heads, (x, x, x, x * 2, x)), None)
        pairs = [ops.attention_jvp(*map(heads, (p, p, p, p * 2, p)), None) for p in single]
        same(out, [y for y, _ in pairs], 0)
        same(out_t, [y for _, y in pairs], 0)
        (out + out_t).values().square().sum().backward()
        sum((y + y_t).square().sum() for y, y_t in pairs).backward()
        same(x.grad, [p.grad for p in single], 1e-6)
    if place not in EMULATED:
        return
    with at_place(place), torch.no_grad():
        one = torch.nested.nested_tensor(parts, layout=torch.jagged)
        before = emulator.launches()
        ops.attention(*map(heads, (one, one, one)))
        assert emulator.launches() - before == 1


@pytest.mark.parametrize("is_causal", [False, True])
def test_jagged_attention_equals_attention_of_each_sequence(is_causal):
    x, parts = jagged(LENGTHS, 8)
    out = ops.attention(heads(x), heads(x * 2), heads(x), is_causal=is_causal)
    expected = [
        F.scaled_dot_product_attention(*map(heads, (p, p * 2, p)), is_causal=is_causal) for p in parts
    ]
    same(out, expected)
    assert (out + heads(x)).shape == out.shape  # its offsets are the input's
    out.values().square().sum().backward()
    sum(y.square().sum() for y in expected).backward()
    same(x.grad, [p.grad for p in parts])


@pytest.mark.parametrize("detach_tangent", [False, True])
def test_jagged_attention_has_tangents(detach_tangent):
    x, parts = jagged(LENGTHS, 8)
    t = torch.nested.nested_tensor_from_jagged(x.detach().values().flip(0), x.offsets())
    pairs = [
        ops.attention_jvp(*map(heads, (p, p, p, q, q)), None, detach_tangent=detach_tangent)
        for p, q in zip(parts, t.unbind(), strict=True)
    ]
    out, out_t = ops.attention_jvp(*map(heads, (x, x, x, t, t)), None, detach_tangent=detach_tangent)
    same(out, [y for y, _ in pairs])
    same(out_t, [y for _, y in pairs])
    ((out * 2 + out_t).values().square().sum()).backward()
    sum((y * 2 + y_t).square().sum() for y, y_t in pairs).backward()
    same(x.grad, [p.grad for p in parts])


def test_jagged_attention_across_lengths_and_groups():
    x, parts = jagged([3, 1, 6], 8)
    y, others = jagged([2, 5, 4], 4, seed=5)
    keys = y.unflatten(-1, (1, 4)).transpose(1, 2)
    out = ops.attention(heads(x), keys, keys, enable_gqa=True)
    same(
        out,
        [
            F.scaled_dot_product_attention(
                heads(p), *[o.unflatten(-1, (1, 4)).transpose(0, 1)] * 2, enable_gqa=True
            )
            for p, o in zip(parts, others, strict=True)
        ],
    )


def test_jagged_attention_pads_nothing():
    """As many products as the sequences have, in both directions, and no storage of a padded batch."""
    x, parts = jagged([40, 1, 2, 1], 8)

    def counted(*sequences: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            for y in sequences:
                out, out_t = ops.attention_jvp(*map(heads, (y, y, y, y, y)), None, detach_tangent=True)
                total = out + out_t
                (total.values() if total.is_nested else total).sum().backward()
        return counter.get_total_flops()

    assert counted(x) == counted(*parts)


def test_jagged_attention_with_a_window_and_lse():
    x, parts = jagged([5, 1, 9], 8)
    options = {"window": (2, 1), "return_lse": True}
    out, lse = ops.attention(heads(x), heads(x * 2), heads(x), **options)
    expected = [ops.attention(*(heads(y)[None] for y in (p, p * 2, p)), **options) for p in parts]
    same(out, [o[0] for o, _ in expected])
    same(lse, [s[0] for _, s in expected])
    (out.values().square().sum() + lse.values().sin().sum()).backward()
    sum(o.square().sum() + s.sin().sum() for o, s in expected).backward()
    same(x.grad, [p.grad for p in parts])


def test_jagged_tokens():
    x, parts = jagged(LENGTHS, 8)
    w, gate = randn(8, dtype=torch.float64), randn(3, 1, 8, dtype=torch.float64).requires_grad_()
    same(ops.rms_norm(x, w), [ops.rms_norm(p, w) for p in parts])
    same(ops.swiglu(x, x * 2), [ops.swiglu(p, p * 2) for p in parts])
    found = ops.swiglu_jvp(x, x, x, None)
    for y, i in zip(found, range(2), strict=True):
        same(y, [ops.swiglu_jvp(p, p, p, None)[i] for p in parts])
    same(ops.gated_residual(x, x * 2, w), [ops.gated_residual(p, p * 2, w) for p in parts])
    y = ops.gated_residual(x, x * 2, gate)
    expected = [ops.gated_residual(p, p * 2, g[0]) for p, g in zip(parts, gate, strict=True)]
    same(y, expected)
    (grad,) = torch.autograd.grad(y.values().square().sum(), gate)
    torch.testing.assert_close(grad, torch.autograd.grad(sum(e.square().sum() for e in expected), gate)[0])
    same(ops.newton_schulz(x.detach()), [ops.newton_schulz(p.detach()) for p in parts])


def test_unsupported_jagged_calls_are_rejected():
    x, _ = jagged(LENGTHS, 8)
    other, _ = jagged(LENGTHS, 8)
    table = randn(2, 2, dtype=torch.float64)
    refused = {
        "rotary_qk_norm: query is a jagged": lambda: ops.rotary_qk_norm(
            heads(x), heads(x), table[0], table[0], table, table
        ),
        "swiglu: up and gate must share one offsets tensor": lambda: ops.swiglu(x, other),
        "swiglu: up must be a jagged": lambda: ops.swiglu(x, randn(3, 6, 8)),
        "swiglu: gate must be a jagged": lambda: ops.swiglu(randn(3, 6, 8), x),
        "attention: attn_mask is not supported with jagged": lambda: ops.attention(
            *[heads(x)] * 3, torch.ones(6, 6).bool()
        ),
        "query, key and value must all be jagged": lambda: ops.attention(heads(x), *[randn(3, 2, 6, 4)] * 2),
        "attention: query must be jagged": lambda: ops.attention(x, x, x),
        "rms_norm: the last dimension": lambda: ops.rms_norm(x.transpose(1, 2), randn(8)),
        "rms_norm: x is a nested tensor with holes": lambda: ops.rms_norm(
            torch.nested.narrow(
                randn(3, 6, 8), 1, torch.tensor([0, 1, 0]), torch.tensor([2, 3, 4]), layout=torch.jagged
            ),
            randn(8),
        ),
    }
    for words, call in refused.items():
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_layers_refuse_what_their_kernels_would_misread():
    x = randn(2, 4, 8)
    cos, sin = rotary_tables(2, 4)
    with pytest.raises(TypeError, match=r"AttentionBranch: x is a .*Unread"):
        AttentionBranch(8, 2)(x.as_subclass(Unread), RMSNorm(8), None, cos, sin)
    with pytest.raises(TypeError, match="MlpBranch: gate is a .*Unread"):
        MlpBranch(8, 8)(x, RMSNorm(8), randn(8).as_subclass(Unread))


@pytest.mark.parametrize("cls", [Unread, Deaf, TwoTensor])
def test_optimizers_refuse_unknown_parameters_by_name(cls):
    p = cls(randn(3, 4), randn(3, 4)) if cls is TwoTensor else cls(randn(3, 4))
    for make in (Muon, EMA):
        with pytest.raises(TypeError, match=rf"{make.__name__}: layer.weight is a .*{cls.__name__}"):
            make([("layer.weight", p)])


def test_optimizers_take_plain_subclasses():
    a, b = (nn.Parameter(randn(3, 4)) for _ in range(2))
    plain = nn.Parameter(randn(3, 4)).as_subclass(Plain).detach().requires_grad_()
    for p in (a, plain):
        p.grad = randn(3, 4, seed=1)
        Muon([("layer.weight", p)], lr=0.1).step()
    assert not torch.equal(a, b)
    torch.testing.assert_close(plain.detach().as_subclass(Tensor), a.detach(), rtol=0, atol=0)


def test_inspecting_the_arguments_costs_at_most_a_microsecond():
    """Per call with the widest signature: the median of many, with a fourfold margin for a busy machine."""
    look = _subclasses.operation({}, "...")
    args = CASES["patch_embed"].args

    def plain(images: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, position: Tensor, prefix: Tensor):
        return None

    def seconds(function) -> float:
        start = time.perf_counter()
        for _ in range(1000):
            function(*args)
        return time.perf_counter() - start

    looking = look(plain)
    pairs = [(seconds(looking), seconds(plain)) for _ in range(21)]
    cost = sorted(a - b for a, b in pairs)[10] / 1000
    assert cost < 4e-6, f"{cost * 1e6:.2f} us"


@pytest.mark.parametrize("name", ops.__all__)
def test_every_public_function_inspects_its_arguments(name):
    """An op added without `operation` would read memory of unknown layout."""
    function = getattr(ops, name)
    assert function.__code__.co_filename == _subclasses.__file__
    assert function.__code__.co_name == name
