"""What Jvp does not support: one sentence that names it, never a silent zero."""

import copy
import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.networks import NETWORKS, jvp_math
from helpers.tolerance import assert_close
from torch import nn
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import pmf

X, X_T = torch.randn(2, 3, 4).unbind(0)


class Net(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.layer(x))


def run(function, primals=(X,), tangents=(X_T,), **options):
    return pmf.Jvp(Net(function))(primals, tangents, **options)


@pytest.mark.parametrize(
    ("primals", "tangents", "error", "sentence"),
    [
        ((X,), X_T, TypeError, "must be tuples"),
        ((X,), (), ValueError, "1 primals and 0 tangents"),
        (([X],), (X_T,), ValueError, "a different structure"),
        ((X,), (X_T.double(),), TypeError, "must be torch.float32 on cpu like its primal, got torch.float64"),
        ((X,), (X_T.to("meta"),), TypeError, "got torch.float32 on meta"),
        ((X,), (X_T[:, :2],), ValueError, r"\[3, 4\], or of its first samples, got \[3, 2\]"),
        ((X,), (torch.cat((X_T, X_T)),), ValueError, r"got \[6, 4\]"),
        ((X, X), (X_T[:1], X_T[:2]), ValueError, "same first samples"),
        ((X, X), (X_T[:1], X_T), ValueError, "same first samples"),
        ((torch.arange(3),), (torch.ones(3),), TypeError, "int64, which has no tangent: pass None"),
        ((3.0,), (torch.ones(()),), TypeError, "must be tensors, got float and Tensor"),
    ],
)
def test_tangents_that_do_not_fit(primals, tangents, error, sentence):
    with pytest.raises(error, match=sentence):
        run(lambda x: x, primals, tangents)


def test_not_a_network():
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got function"):
        pmf.Jvp(lambda x: x)


@pytest.mark.parametrize("nothing", [None, 3, "text", [], {"a": None}])
def test_networks_that_return_no_tensor(nothing):
    for detach in (True, False):
        with pytest.raises(TypeError, match="returns no tensor"):
            run(lambda x: nothing, detach_tangent=detach)


def test_outputs_of_a_class_that_pytorch_does_not_know():
    class Output:
        def __init__(self, y):
            self.y = y

    sentence = "in an object of class Output, .*register_pytree_node"
    for detach in (True, False):
        for function in (Output, lambda x: (x, Output(x)), lambda x: {"x": x, "more": [Output([x])]}):
            with pytest.raises(TypeError, match=sentence):
                run(function, detach_tangent=detach)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=sentence):
        compiled(Net(lambda x: (x, Output(x))))((X,), (X_T,))


def test_nested_tensors_and_other_subclasses():
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    with pytest.raises(TypeError, match="primal 0 is a nested tensor"):
        run(lambda x: x, (nested,), (nested,))

    with pytest.raises(TypeError, match="primal 0 is a Mine"):
        run(lambda x: x, (X.as_subclass(Mine),), (X_T,))


class Mine(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("Mine", lambda x: x.as_subclass(Mine)),
        ("Mine", lambda x: (x * torch.ones(4).as_subclass(Mine)).as_subclass(torch.Tensor)),
        ("TwoTensor", lambda x: TwoTensor(x, x)),
        ("TwoTensor", lambda x: (TwoTensor(x, x) * 2).a),
        ("TwoTensor", lambda x: (x * TwoTensor(torch.ones(4), torch.ones(4))).a),
        ("NestedTensor", lambda x: torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 1, 3]))),
    ],
)
def test_subclasses_inside_the_network(name, function):
    """Made of values, and unmade, where no mode sees it: their tangents were zero, as a DTensor's were."""
    with pytest.raises(NotImplementedError, match=f"computes with a {name}, a tensor subclass"):
        run(function)


