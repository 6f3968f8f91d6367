"""The fused branches of a block: every derivative, what backward saves, what is copied, and dtypes."""

from collections.abc import Callable

import pytest
import torch
from helpers.tolerance import assert_close, error
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from pmf import _library
from pmf.nn import Block, rotary_tables
from pmf.reference import network as reference

BATCH, TOKENS, HIDDEN, HEADS, WIDTH, SIDE = 4, 12, 32, 2, 48, 3
IMAGE = SIDE * SIDE
EXACT = 1e-12
cos, sin = rotary_tables(SIDE, HIDDEN // HEADS, dtype=torch.float64)


@pytest.fixture
def block() -> Block:
    """Random weights in float64, none of them 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    block = Block(HIDDEN, HEADS, WIDTH).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return block


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, TOKENS, HIDDEN, generator=generator, dtype=torch.float64)


def forms(block: Block, keep: int | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The block and the plain reference, as functions of weights and input."""
    rows = slice(0 if keep is None else TOKENS - keep, None)

    def ours(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(block, weights, (x, cos, sin, None, keep))[0]

    def plain(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return reference._block(weights, x, cos, sin, HEADS)[:, rows]

    return ours, plain


def weights_of(block: Block) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in block.named_parameters()}


def energy(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: form(*args).square().sum() / 2


def flat(tree: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("keep", [None, IMAGE])
def test_value_and_gradients(block: Block, x: Tensor, keep: int | None) -> None:
    found = [
        torch.func.grad_and_value(energy(form), (0, 1))(weights_of(block), x) for form in forms(block, keep)
    ]
    assert_close(flat(found[0]), flat(found[1]), EXACT)


@pytest.mark.parametrize("keep", [None, IMAGE])
def test_forward_mode_and_second_derivatives(block: Block, x: Tensor, keep: int | None) -> None:
    """Each is correct through the reference: jvp, jvp of a gradient, gradient of a gradient."""
    primals = weights_of(block), x
    generator = torch.Generator().manual_seed(2)
    tangents = torch.utils._pytree.tree_map(
        lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype), primals
    )
    found = []
    for form in forms(block, keep):
        gradient = torch.func.grad(energy(form), (0, 1))
        alone = torch.func.grad(energy(form), 1)
        found.append(
            flat(
                (
                    torch.func.jvp(form, primals, tangents),
                    torch.func.jvp(gradient, primals, tangents),
                    torch.func.grad(lambda *a, g=alone: g(*a).square().sum(), (0, 1))(*primals),
                )
            )
        )
    assert_close(*found, EXACT)


@pytest.mark.parametrize("keep", [None, IMAGE])
def test_vmap(block: Block, x: Tensor, keep: int | None) -> None:
    """Over the input, over the weights, and per-sample gradients."""
    weights = weights_of(block)
    stacked = {name: torch.stack((w, 2 * w)) for name, w in weights.items()}
    samples = torch.stack((x, x + 1, 2 * x))
    found = [
        flat(
            (
                torch.func.vmap(form, (None, 0))(weights, samples),
                torch.func.vmap(form, (0, None))(stacked, x),
                torch.func.vmap(torch.func.grad(energy(form)), (None, 0))(weights, samples),
            )
        )
        for form in forms(block, keep)
    ]
    assert_close(*found, EXACT)


@pytest.mark.parametrize("keep", [None, IMAGE])
def test_compiled_with_tangents(block: Block, x: Tensor, keep: int | None) -> None:
    x_t = x[:2].flip(0)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = []
    for form in (block, compiled):
        y, y_t = form(x, cos, sin, x_t, keep)
        found.append((y, y_t, *torch.autograd.grad(y.square().sum(), list(block.parameters()))))
    assert found[0][1].any()
    assert_close(found[1], found[0], EXACT)


def kept(call: Callable[[], object], besides: list[Tensor]) -> int:
    """Bytes of the storages that a call saves for backward, except those of `besides`."""
    seen = {t.untyped_storage().data_ptr() for t in besides}
    sizes = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            sizes[storage.data_ptr()] = storage.nbytes(), t  # keep it, so that its memory is not reused
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return sum(size for size, _ in sizes.values())


@pytest.mark.parametrize("with_tangent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_what_the_docstrings_say_and_no_tangent(
    block: Block, x: Tensor, dtype: torch.dtype, with_tangent: bool
) -> None:
    block, x = block.to(dtype), x.to(dtype).requires_grad_()
    tables = cos.float(), sin.float()
    x_t = x.detach()[:2].clone() if with_tangent else None
    found = kept(lambda: block(x, *tables, x_t), [*block.parameters(), *tables])
    numbers = BATCH * TOKENS * (5 * HIDDEN + HIDDEN + 2 * WIDTH)
    assert found == numbers * dtype.itemsize + 4 * BATCH * TOKENS * HEADS


def test_nothing_as_large_as_the_activations_is_copied(block: Block, x: Tensor) -> None:
    """Queries, keys, values and their gradients switch between the projections' layout and heads as views."""
    block, x = block.float(), x.float().requires_grad_()
    tables = cos.float(), sin.float()
    gradient = torch.randn_like(x)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        y, _ = block(x, *tables, x.detach()[:2])
        y.backward(gradient)
    events = list(record.events())
    assert any(event.name == "pmf::attention_backward" for event in events)
    copied = [event.input_shapes[0] for event in events if event.name == "aten::copy_"]
    # Matrices may be copied: oneDNN needs row-major left operands. Nothing with a batch dimension.
    assert not [shape for shape in copied if len(shape) > 2], copied


def test_a_closed_gate_passes_the_input_and_no_gradient(block: Block, x: Tensor) -> None:
    with torch.no_grad():
        block.attn_scale.zero_()
        block.mlp_scale.zero_()
    x.requires_grad_()
    y, y_t = block(x, cos, sin, x.detach()[:2])
    assert torch.equal(y, x) and torch.equal(y_t, x[:2])
    y.backward(gradient := torch.randn_like(y))
    assert torch.equal(x.grad, gradient)
    for name, parameter in block.named_parameters():
        assert bool(parameter.grad.any()) == name.endswith("_scale"), name


@pytest.mark.parametrize("way", ["matrices in bfloat16", "autocast"])
def test_the_residual_stream_stays_float32_with_16_bit_products(block: Block, x: Tensor, way: str) -> None:
    """Float32 in and out; errors are those of bfloat16 branches, smaller than those of a bfloat16 stream."""
    x_t = x[:2].flip(0)
    exact = block(x, cos, sin, x_t)
    loss = sum(y.square().sum() for y in exact[:1])
    expected = torch.autograd.grad(loss, list(block.parameters()))
    tables = cos.float(), sin.float()
    block.float()
    if way == "matrices in bfloat16":
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        y, y_t = block(x.float(), *tables, x_t.float())
    assert y.dtype == y_t.dtype == torch.float32
    unit = torch.finfo(torch.bfloat16).eps / 2
    assert error(y, exact[0]) < unit / 2  # a stream rounded twice would err by 0.6 unit
    assert error(y_t, exact[1]) < unit
    gradients = torch.autograd.grad(y.square().sum(), list(block.parameters()))
    for parameter, gradient, ideal in zip(block.parameters(), gradients, expected, strict=True):
        assert gradient.dtype == parameter.dtype
        assert error(gradient, ideal) < 4 * unit


@pytest.mark.parametrize("count", [BATCH, 1])
def test_float64_on_cuda_uses_the_reference(block: Block, x: Tensor, count: int, monkeypatch) -> None:
    """Also with tangents of all samples or of the first ones; backward is the value's."""
    found = []
    for is_cuda in (False, True):
        monkeypatch.setattr(_library, "takes_cuda_kernel", lambda tensor, answer=is_cuda: answer)
        leaf = x.clone().requires_grad_()
        y, y_t = block(leaf, cos, sin, 2 * x[:count].flip(1))
        assert not y_t.requires_grad
        found.append((y, y_t, *torch.autograd.grad(y.square().sum(), (leaf, *block.parameters()))))
    assert_close(*found, EXACT)
