"""FlopCounterMode counts the compiled ops as torch counts the same products and as in the launch plans."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pmf import _library, ops, reference
from pmf.ops import _flops

BATCH, HEADS, QUERIES, KEYS, WIDTH, VALUE_WIDTH = 3, 2, 10, 7, 8, 4
TILE = 2 * BATCH * HEADS * QUERIES * KEYS


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def attention_inputs(device: str = "cpu") -> list[Tensor]:
    shapes = [(QUERIES, WIDTH), (KEYS, WIDTH), (KEYS, VALUE_WIDTH)]
    return [torch.randn(BATCH, HEADS, *shape, device=device, requires_grad=True) for shape in shapes]


def plan(**options: bool) -> float:
    introspection = _library.introspection()
    if introspection is None:
        pytest.skip("this wheel comes without launch plans")
    sizes = {"batch": BATCH, "heads": HEADS, "key_heads": HEADS, "queries": QUERIES, "keys": KEYS}
    return introspection.attention_plan(**sizes, width=WIDTH, value_width=VALUE_WIDTH, **options)["flops"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_forward_counts_as_torchs_and_as_its_plan(device):
    q, k, v = attention_inputs(device)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert counted(lambda: ops.attention(q, k, v)) == theirs == plan()


def test_attention_with_tangents_counts_as_forward_mode_through_math_attention():
    inputs = [x.detach() for x in attention_inputs()]
    tangents = [torch.randn_like(x) for x in inputs]

    def torch_math():
        with sdpa_kernel(SDPBackend.MATH):
            torch.func.jvp(torch.nn.functional.scaled_dot_product_attention, tuple(inputs), tuple(tangents))

    assert counted(lambda: ops.attention_jvp(*inputs, *tangents)) == counted(torch_math) == plan(tangent=True)


def test_attention_with_tangents_of_few_samples_and_absent_ones():
    inputs = [x.detach() for x in attention_inputs()]
    tangents = [torch.randn_like(x[:2]) for x in inputs]
    few = TILE * 2 // 3
    for given, over_width, over_value in [
        (tangents, 2, 2),
        ([tangents[0], None, None], 1, 1),
        ([None, None, tangents[2]], 0, 1),
    ]:
        expected = TILE * (WIDTH + VALUE_WIDTH) + few * (over_width * WIDTH + over_value * VALUE_WIDTH)
        got = counted(lambda given=given: ops.attention_jvp(*inputs, *given, detach_tangent=True))
        assert got == expected


def test_backwards_count_as_their_plans():
    leaves = attention_inputs()
    out = ops.attention(*leaves)
    assert counted(lambda: out.sum().backward()) == plan(backward=True)
    tangents = [torch.randn_like(x, requires_grad=True) for x in leaves]
    both = ops.attention_jvp(*leaves, *tangents)
    assert counted(lambda: (both[0] + both[1]).sum().backward()) == plan(backward=True, tangent=True)


def test_backward_recomputes_one_product_that_math_attention_saves():
    leaves = attention_inputs()
    with sdpa_kernel(SDPBackend.MATH):
        theirs = torch.nn.functional.scaled_dot_product_attention(*leaves)
    ours = ops.attention(*leaves)
    extra = TILE * WIDTH
    assert counted(lambda: ours.sum().backward()) == counted(lambda: theirs.sum().backward()) + extra


def test_backward_through_tangents_skips_what_is_absent():
    leaves = attention_inputs()
    value_t = torch.randn_like(leaves[2], requires_grad=True)
    out_t = ops.attention_jvp(*leaves, None, None, value_t)[1]  # P tV: its gradients meet S, dS K, dS^T Q
    assert counted(lambda: out_t.sum().backward()) == TILE * (3 * WIDTH + 3 * VALUE_WIDTH)


@pytest.mark.parametrize("window", [(2, 1), (None, 3), (4, None), (0, 0), (20, 20), (None, None)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_windows_count_the_pairs_inside(window, is_causal):
    leaves = attention_inputs()
    tangents = [torch.randn_like(x) for x in leaves]
    ahead = torch.arange(KEYS) - torch.arange(QUERIES)[:, None]
    seen = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    for side, distance in zip(window, (-ahead, ahead), strict=True):
        seen &= distance <= (KEYS + QUERIES if side is None else side)
    if is_causal and window != (None, None):  # alone it counts in full, as in torch
        seen &= ahead <= 0
    share = 2 * BATCH * HEADS * int(seen.sum())
    options = {"is_causal": is_causal, "window": window}
    out = ops.attention(*leaves, **options)
    assert counted(lambda: ops.attention(*leaves, **options)) == share * (WIDTH + VALUE_WIDTH)
    assert counted(lambda: out.sum().backward()) == share * (3 * WIDTH + 2 * VALUE_WIDTH)
    both = ops.attention_jvp(*leaves, *tangents, **options)
    found = counted(lambda: ops.attention_jvp(*leaves, *tangents, **options))
    assert found == 3 * share * (WIDTH + VALUE_WIDTH)
    assert counted(lambda: (both[0] + both[1]).sum().backward()) == share * (9 * WIDTH + 6 * VALUE_WIDTH)


@pytest.mark.parametrize("options", [{}, {"window": (2, 1)}, {"is_causal": True}], ids=str)
def test_packed_sequences_are_counted_separately(options):
    lengths_q, lengths_k = (5, 0, 1, 9), (5, 3, 0, 4)

    def inputs(queries: int, keys: int) -> list[Tensor]:
        rows = (queries, WIDTH), (keys, WIDTH), (keys, VALUE_WIDTH)
        return [torch.randn(n, HEADS, width, requires_grad=True) for n, width in rows]

    def alone(queries: int, keys: int) -> tuple[int, int]:
        leaves = inputs(queries, keys)
        out: list[Tensor] = []
        four = [x.transpose(0, 1)[None] for x in leaves]
        forward = counted(lambda: out.append(ops.attention(*four, **options)))
        return forward, counted(lambda: out[0].sum().backward())

    cuts = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k)]
    leaves = inputs(sum(lengths_q), sum(lengths_k))
    each = [alone(*lengths) for lengths in zip(lengths_q, lengths_k, strict=True)]
    out = ops.attention_varlen(*leaves, *cuts, **options)
    assert counted(lambda: ops.attention_varlen(*leaves, *cuts, **options)) == sum(a for a, _ in each)
    assert counted(lambda: out.sum().backward()) == sum(b for _, b in each)


def test_packed_sequences_with_unknown_offsets_count_as_equal_lengths():
    q, k, v = (torch.empty(12, HEADS, n, device="meta") for n in (WIDTH, WIDTH, VALUE_WIDTH))
    cuts = torch.empty(4, dtype=torch.int64, device="meta")
    found = counted(lambda: ops.attention_varlen(q, k, v, cuts, cuts))
    assert found == 2 * HEADS * 3 * 4 * 4 * (WIDTH + VALUE_WIDTH)


@pytest.mark.parametrize("images_need_grad", [False, True])
def test_patch_embedding_counts_as_two_convolutions(images_need_grad):
    images = torch.randn(2, 3, 8, 12, requires_grad=images_need_grad)
    down, up = torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    found = {}
    for name, tokens in {
        "ours": lambda: ops.patch_embed(images, down, None, up, None),
        "theirs": lambda: torch.conv2d(torch.conv2d(images, down, stride=4), up[:, :, None, None]),
    }.items():
        out: list[Tensor] = []
        forward = counted(lambda tokens=tokens, out=out: out.append(tokens()))
        found[name] = forward, counted(lambda out=out: out[0].sum().backward())
    assert found["ours"] == found["theirs"]


def test_patch_embedding_with_tangents():
    images, prefix = torch.randn(2, 3, 8, 12), torch.randn(2, 4, 6)
    down, up = torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    plain = counted(lambda: ops.patch_embed(images, down, None, up, None, None, prefix))
    arguments = images, down, None, up, None, None, prefix, images[:1], prefix[:1]
    assert counted(lambda: ops.patch_embed_jvp(*arguments, detach_tangent=True)) == plain * 3 // 2

    tokens = ops.patch_embed(images, down, None, up, None, None, prefix)
    once = counted(lambda: tokens.sum().backward())
    both = ops.patch_embed_jvp(images, down, None, up, None, None, prefix, images, prefix)
    assert counted(lambda: (both[0] + both[1]).sum().backward()) == 2 * once


@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("shape", [(96, 128), (300, 700), (384, 256)])
def test_newton_schulz_counts_less_than_the_plain_iteration(shape, method):
    """The plain iteration computes every product in full; half of the symmetric ones can be saved."""
    matrix = torch.randn(shape)
    ours = counted(lambda: ops.newton_schulz(matrix, method=method))
    plain = counted(lambda: reference.newton_schulz(matrix, method=method))
    assert plain / 2 < ours <= plain
    assert ours == _flops.orthogonalisation_flops(*shape, method=method)


def test_newton_schulz_of_one_block_saves_nothing():
    """Up to 128 rows nothing lies above the diagonal block."""
    matrix = torch.randn(100, 130)
    ours = counted(lambda: ops.newton_schulz(matrix, method="direct"))
    assert ours == counted(lambda: reference.newton_schulz(matrix, method="direct"))


def test_newton_schulz_of_large_matrices_halves_the_symmetric_products():
    """Five steps: 15 m^2 n + 5 m^3 direct, 6 m^2 n + 17 m^3 on the Gram matrix, for small blocks."""
    m, n = 51200, 102400
    for method, over_n, cubed in [("direct", 15, 5), ("gram", 6, 17)]:
        limit = over_n * m * m * n + cubed * m**3
        assert 1 < _flops.orthogonalisation_flops(m, n, method=method) / limit < 1 + 128 / m


def test_auto_counts_the_form_that_the_kernel_chooses():
    for shape, method in [((128, 128), "direct"), ((128, 191), "direct"), ((192, 128), "gram")]:
        assert _flops.orthogonalisation_flops(*shape) == _flops.orthogonalisation_flops(*shape, method=method)


def test_every_raw_op_has_a_formula_or_makes_no_products():
    """A new op that computes products must declare how many."""
    names = {
        name.removeprefix("pmf::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pmf::")
    }
    questions = {"cpu_level", "newton_schulz_segments", "multiplied_by_pytorch", "set_attention_plans"}
    rest = names - set(_flops.FORMULAS) - questions
    assert set(_flops.FORMULAS) <= names
    uncounted = sorted(name for name in rest if not name.startswith(_flops.ELEMENTWISE))
    assert not uncounted, f"add {', '.join(uncounted)} to FORMULAS or ELEMENTWISE of pmf/ops/_flops.py"