def test_subclasses_of_constants():
    """Wrappers, such as a sharded weight, whose parts have no tangent."""
    weight = TwoTensor(torch.ones(4), torch.ones(4))
    network = Net(lambda x: (x * (weight * 2).a, weight * 1))
    (_, constant), (out_t, constant_t) = pmf.Jvp(network)((X,), (X_T,))
    assert_close(out_t, 2 * X_T @ network.layer.weight.detach().T, 1e-6)
    assert not constant_t.a.any() and constant.a.all()


def test_custom_operators():
    """PyTorch's forward mode silently gives them a zero tangent."""
    with torch.library._scoped_library("pmf_tests", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: 2 * x, "CPU")
        library.impl("double", torch.library.fallthrough_kernel, "Autograd")
        with pytest.raises(NotImplementedError, match="pmf_tests.double.default has no rule"):
            run(torch.ops.pmf_tests.double)


def test_newton_schulz_without_gradients():
    """Its operator took detached matrices, which have no tangents."""
    with torch.no_grad(), pytest.raises(NotImplementedError, match="pmf.newton_schulz.default has no rule"):
        run(pmf.ops.newton_schulz)
    assert run(pmf.ops.newton_schulz)[1].any()


class Rounded(torch.autograd.Function):
    """A straight-through estimator: its derivative is 1, but its forward's is 0."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class WithJvp(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def jvp(ctx, tangent):
        return tangent


class Decorated(Rounded):
    forward = staticmethod(torch.amp.custom_fwd(lambda ctx, x: x.round(), device_type="cpu"))


class ByAnyName(Rounded):
    forward = staticmethod(lambda ctx, x: x.round())


class ByPointer(Rounded):
    """Such as a kernel of Triton: no operator sees an input."""

    @staticmethod
    def forward(ctx, x):
        y = torch.empty(x.shape)
        ctypes.memmove(y.data_ptr(), x.data_ptr(), y.nbytes)
        return y


@pytest.mark.parametrize("function", [Rounded, Decorated, ByAnyName, ByPointer, WithJvp])
def test_third_party_autograd_functions(function):
    network = Net(function.apply)
    with pytest.raises(RuntimeError, match=f"{function.__name__} is an autograd.Function"):
        pmf.Jvp(network)((X,), (X_T,))
    with torch.no_grad(), pytest.raises(RuntimeError, match="is an autograd.Function"):
        pmf.Jvp(network)((X,), (X_T,))
    if function is WithJvp:
        found = pmf.Jvp(network)((X,), (X_T,), detach_tangent=False)[1]
        assert_close(found.detach(), X_T @ network.layer.weight.detach().T, 1e-6)


def test_functions_in_cpp():
    """They switch forward mode off, too, without a Python class to be named."""

    def function(x):
        with forward_ad._set_fwd_grad_enabled(False):
            return x.round()

    with pytest.raises(RuntimeError, match="a function in C.. is an autograd.Function"):
        run(function)


def copied(x):
    """What a kernel does that is called with pointers."""
    y = torch.empty(x.shape)
    ctypes.memmove(y.data_ptr(), x.data_ptr(), y.nbytes)
    return y


def assigned(x):
    y = x * 2
    y.data = torch.sin(x)
    return y


@pytest.mark.parametrize(
    ("what", "function"),
    [
        (r"numpy\(\)", lambda x: torch.from_numpy(np.sin(x.numpy()))),
        (r"numpy\(\)", lambda x: torch.from_numpy(np.asarray(x) * 2)),
        ("DLPack", lambda x: torch.from_dlpack(x * 2)),
        (r"data_ptr\(\)", copied),
        (r"an assignment to or from \.data", assigned),
        ("Python's deepcopy", lambda x: copy.deepcopy([x * 2])[0]),
        ("the storage", lambda x: copy.copy(x * 2)),
    ],
)
def test_memory_that_leaves_pytorch(what, function):
    """A NumPy function or a kernel called with pointers gave a zero tangent, silently."""
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"uses {what} of a value with a tangent"):
        run(function)
    with torch.no_grad():
        assert not run(lambda x: function(x.detach()))[1].any()


@torch.jit.script
def modulate(x, scale):
    return x * (1.0 + scale)


@pytest.mark.parametrize("detach", [True, False])
def test_torchscript(detach: bool):
    """From the second call on, tangents were zero: its executor differentiates by itself."""
    modulate(X, X)
    layers = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    with pytest.raises(RuntimeError, match=r"runs TorchScript \(modulate\)"):
        run(lambda x: modulate(x, x.sin()), detach_tangent=detach)
    for module in (
        torch.jit.script(layers),
        torch.jit.trace(layers, X),
        nn.Sequential(torch.jit.script(layers)),
    ):
        with pytest.raises(RuntimeError, match=r"runs TorchScript \(forward\)"):
            pmf.Jvp(module)((X,), (X_T,), detach)
    assert modulate(X, X).shape == X.shape  # as before


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.func.grad(lambda y: y.tanh().sum())(x),
        lambda x: torch.func.vjp(torch.tanh, x)[1](x)[0],
        lambda x: torch.func.jvp(torch.exp2, (x,), (x,))[1],
    ],
    ids=["grad", "vjp", "jvp"],
)
def test_transforms_in_the_forward(function):
    with pytest.raises(RuntimeError, match="differentiates within its forward .*detach_tangent=False"):
        run(function)
    assert run(function, detach_tangent=False)[1].any()


def test_higher_order_operators():
    network = torch.ops.higher_order.cond
    with pytest.raises(NotImplementedError, match="cond is a higher-order operator"), torch.no_grad():
        run(lambda x: network(torch.tensor(True), torch.sin, torch.cos, (x,)))


@pytest.mark.parametrize("grad", [True, False])
def test_networks_that_differentiate_in_their_forward(grad: bool):
    """Their saved values have no tangents: the derivative of a derivative would be silently wrong."""

    class Score(nn.Module):
        def forward(self, x):
            with torch.enable_grad():
                x = x * 1 if x.requires_grad else x.detach().requires_grad_()
                return torch.autograd.grad(x.tanh().square().sum(), x, create_graph=True)[0]

    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="differentiates within its forward"):
        pmf.Jvp(Score())((X.clone().requires_grad_(grad),), (X_T,))


def test_a_jvp_within_a_jvp():
    inner = pmf.Jvp(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="calls another Jvp"):
        run(lambda x: inner((x,), (x,))[1])
    out = run(lambda x: inner((x,), (x,), False)[1], detach_tangent=False)[1]
    assert out.abs().sum() > 0
    assert run(lambda x: x)[1].abs().sum() > 0  # no trace of the exception remains


def test_out_arguments_and_lists_in_place():
    with pytest.raises(NotImplementedError, match="aten.sin.out"), torch.no_grad():
        run(lambda x: torch.sin(x, out=torch.empty(3, 4)))
    with pytest.raises(NotImplementedError, match="_foreach_mul_"), torch.no_grad():
        run(lambda x: torch._foreach_mul_([x * 1], 2.0))
    with pytest.raises(NotImplementedError, match="aten.set_.source_Tensor"), torch.no_grad():
        run(lambda x: (x * 1).set_(torch.ones(3, 4)))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("_pdist_forward", F.pdist),
        ("_cdist_forward", lambda x: torch.cdist(x, x)),
        (
            "grid_sampler_2d",
            lambda x: F.grid_sample(x[None, None], x[None, :, :2, None], align_corners=False),
        ),
        ("special_bessel_j1", torch.special.bessel_j1),  # torch.func.jvp gives zeros for this and the next
        ("scatter_reduce", lambda x: x.scatter_reduce(0, torch.zeros(3, 4).long(), x.exp(), "prod")),
        ("_sparse_addmm", lambda x: torch.sparse.mm(torch.eye(3).to_sparse(), x)),
    ],
)
def test_operators_without_a_forward_mode(name, function):
    with pytest.raises(NotImplementedError, match=f"Jvp: PyTorch has no forward mode for aten.{name}"):
        run(function)


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize(
    "norm",
    [
        lambda x, w: torch.native_layer_norm(x, (4,), w, None, 1e-5),
        lambda x, w: torch.native_group_norm(x, w, None, len(x), 4, 1, 2, 1e-5),
        lambda x, w: torch.native_batch_norm(x, w, None, None, None, True, 0.1, 1e-5),
    ],
    ids=["layer", "group", "batch"],
)
def test_statistics_of_norms(norm, which: int):
    """Their tangents are not computed; torch.func.jvp gives zeros for layer and batch norm."""
    for count in (3, 2):
        for function in (lambda y: y, lambda y: y * 2):
            with pytest.raises(NotImplementedError, match="the mean or the deviation that a norm's operator"):
                run(lambda x, function=function: function(norm(x, None)[which]), (X,), (X_T[:count],))
        assert run(lambda x: norm(x, None)[0], (X,), (X_T[:count],))[1].any()
    if "native_group_norm" not in norm.__code__.co_names:  # of which PyTorch's formula is complete
        with pytest.raises(NotImplementedError, match="the mean or the deviation"):
            run(lambda x: norm(x, x[0])[which] * 2)


@pytest.mark.parametrize("x", [X[:1].expand(3, 4), X[:, ::2]], ids=["shared", "gaps"])
def test_strides_that_tangents_do_not_have(x):
    """All samples got the first one's tangent where they share memory."""
    network = Net(None)
    network.forward = lambda x: x.as_strided((3, 2), x.stride())
    with pytest.raises(NotImplementedError, match=r"as_strided of a value \[3, .* call contiguous"):
        pmf.Jvp(network)((x,), (torch.ones_like(x),))


