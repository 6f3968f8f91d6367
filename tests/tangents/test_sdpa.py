"""replace_sdpa: attention in any network supports forward mode, and leaving the context undoes everything."""

import threading

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import NETWORKS, ViT, encoder, imported_before, jvp_math
from helpers.tolerance import assert_close
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import pmf

EXACT = 1e-12
TORCHS = F.scaled_dot_product_attention


def inputs(*shape: int, count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert F.scaled_dot_product_attention is TORCHS
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("name", ["ViT", "DiT", "encoder", "encoder, eval", "transformer"])
def test_jvp_and_gradients_are_those_of_math_attention(name: str):
    network, primals, constants = problem = NETWORKS[name](torch.float64)
    tangents = problem.tangents()
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda *x: network(*x, **constants), primals, tangents)
    expected = jvp_math(network, primals, tangents, **constants)
    wanted = torch.autograd.grad(sum(y.square().sum() for y in expected), network.parameters())
    with pmf.replace_sdpa():
        found = torch.func.jvp(lambda *x: network(*x, **constants), primals, tangents)
    assert_close(found, expected, EXACT)
    grads = torch.autograd.grad(sum(y.square().sum() for y in found), network.parameters())
    assert_close(grads, wanted, EXACT)


def test_encoder_in_eval_mode_without_gradients():
    """The fused path of nn.MultiheadAttention calls no function that could be replaced."""
    network, primals, constants = problem = encoder(torch.float64, training=False)
    tangents = problem.tangents()
    with torch.no_grad():
        expected = jvp_math(network, primals, tangents, **constants)
        with pmf.replace_sdpa():
            found = torch.func.jvp(lambda x: network(x, **constants), primals, tangents)
    assert_close(found, expected, EXACT)


@pytest.mark.parametrize(
    "attention", [imported_before, lambda *x, **y: F.scaled_dot_product_attention(*x, **y)]
)
def test_transforms(attention):
    q, q_t, x = inputs(2, 2, 5, 4)

    def energy(q):
        return attention(q, x, q.sin(), is_causal=True).square().sum()

    def expected(transform):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return transform(energy)

    def second(f):
        return torch.func.jvp(lambda a: torch.func.jvp(f, (a,), (q_t,))[1], (q,), (q_t,))[1]

    def gradient(f):
        return torch.func.grad(lambda a: torch.func.jvp(f, (a,), (q_t,))[1])(q)

    def per_sample(f):
        return torch.func.vmap(lambda a, b: torch.func.jvp(f, (a,), (b,))[1], (None, 0))(
            q, torch.stack((q_t, x))
        )

    def jacobian(f):
        return torch.func.jacfwd(lambda a: f(a[None]), 0)(q[0])

    for transform in (second, gradient, per_sample, jacobian):
        wanted = expected(transform)
        with pmf.replace_sdpa():
            assert_close(transform(energy), wanted, EXACT)


def test_dual_level():
    q, q_t, x = inputs(2, 2, 5, 4)
    wanted = jvp_math(lambda a: imported_before(a, x, a), (q,), (q_t,))
    with pmf.replace_sdpa(), forward_ad.dual_level():
        dual = forward_ad.make_dual(q, q_t)
        assert_close(forward_ad.unpack_dual(imported_before(dual, x, dual)), wanted, EXACT)


def vit_jvp(network, images, tangent):
    with pmf.replace_sdpa():
        return torch.func.jvp(network, (images,), (tangent,))


class Attend(torch.nn.Module):
    """No LayerNorm, whose jvp torch.compile cannot trace."""

    def forward(self, x):
        return imported_before(x, x.sin(), x) + F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inside_and_around_torch_compile(backend: str):
    x, x_t = inputs(1, 2, 5, 4, count=2)
    wanted = jvp_math(Attend(), (x,), (x_t,))
    inside = torch.compile(lambda a, b: vit_jvp(Attend(), a, b), fullgraph=True, backend=backend)
    assert_close(inside(x, x_t), wanted, EXACT)
    around = torch.compile(lambda a, b: torch.func.jvp(Attend(), (a,), (b,)), fullgraph=True, backend=backend)
    with pmf.replace_sdpa():
        assert_close(around(x, x_t), wanted, EXACT)
    with pytest.raises(Exception, match="forward"):  # not the graph that was compiled within the context
        around(x, x_t)


def test_jvp_of_a_compiled_function_falls_back_to_eager():
    """torch.compile rejects an outer torch.func.jvp, and failed on our Functions while doing so."""
    x, x_t = inputs(1, 2, 5, 4, count=2)
    wanted = jvp_math(lambda a: imported_before(a, a, a), (x,), (x_t,))
    compiled = torch.compile(lambda a: pmf.ops.attention(a, a, a), backend="eager")
    assert_close(torch.func.jvp(compiled, (x,), (x_t,)), wanted, EXACT)


