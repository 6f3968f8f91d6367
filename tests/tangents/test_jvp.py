"""Jvp: values, tangents and gradients equal torch.func.jvp through math attention."""

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.jvp import EXACT, check, gradients
from helpers.networks import NETWORKS, DiT, Problem, ViT, dit, encoder, jvp_math, vit
from helpers.tolerance import assert_close
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import pmf
from pmf import ops
from pmf.tangents import module
from pmf.tangents.mode import TangentMode
from pmf.tangents.module import _freed_early


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, detach: bool):
    check(NETWORKS[name](torch.float64), detach=detach)


@pytest.mark.parametrize("name", ["ViT", "DiT", "U-Net"])
def test_networks_in_float32(name: str):
    check(NETWORKS[name](torch.float32), limit=1e-5)


@pytest.mark.parametrize("make", [dit, encoder])
@pytest.mark.parametrize("detach", [True, False])
def test_compiled(make, detach: bool):
    problem = make(torch.float64, depth=1)
    if not detach:
        pytest.xfail("PyTorch cannot compile torch.func.jvp through a LayerNorm")
    check(problem, jvp=torch.compile(pmf.Jvp(problem.network), fullgraph=True, backend="aot_eager"))


def test_compiled_with_none_as_tangent_primal_and_constant():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x, t, label=None, *, mask=None, name="gelu"):
            assert label is None and mask is None and name == "gelu"
            return (self.linear(x) * t.cos()).sin()

    network = Net()
    x, t, x_t = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    jvp = torch.compile(pmf.Jvp(network), fullgraph=True, backend="aot_eager")
    found = jvp((x, t, None), (x_t, None, None), mask=None, name="gelu")
    assert_close(found, torch.func.jvp(lambda x: network(x, t), (x,), (x_t,)), EXACT)


def test_compiled_by_inductor():
    problem = vit(torch.float64, depth=1)
    check(problem, jvp=torch.compile(pmf.Jvp(problem.network), fullgraph=True))


def test_under_inference_mode():
    problem = NETWORKS["ViT"](torch.float64)
    tangents = problem.tangents()
    expected = jvp_math(problem.network, problem.primals, tangents)
    with torch.inference_mode():
        found = pmf.Jvp(problem.network)(problem.primals, tangents)
    assert_close(found, expected, EXACT)


def test_recurrent_and_normed_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 6, batch_first=True)
            self.lstm = nn.LSTM(6, 5, batch_first=True)
            self.last = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))

        def forward(self, x):
            return self.last(self.lstm(self.gru(x)[0])[0])

    check(Problem(Net().double(), (torch.randn(2, 5, 4, dtype=torch.float64),)))


@pytest.mark.parametrize("detach", [True, False])
def test_an_lstm_in_float32(detach: bool):
    """PyTorch's own, by oneDNN, has no forward mode."""

    class Net(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    network, (x, x_t) = Net(4, 5), torch.randn(2, 3, 2, 4).unbind(0)
    found = pmf.Jvp(network)((x,), (x_t,), detach_tangent=detach)
    expected = jvp_math(network.double(), (x.double(),), (x_t.double(),))
    assert_close(found, expected, 1e-6)
    assert torch._C._get_mkldnn_enabled()


def test_batch_norm_in_training_mode():
    """torch.func.jvp rejects the running statistics; a copy without them gives the tangent."""
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).double()
    plain = nn.Sequential(network[0], nn.BatchNorm2d(3, track_running_stats=False), network[2]).double()
    x, x_t = torch.randn(2, 4, 2, 6, 6, dtype=torch.float64).unbind(0)
    expected = torch.func.jvp(plain, (x,), (x_t,))
    found = pmf.Jvp(network)((x,), (x_t,))
    assert_close(found, expected, EXACT)
    mean = network[0](x).mean((0, 2, 3)).detach()
    assert_close(network[1].running_mean, 0.1 * mean, EXACT)
    assert network[1].num_batches_tracked == 1
    check(Problem(network.eval(), (x,)), (x_t,))