def test_a_device_that_does_not_fit():
    with pytest.raises(RuntimeError, match="meta|device"):
        pmf.Jvp(nn.Linear(4, 4, device="meta"))((X,), (X_T,))


def test_threads_do_not_see_each_others_tangents():
    problem = NETWORKS["ViT"](torch.float64)
    tangents = [problem.tangents() for _ in range(4)]
    expected = [jvp_math(problem.network, problem.primals, t) for t in tangents]
    found: list = [None] * 4

    def work(i):
        for _ in range(3):
            found[i] = pmf.Jvp(problem.network)(problem.primals, tangents[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, 1e-12)


# Compiled: the conditions of a graph are guarded.


def compiled(network):
    return torch.compile(pmf.Jvp(network), fullgraph=True, backend="aot_eager")


def test_a_compiled_network_that_stops_training():
    """A graph of a single node has no guards: after eval() it continued to apply dropout."""
    network = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    jvp = compiled(network)
    first = jvp((X,), (X_T,))[0]
    assert not torch.equal(first, jvp((X,), (X_T,))[0])
    network.eval()
    assert_close(jvp((X,), (X_T,)), jvp_math(network, (X,), (X_T,)), 1e-6)


def test_a_compiled_network_that_changes_afterwards():
    """Weights, buffers, plain attributes, contents of objects, and modules of another type."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor, self.layer, self.act = 2.0, nn.Linear(4, 4), nn.Tanh()
            self.register_buffer("offset", torch.zeros(4))
            self.settings = SimpleNamespace(scales=[1.0, 2.0], last={"act": torch.sin})

        def forward(self, x):
            y = self.act(self.layer(x) * self.factor + self.offset) * sum(self.settings.scales)
            return self.settings.last["act"](y)

    network = Scaled()
    jvp = compiled(network)

    def check():
        assert_close(jvp((X,), (X_T,)), jvp_math(network, (X,), (X_T,)), 1e-6)

    check()
    with torch.no_grad():
        network.layer.weight.mul_(2)
        network.offset.add_(1)
    check()
    network.factor = 3.0
    check()
    for scale in (3.0, 4.0):  # the second could have become a symbol
        network.settings.scales[1] = scale
        check()
    network.settings.last["act"] = torch.cos
    check()
    network.act = nn.SiLU()
    check()
    network.layer = nn.Linear(4, 4)
    check()


def test_a_compiled_network_with_tensors_that_are_not_its_parameters():
    """The graph kept them as constants: no gradient from a tied weight, old values, an error in inductor."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.hidden = nn.Linear(4, 4), nn.Linear(4, 4), [nn.Linear(4, 4)]
            self.b.weight = self.a.weight
            self.mean, self.means = torch.ones(4), {"m": torch.ones(4)}

        def forward(self, x):
            return self.hidden[0](self.b(self.a(x - self.mean).tanh()) * self.means["m"])

    network = Net()
    weights = (network.a.weight, network.hidden[0].weight)
    jvp = compiled(network)
    for _ in range(2):
        out, out_t = jvp((X,), (X_T,))
        assert_close((out, out_t), jvp_math(network, (X,), (X_T,)), 1e-5)
        found = torch.autograd.grad(out.square().sum(), weights)
        assert_close(found, torch.autograd.grad(network(X).square().sum(), weights), 1e-5)
        network.mean, network.means["m"] = torch.zeros(4), torch.full((4,), 2.0)


def test_a_compiled_network_with_a_tensor_from_elsewhere():
    elsewhere = torch.ones(4)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"a tensor \[4\] that it does not hold: register"
    ):
        compiled(Net(lambda x: x * elsewhere))((X,), (X_T,))
    compiled(Net(lambda x: x * torch.tensor([2.0] * 4)))((X,), (X_T,))