def test_nests_decorates_and_survives_exceptions():
    q, q_t, x = inputs(1, 2, 5, 4)
    wanted = jvp_math(lambda a: imported_before(a, x, a), (q,), (q_t,))

    @pmf.replace_sdpa()
    def found(depth: int = 2):
        if depth:
            return found(depth - 1)
        return torch.func.jvp(lambda a: F.scaled_dot_product_attention(a, x, a), (q,), (q_t,))

    assert_close(found(), wanted, EXACT)
    with pmf.replace_sdpa():
        with pmf.replace_sdpa():
            pass
        assert_close(
            torch.func.jvp(lambda a: F.scaled_dot_product_attention(a, x, a), (q,), (q_t,)), wanted, EXACT
        )
    with pytest.raises(ZeroDivisionError), pmf.replace_sdpa():
        _ = 1 / 0


def test_a_setting_of_the_fused_path_is_restored():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with pmf.replace_sdpa():
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_two_interleaved_threads_restore_everything():
    """Saving and restoring per thread would end with the first thread's replacement in place."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with pmf.replace_sdpa():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_in.wait(10)
    with pmf.replace_sdpa():
        second_in.set()
        assert first_out.wait(10)
        assert F.scaled_dot_product_attention is not TORCHS
    thread.join()
    assert F.scaled_dot_product_attention is TORCHS


def test_pytorchs_list_of_overridable_functions_is_unchanged():
    torch.overrides._get_overridable_functions.cache_clear()
    with pmf.replace_sdpa():
        assert TORCHS in torch.overrides.get_overridable_functions()[F]


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_have_their_gradient_wherever_backward_runs(
    reentrant: bool, backward_inside: bool
):
    """PyTorch's attention saves tensors of the same shapes: with it, gradients were off by 8e-2."""
    network = ViT().double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(network(images).square().sum(), network.parameters())
    for block in network.blocks:
        forward = block.attn.forward
        block.attn.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=reentrant)
    with pmf.replace_sdpa():
        loss = network(images).square().sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert_close([p.grad for p in network.parameters()], wanted, EXACT)


def test_checkpoint_detects_another_attention(monkeypatch):
    """If a block cannot be redirected to ours, its first saved tensor differs in shape from PyTorch's."""
    from pmf.tangents import sdpa

    monkeypatch.setattr(sdpa, "_compute_again_alike", lambda: None)
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    with pmf.replace_sdpa():
        out = checkpoint(lambda a: F.scaled_dot_product_attention(a, a * 1, a * 1), q, use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        out.sum().backward()


def test_unsupported_calls_go_to_pytorch():
    x = torch.randn(1, 2, 5, 300, dtype=torch.float64)
    wide = jvp_math(lambda a: imported_before(a, a, a), (x,), (x,))
    with pmf.replace_sdpa():
        assert_close(F.scaled_dot_product_attention(x, x, x), TORCHS(x, x, x), EXACT)
        assert_close(torch.func.jvp(lambda a: imported_before(a, a, a), (x,), (x,)), wide, EXACT)

        torch.manual_seed(1)
        found = torch.func.jvp(lambda a: imported_before(a, a, a, dropout_p=0.5), (x,), (x,))
    torch.manual_seed(1)
    assert_close(found, jvp_math(lambda a: imported_before(a, a, a, dropout_p=0.5), (x,), (x,)), EXACT)


def test_a_causal_bias_is_ours_and_strided_nested_tensors_are_pytorchs():
    from torch.nn.attention.bias import causal_lower_right

    q, k, _ = inputs(1, 2, 3, 4)
    bias = causal_lower_right(3, 3)
    nested = torch.nested.nested_tensor([torch.randn(2, 5, 4), torch.randn(2, 3, 4)], layout=torch.strided)
    with pmf.replace_sdpa():
        assert_close(F.scaled_dot_product_attention(q, k, k, bias), TORCHS(q, k, k, bias), EXACT)
        out = F.scaled_dot_product_attention(nested, nested, nested)
        assert_close(out.unbind()[1], TORCHS(*[nested.unbind()[1][None]] * 3)[0], 1e-5)
        found = torch.func.jvp(lambda a: F.scaled_dot_product_attention(a, k, k, bias), (q,), (q,))
        seen = torch.ones(3, 3, dtype=torch.bool).tril()
        assert_close(found, jvp_math(lambda a: TORCHS(a, k, k, seen), (q,), (q,)), EXACT)
        with pytest.raises(TypeError, match="nested tensor has no forward mode"), forward_ad.dual_level():
            F.scaled_dot_product_attention(nested, nested, nested)


def test_errors_are_pytorchs():
    q = torch.randn(1, 2, 3, 4)
    for arguments in ((q, q.double(), q), (q, q[..., :2], q), (q.long(),) * 3):
        with pytest.raises(Exception) as theirs:
            TORCHS(*arguments)
        with pmf.replace_sdpa(), pytest.raises(type(theirs.value)):
            F.scaled_dot_product_attention(*arguments)