def test_dropout_is_one_draw_for_value_and_tangent():
    network = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    x, x_t = torch.randn(2, 5, 4, dtype=torch.float64).unbind(0)
    torch.manual_seed(3)
    out, out_t = pmf.Jvp(network)((x,), (x_t,))
    torch.manual_seed(3)
    assert_close(out.detach(), network(x).detach(), EXACT)
    step = 1e-6
    torch.manual_seed(3)
    moved = network(x + step * x_t)
    assert_close(out_t, ((moved - out) / step).detach(), 1e-5)


def test_attention_dropout_takes_the_math_path():
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True).double()
    x, x_t = torch.randn(2, 2, 5, 8, dtype=torch.float64).unbind(0)
    torch.manual_seed(4)
    out, out_t = pmf.Jvp(layer)((x,), (x_t,))
    torch.manual_seed(4)
    moved = layer(x + 1e-6 * x_t)
    assert_close(out_t, ((moved - out) / 1e-6).detach(), 1e-5)


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, pair, scale, *, mask=None, name="none"):
        a, b = pair["a"], pair["b"]
        y = self.layer(a) * scale
        return {
            "y": y,
            "none": None,
            "name": name,
            "count": torch.tensor(3),
            "constant": b * 2,
            "both": (y + b, [b]),
        }


@pytest.mark.parametrize("detach", [True, False])
def test_pytrees_in_and_out(detach: bool):
    a, b, a_t = torch.randn(3, 2, 3).unbind(0)
    out, out_t = pmf.Jvp(Tree())(({"a": a, "b": b}, 2.0), ({"a": a_t, "b": None}, None), detach, name="x")
    assert out["name"] == "x" and out["none"] is None and out_t["name"] is None and out_t["none"] is None
    assert out_t["y"].abs().sum() > 0 and torch.equal(out_t["both"][0], out_t["y"])
    assert not out_t["constant"].any() and not out_t["count"].any() and not out_t["both"][1][0].any()


def test_one_tensor_given_twice_and_as_a_constant():
    class Net(nn.Module):
        def forward(self, a, b, c=None):
            return a * b * c

    x = torch.randn(4, dtype=torch.float64)
    out_t = pmf.Jvp(Net())((x, x), (torch.ones_like(x), None), c=x)[1]
    assert_close(out_t, x * x, EXACT)


def test_inputs_and_their_tangents_are_not_modified():
    class Net(nn.Module):
        def forward(self, x):
            return x.mul(1).add_(1) * x

    x, x_t = torch.randn(2, 4).unbind(0)
    kept = x.clone(), x_t.clone()
    pmf.Jvp(Net())((x,), (x_t,))
    assert torch.equal(x, kept[0]) and torch.equal(x_t, kept[1])


def test_tied_weights_and_modules_called_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(torch.tanh(self.a(x))))

    check(Problem(Net().double(), (torch.randn(3, 4, dtype=torch.float64),)))


def test_gradients_of_the_primals():
    problem = NETWORKS["ViT"](torch.float64)
    x, x_t = problem.primals[0].requires_grad_(), problem.tangents()[0]
    found = torch.autograd.grad(pmf.Jvp(problem.network)((x,), (x_t,))[0].square().sum(), x)
    assert_close(found, torch.autograd.grad(problem.network(x).square().sum(), x), EXACT)


@pytest.mark.parametrize("name", ["ViT", "DiT", "encoder", "points"])
def test_tangents_of_the_first_samples(name: str):
    network, primals, constants = problem = NETWORKS[name](torch.float64)
    tangents = problem.tangents()
    first = tuple(t[:1] for t in tangents)
    expected = pmf.Jvp(network)(primals, tangents, **constants)
    found = pmf.Jvp(network)(primals, first, **constants)
    assert_close(found[0], expected[0], EXACT)
    assert_close(found[1], expected[1][:1], EXACT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant: bool):
    problem = NETWORKS["ViT"](torch.float64)
    tangents = problem.tangents()
    expected = pmf.Jvp(problem.network)(problem.primals, tangents)
    wanted = gradients(*expected, problem.network)
    for block in problem.network.blocks:
        forward = block.forward
        block.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=reentrant)
    found = pmf.Jvp(problem.network)(problem.primals, tangents)
    assert_close(found, expected, EXACT)
    if reentrant:  # it takes backward() only
        (found[0] + 0.3 * found[1]).square().sum().backward()
        assert_close([p.grad for p in problem.network.parameters()], wanted, EXACT)
    else:
        assert_close(gradients(*found, problem.network), wanted, EXACT)