def test_a_compiled_network_that_returns_more_than_tensors():
    network = Net(lambda x: {"x": x, "name": "text", "none": None, "type": torch.float16, "number": 3})
    out, out_t = compiled(network)((X,), (X_T,))
    assert out["name"] == "text" and out["none"] is None and out["type"] is torch.float16
    assert out["number"] == 3 and {name for name, t in out_t.items() if t is not None} == {"x"}


def test_compiled_batch_norm_updates_its_statistics():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    wanted = 0.1 * network[0](X).mean(0).detach()
    compiled(network)((X,), (X_T,))
    assert_close(network[1].running_mean, wanted, 1e-6)


def test_two_compiled_networks_of_one_shape():
    for activation in (torch.tanh, torch.sin):
        network = Net(activation)
        assert_close(compiled(network)((X,), (X_T,)), jvp_math(network, (X,), (X_T,)), 1e-6)


def test_a_jvp_of_a_compiled_network():
    """Whose compiler, active wherever the network runs, must not compile the tangents' Python code."""
    torch._dynamo.utils.counters.clear()
    network = NETWORKS["ViT"](torch.float32)
    tangents = network.tangents()
    found = pmf.Jvp(torch.compile(network.network, backend="aot_eager"))(network.primals, tangents)
    assert_close(found, jvp_math(network.network, network.primals, tangents), 1e-5)
    assert not torch._dynamo.utils.counters["frames"]


def test_data_parallel_on_several_devices() -> None:
    """Its threads know no tangents, and its copies hold other samples than the first."""
    inside = nn.Sequential(nn.Linear(4, 4), nn.DataParallel(nn.Linear(4, 4)))
    pmf.Jvp(inside)  # on one device, or none, it calls the module itself
    inside[1].device_ids = [0, 1]
    with pytest.raises(TypeError, match=r"the network's 1 is in DataParallel on 2 devices"):
        pmf.Jvp(inside)
    with pytest.raises(TypeError, match=r"the network's 1 is in DataParallel on 2 devices"):
        pmf.flow.MeanFlow()(inside, X, pmf.flow.MeanFlow().draw(X))
    copy = pmf.Jvp(nn.Linear(4, 4))._replicate_for_data_parallel()
    expected = X_T @ copy.network.weight.T  # every copy has the tangents of its samples
    torch.testing.assert_close(copy((X,), (X_T,))[1], expected)
    with pytest.raises(TypeError, match="with tangents of the first samples, this module is in DataParallel"):
        copy((X,), (X_T[:1],))