def test_checkpoint_around_the_whole_network():
    problem = NETWORKS["DiT"](torch.float64)
    jvp, tangents = pmf.Jvp(problem.network), problem.tangents()
    wanted = gradients(*jvp(problem.primals, tangents), problem.network)
    found = checkpoint(jvp, problem.primals, tangents, use_reentrant=False)
    assert_close(gradients(*found, problem.network), wanted, EXACT)


@pytest.mark.parametrize("name", ["ViT", "DiT"])
def test_autocast_and_bfloat16_weights(name: str):
    """Errors are like those of the network itself in bfloat16."""
    problem = NETWORKS[name](torch.float32)
    tangents = problem.tangents()
    exact = jvp_math(problem.network, problem.primals, tangents)
    with torch.autocast("cpu", torch.bfloat16):
        out, out_t = pmf.Jvp(problem.network)(problem.primals, tangents)
    assert_close((out.float(), out_t.float()), exact, 0.05)
    network = problem.network.bfloat16()
    found = pmf.Jvp(network)(*(tuple(x.bfloat16() for x in each) for each in (problem.primals, tangents)))
    assert found[1].dtype == torch.bfloat16
    assert_close([x.float() for x in found], exact, 0.05)
    assert all(torch.isfinite(g).all() for g in gradients(*found, network))


@pytest.mark.parametrize("grouped", [False, True])
def test_16_bit_values_in_float32_norms(grouped: bool):
    """As autocast on a CPU makes them: their statistics are float32."""
    norm = nn.GroupNorm(2, 4) if grouped else nn.LayerNorm(4)
    nn.init.normal_(norm.weight)
    x, x_t = torch.randn(2, 5, 4).bfloat16().unbind(0)
    found = pmf.Jvp(norm)((x,), (x_t,))
    assert found[1].dtype == torch.bfloat16
    exact = jvp_math(norm, (x.float(),), (x_t.float(),))
    assert_close([y.float().detach() for y in found], exact, 4 * eps_of(torch.bfloat16))
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(pmf.Jvp(network)((x.float(),), (x_t.float(),))[0], network(x.float()), 0.0)


def test_under_transforms_it_is_torch_func_jvp():
    """Under vmap the mode would see different tensors from those with tangents, and be off by 1."""
    problem = NETWORKS["points"](torch.float64)
    jvp, (z, t, r), (z_t, t_t, r_t) = pmf.Jvp(problem.network), problem.primals, problem.tangents()
    expected = jvp_math(problem.network, (z, t, r), (z_t, t_t, r_t))

    def one(*x):
        primals, tangents = [y[None] for y in x[:3]], [y[None] for y in x[3:]]
        return jvp(tuple(primals), tuple(tangents))

    out, out_t = torch.func.vmap(one)(z, t, r, z_t, t_t, r_t)
    assert_close((out[:, 0], out_t[:, 0]), expected, EXACT)
    second = torch.func.jvp(lambda a: jvp((a, t, r), (z_t, t_t, r_t), False)[1], (z,), (z_t,))[1]
    wanted = torch.func.jvp(lambda a: jvp_math(problem.network, (a, t, r), (z_t, t_t, r_t))[1], (z,), (z_t,))[
        1
    ]
    assert_close(second, wanted, 1e-10)


def test_tangents_save_nothing_and_values_are_freed():
    """The graph of a detached tangent saves what the network's own does, and no more memory."""
    network = DiT(depth=3).double()
    x, t = torch.randn(3, 6, 16, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    kept: dict[int, int] = {}

    def note(y):
        kept[y.untyped_storage()._cdata] = y.untyped_storage().nbytes()
        return y

    sizes = []
    for run in (
        lambda: network(x, t, t),
        lambda: pmf.Jvp(network)((x, t, t), (x, t, None)),
    ):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y), pmf.replace_sdpa():
            out = run()
        sizes.append(sum(kept.values()))
        del out
    assert sizes[1] <= 1.02 * sizes[0]


def test_writing_over_a_saved_value_is_noticed():
    """Autograd leaves its version check to saved_tensors_hooks."""

    class Net(nn.Module):
        def forward(self, x):
            y = x.exp()
            z = y.sin()
            y.add_(1)
            return z

    x = torch.randn(4, requires_grad=True)
    out = pmf.Jvp(Net())((x,), (torch.ones(4),))[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_parameters_are_those_of_the_network():
    network = ViT()
    jvp = pmf.Jvp(network)
    assert list(jvp.parameters()) == list(network.parameters()) and jvp.network is network
    assert set(jvp.state_dict()) == {f"network.{name}" for name in network.state_dict()}


def test_encoder_layers_in_successive_jvps():
    """Tangents from one call do not leak into the next."""
    problem = encoder(torch.float64)
    jvp = pmf.Jvp(problem.network)
    zero = jvp(problem.primals, (None,), **problem.constants)[1]
    assert not zero.any()
    check(problem, jvp=jvp)
    assert not jvp(problem.primals, (None,), **problem.constants)[1].any()


def test_python_calls_for_an_operator():
    """On small tensors they are most of the time. PyTorch's own wrapper against Dynamo was four of them."""

    def calls(depth: int) -> Counter[str]:
        jvp, x = pmf.Jvp(nn.Sequential(*(nn.GELU() for _ in range(depth)))), torch.randn(2, 3)
        jvp((x,), (x,))
        found: Counter[str] = Counter()

        def profile(frame, event, _):
            if event == "call":
                found[next((k for k in ("tangents", "_dynamo") if k in frame.f_code.co_filename), "")] += 1

        sys.setprofile(profile)
        try:
            jvp((x,), (x,))
        finally:
            sys.setprofile(None)
        return found

    more, fewer = calls(30), calls(20)
    assert more["_dynamo"] == fewer["_dynamo"]
    assert more["tangents"] - fewer["tangents"] <= 10 * 15


class Seen(TorchFunctionMode):
    """Counts what is called, as a user's mode sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls["an operator" if isinstance(func, torch._ops.OpOverload) else str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_modes_of_others_see_the_network_and_not_its_operators():
    """Each would cost every rule's calls, and every size that attention reads, a microsecond and more."""

    def calls(depth: int, run: Callable[[nn.Module, Tensor], object]) -> Counter[str]:
        network, x = ViT(depth=depth), torch.randn(3, 3, 8, 8)
        run(network, x)
        with Seen() as seen:
            run(network, x)
        return seen.calls

    def jvp(network: nn.Module, x: Tensor) -> object:
        return pmf.Jvp(network)((x,), (x,))

    found = calls(3, jvp) - calls(1, jvp)
    expected = calls(3, lambda network, x: network(x)) - calls(1, lambda network, x: network(x))
    attention = {name: count for name, count in expected.items() if "scaled_dot_product" in name}
    assert len(attention) == 1 and not any("scaled_dot_product" in name for name in found)  # called directly
    assert found == expected - Counter(attention)


def test_a_default_device_elsewhere(monkeypatch):
    """It is a mode that would move what rules allocate."""
    monkeypatch.setattr("pmf.tangents.mode.LARGE", 1)
    problem = NETWORKS["ViT"](torch.float64)
    tangents = problem.tangents()
    expected = jvp_math(problem.network, problem.primals, tangents)
    with torch.device("meta"):
        found = pmf.Jvp(problem.network)(problem.primals, tangents)
    assert_close(found, expected, EXACT)


def test_large_tangents_take_turns_in_a_few_buffers(monkeypatch):
    """In separate memory they left holes that saved values filled: 400 of a DiT's 1400 MB.

    The norms and attention allocate their own tangents. Those of 64 and of 48 columns share buffers.
    """
    blocks = [
        nn.Sequential(
            nn.LayerNorm(16),
            nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True),
            nn.Linear(16, 48),
            nn.GELU(),
            nn.Linear(48, 16),
        )
        for _ in range(10)
    ]
    mode, x, set_tangent = TangentMode(), torch.randn(2, 8, 16), TangentMode.set

    def checked(self, x, tangent):
        set_tangent(self, x, tangent)
        assert (held := self.stored(x)) is None or held.untyped_storage()._cdata in self._buffers

    monkeypatch.setattr(TangentMode, "set", checked)
    with _freed_early(), pmf.replace_sdpa(), mode:
        y = x.view_as(x)
        mode.alias(y, torch.randn_like(x))
        for block in blocks:
            y = y + block(y)
    row = 2 * 8 * 4  # bytes of a column
    assert sum(storage.nbytes() for storage in mode._buffers.values()) <= row * (2 * 64 + 6 * 16)


class Normed(nn.Module):
    def __init__(self, eps: float | None) -> None:
        super().__init__()
        self.norm, self.layers = nn.RMSNorm(8, eps=eps), nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm(x))


@pytest.mark.parametrize("eps", [None, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_is_one_operator(eps, dtype):
    """PyTorch's default eps is that of the dtype it computes in, which matters for small inputs."""
    network = Normed(eps).to(dtype)
    nn.init.normal_(network.norm.weight)
    x, x_t = (1e-3 * torch.randn(2, 5, 8)).to(dtype), (1e-3 * torch.randn(2, 5, 8)).to(dtype)
    problem = Problem(copy.deepcopy(network).double(), (x.double(),), {})
    if eps is None and dtype != torch.float64:
        problem.network.norm.eps = eps_of(torch.float32)
    exact = jvp_math(problem.network, (x.double(),), (x_t.double(),))
    with mock.patch.object(module.ops, "rms_norm", wraps=ops.rms_norm) as ours:
        found = pmf.Jvp(network)((x,), (x_t,))
    assert ours.call_count == 1
    assert_close([y.detach() for y in found], exact, {torch.float64: 1e-12}.get(dtype, 4 * eps_of(dtype)))
    loss = (found[0] + 0.3 * found[1]).square().sum()
    grads = torch.autograd.grad(loss, list(network.parameters()))
    out = problem.network(x.double())
    wanted = gradients(out, exact[1].detach(), problem.network)
    assert_close(grads, wanted, {torch.float64: 1e-12}.get(dtype, 8 * eps_of(dtype)))


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def test_rms_norm_stays_pytorchs_where_ours_would_differ():
    """Checkpointed blocks are recomputed without Jvp; autocast uses another dtype."""
    network, x, x_t = Normed(None), torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = network

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    with mock.patch.object(module.ops, "rms_norm", wraps=ops.rms_norm) as ours:
        out, out_t = pmf.Jvp(Blocks())((x,), (x_t,))
        (out + out_t).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            expected = network(x).dtype
            assert pmf.Jvp(network)((x,), (x_t,))[0].dtype == expected
        bare = nn.RMSNorm(8, elementwise_affine=False)
        assert_close(pmf.Jvp(bare)((x,), (x_t,)), jvp_math(bare, (x,), (x_t,)), 1e-5)
    assert not ours.called
    assert_close((out.detach(), out_t), jvp_math(network, (x,), (x_t,)), 1e-5)


def test_a_pytorch_that_cannot_mark_code_for_dynamo(tmp_path: Path):
    """Its own wrapper then keeps Dynamo out of the mode, inside compiled parts of a network."""
    program = """
import torch, torch._dynamo
del torch._C._dynamo.eval_frame.set_code_exec_strategy  # a private name
import pmf
from pmf.tangents.mode import TangentMode
inner = torch.nn.Linear(3, 3)
x, t = torch.randn(2, 4, 3)
network = torch.nn.Sequential(torch.compile(inner, backend="eager"), torch.nn.Tanh())
out, out_t = pmf.Jvp(network)((x,), (t,))
torch.testing.assert_close(out_t, (1 - out**2) * (t @ inner.weight.T))
assert hasattr(TangentMode.__torch_dispatch__, "__wrapped__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
