"""MeanFlow for any network: against the formulas written out, and against Objective where both apply."""

import functools
from typing import Any

import pytest
import torch
from helpers.networks import jvp_math
from helpers.products import Counted, products
from helpers.tolerance import assert_close
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pmf
from pmf.flow import (
    ClassifierFreeGuidance,
    IntervalGuidance,
    LineTimes,
    MeanFlow,
    NoGuidance,
    Objective,
    PlaneTimes,
)
from pmf.nn import Condition

EXACT = 1e-11
NULL = 3


class Net(nn.Module):
    """For points or signals, with a label and, if it takes it, guidance."""

    def __init__(self, features: int = 2) -> None:
        super().__init__()
        self.labels = nn.Embedding(NULL + 1, 4)
        self.a, self.b = nn.Linear(features + 9, 16), nn.Linear(16, features)

    def forward(self, z, t, r, label=None, omega=None, t_min=None, t_max=None):
        zero = torch.zeros_like(t)
        scalars = [t, r, *(zero if s is None else s for s in (omega, t_min, t_max))]
        c = self.labels(torch.full_like(t, NULL, dtype=torch.int64) if label is None else label)
        x = torch.cat((z.flatten(1), torch.stack(scalars, 1), c), 1)
        return self.b(torch.tanh(self.a(x))).view_as(z)


def over(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def written_out(objective: MeanFlow, network, x, draws, label) -> dict[str, Tensor]:
    """One sample at a time if settings differ between samples; torch.func.jvp throughout."""
    t, r = draws.t.to(x.dtype), draws.r.to(x.dtype)
    e, guidance = draws.noise, objective.guidance
    z = over(1 - t, x) * x + over(t, x) * e
    told = isinstance(guidance, IntervalGuidance)

    def u(z, t, r, label, omega=None, t_min=None, t_max=None):
        options = {"omega": omega, "t_min": t_min, "t_max": t_max} if told else {}
        out = network(z, t, r, label=label, **options)
        return out if objective.prediction == "u" else (z - out) / over(t.clamp(0.05, 1.0), z)

    one, zero = torch.ones_like(t), torch.zeros_like(t)
    v_t = e - x if objective.prediction == "u" else (z - x) / over(t.clamp(0.05, 1.0), z)
    inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
    if told:
        inside = inside | (draws.r == draws.t)
    omega = torch.where(inside, draws.omega, 1.0).to(x.dtype)
    with torch.no_grad():
        v_c = u(z, t, t, label, omega, zero, one)
        v_u = u(z, t, t, torch.full_like(label, NULL), one, zero, one)
        if isinstance(guidance, ClassifierFreeGuidance):
            kappa = over(torch.where(inside, guidance.kappa, 0.0), x)
            w = over(omega, x)
            v_g = w * v_t + kappa * v_c + (1 - w - kappa) * v_u
        elif told:
            v_g = v_t + over(1 - 1 / omega, x) * (v_c - v_u)
        else:
            v_g = v_t
        if objective.null:
            v_g = torch.where(over(draws.drop, x).bool(), v_t, v_g)
            label = torch.where(draws.drop, NULL, label)
    v = v_g if objective.direction == "conditional" else v_c
    own = [s.to(x.dtype) for s in (draws.omega, draws.t_min, draws.t_max)]
    value, du_dt = jvp_math(lambda z, t: u(z, t, r, label, *own), (z, t), (v, one))
    error = value + over(t - r, x) * du_dt.detach() - v_g
    squares = error.square().flatten(1).sum(1)
    loss = (squares / (squares.detach() + objective.norm_eps) ** objective.norm_p).mean()
    return {
        "loss": loss,
        "loss_u": error.square().mean(),
        "u": value,
        "du_dt": torch.where(over(t == r, x).bool(), 0.0, du_dt),
        "v_target": v_g,
        "v_tangent": v,
    }


GUIDANCE = {
    "none": {},
    "dropout alone": {"null": {"label": NULL}, "class_dropout": 0.5},
    "MeanFlow": {"guidance": ClassifierFreeGuidance(2.5), "null": {"label": NULL}, "class_dropout": 0.3},
    "MeanFlow, kappa": {"guidance": ClassifierFreeGuidance(1.0, 0.6, (0.3, 0.8)), "null": {"label": NULL}},
    "improved": {"guidance": IntervalGuidance(5.0), "null": {"label": NULL}, "class_dropout": 0.3},
}


@pytest.mark.parametrize("shape", [(2,), (1, 6), (3, 2, 2, 1)])
@pytest.mark.parametrize("prediction", ["u", "x"])
@pytest.mark.parametrize("direction", ["conditional", "network"])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_loss_terms_and_gradients(guidance: str, direction: Any, prediction: Any, shape: tuple[int, ...]):
    torch.manual_seed(0)
    objective = MeanFlow(prediction, direction, norm_p=0.75, noise_scale=1.5, **GUIDANCE[guidance])
    x = torch.randn(12, *shape, dtype=torch.float64)
    network, label = Net(x[0].numel()).double(), torch.arange(12) % NULL
    draws = objective.draw(x, torch.Generator().manual_seed(1))
    assert draws.drop.any() and draws.noise.std() > 1.1
    terms = objective(network, x, draws, label=label)
    expected = written_out(objective, network, x, draws, label)
    for name, value in expected.items():
        assert_close(getattr(terms, name).detach(), value.detach(), EXACT)
    weights = list(network.parameters())
    grads = torch.autograd.grad(terms.loss, weights)
    assert_close(grads, torch.autograd.grad(expected["loss"], weights), EXACT)


def test_it_equals_objective_where_both_apply():
    """Images, x-prediction and the network's own direction, without guidance and without a v head."""
    torch.manual_seed(0)
    model = pmf.create_model(
        num_classes=NULL, image_size=8, patch_size=4, channels=1, hidden_size=16, depth=2, head_depth=1,
        num_heads=2, bottleneck=4, v_head=False, condition_tokens=(1, 1, 1, 1, 1),
    ).double()  # fmt: skip
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    x, labels = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.arange(8) % NULL
    settings: dict[str, Any] = {"times": PlaneTimes(data_proportion=0.25), "guidance": NoGuidance()}
    theirs = Objective(v_head=False, class_dropout=0.0, **settings)
    ours = MeanFlow("x", "network", **settings)
    draws = theirs.draw(x, labels, torch.Generator().manual_seed(1))
    for mine, other in zip(ours.draw(x, torch.Generator().manual_seed(1)), draws, strict=True):
        assert mine is other is None or torch.equal(mine, other) or mine.dtype == torch.bool

    class Network(nn.Module):
        def forward(self, z, t, r, labels):
            one, zero = torch.ones_like(t), torch.zeros_like(t)
            return model(z, Condition(t - r, one, zero, one, labels), heads="u").u

    terms, expected = ours(Network(), x, draws, labels=labels), theirs(model, x, labels, draws)
    meanflow = (draws.r < draws.t).nonzero().flatten()
    for name in ("loss", "loss_u", "u", "v_target"):
        assert_close(getattr(terms, name).detach(), getattr(expected, name).detach(), 1e-9)
    assert_close(terms.du_dt[meanflow], expected.du_dt[meanflow], 1e-9)
    weights = [w for w in model.parameters() if w.requires_grad]
    grads = torch.autograd.grad(terms.loss, weights, allow_unused=True)
    wanted = torch.autograd.grad(expected.loss, weights, allow_unused=True)
    pairs = [
        pair for pair in zip(grads, wanted, strict=True) if pair[1] is not None and pair[1].norm() > 1e-9
    ]
    assert len(pairs) > 10
    assert_close(*zip(*pairs, strict=True), 1e-9)


class Recording(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, *args, **options):
        self.calls += 1
        return self.network(*args, **options)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("direction", ["conditional", "network"])
def test_the_network_is_called_as_often_for_any_draws(direction: Any, guidance: str):
    """Otherwise ranks that share its weights would wait for each other forever."""
    counts = set()
    for times in (PlaneTimes(), LineTimes(line="r=t"), LineTimes(line="r=0")):
        objective = MeanFlow(direction=direction, times=times, **GUIDANCE[guidance])
        network, x = Recording(Net()), torch.randn(6, 2)
        objective(network, x, objective.draw(x), label=torch.zeros(6, dtype=torch.int64)).loss.backward()
        counts.add(network.calls)
    plain = direction == "conditional" and guidance in ("none", "dropout alone")
    assert counts == {1 if plain else 2}


@pytest.mark.parametrize("wrap", ["module", "Jvp", "compiled Jvp", "compiled", "wrapped", "function"])
def test_modules_wrappers_and_functions(wrap: str):
    torch.manual_seed(0)
    net = Net(6).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    objective = MeanFlow(direction="network")
    draws = objective.draw(x, torch.Generator().manual_seed(1))

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    network = {
        "module": lambda: net,
        "Jvp": lambda: pmf.Jvp(net),
        "compiled Jvp": lambda: torch.compile(pmf.Jvp(net), backend="aot_eager"),
        "compiled": lambda: torch.compile(net, backend="aot_eager"),
        "wrapped": lambda: Wrapper(pmf.Jvp(net)),
        "function": lambda: lambda z, t, r: net(z, t, r),
    }[wrap]()
    terms = objective(network, x, draws)
    expected = written_out(objective, lambda z, t, r, label: net(z, t, r), x, draws, torch.zeros(4))
    assert_close(terms.du_dt, expected["du_dt"].detach(), EXACT)
    weights = list(net.parameters())
    grads = torch.autograd.grad(terms.loss, weights)
    assert_close(grads, torch.autograd.grad(expected["loss"], weights), EXACT)
    assert pmf.flow.sample(network, x).shape == x.shape


@pytest.mark.parametrize("prediction", ["u", "x"])
def test_samples_follow_the_field(prediction: Any):
    """The exact average velocity from x = 3 at every time: any number of steps ends there exactly."""

    def network(z, t, r, shift):
        end = torch.full_like(z, 3.0) + shift
        return end if prediction == "x" else (z - end) / over(t, z)

    noise, shift = torch.randn(5, 2, 3, dtype=torch.float64), torch.ones(5, 1, 1).double()
    for times in ((1.0, 0.0), [1, 0.7, 0.3, 0], torch.linspace(1, 0, 5)):
        out = pmf.flow.sample(network, noise, times, prediction=prediction, shift=shift)
        assert_close(out, torch.full_like(noise, 4.0), EXACT)
    half = pmf.flow.sample(network, noise, (1.0, 0.5), prediction=prediction, shift=shift)
    assert_close(half, 0.5 * noise + 2.0, EXACT)


def test_a_trained_network_samples_its_data():
    """Two points on each side: one step from noise ends near one of them."""
    torch.manual_seed(0)
    network, data = Net(1), torch.tensor([[-1.0], [1.0]])
    objective = MeanFlow()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        x = data[torch.randint(2, (128,), generator=generator)]
        optimizer.zero_grad()
        objective(network, x, objective.draw(x, generator)).loss.backward()
        optimizer.step()
    out = pmf.flow.sample(network, torch.randn(500, 1, generator=generator))
    assert (out.abs() - 1).abs().median() < 0.25 and abs(out.sign().mean()) < 0.3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prediction": "v"}, "prediction must be 'u' or 'x', got 'v'"),
        ({"direction": "own"}, "direction must be 'conditional' or 'network'"),
        ({"noise_scale": 0.0}, "noise_scale must be a finite number, greater than 0"),
        ({"norm_eps": 0.0}, "norm_eps must be a finite number, greater than 0"),
        ({"times": "plane"}, "times must be a TimeSampling, got 'plane'"),
        ({"guidance": None}, "guidance must be a Guidance, got None"),
        ({"class_dropout": 2.0}, "class_dropout must be a finite number, at least 0 and at most 1"),
        ({"guidance": IntervalGuidance()}, "guidance needs null"),
        ({"class_dropout": 0.5}, "class_dropout drops the conditions of null"),
    ],
)
def test_settings_that_do_not_fit(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        MeanFlow(**settings)


def test_inputs_that_do_not_fit():
    objective, x = MeanFlow(), torch.randn(4, 2)
    draws = objective.draw(x)
    with pytest.raises(ValueError, match=r"like z, \[4, 2\], got \[4, 1\]"):
        objective(lambda z, t, r: z[:, :1], x, draws)
    with pytest.raises(ValueError, match=r"like z, \[4, 2\], got tuple"):
        objective(lambda z, t, r: (z, z), x, draws)
    with pytest.raises(ValueError, match="x must be float32 or float64"):
        objective(Net(), x.half(), draws)
    for wrong in ((9 * x).to(torch.uint8), x[0, 0]):  # whose noise would be rounded, or has no batch
        with pytest.raises(ValueError, match="x must be float32 or float64"):
            objective.draw(wrong)
    with pytest.raises(ValueError, match="noise must be like x"):
        objective(Net(), x.double(), draws)
    with pytest.raises(ValueError, match=r"t must have shape \[4\], got \[3\]"):
        objective(Net(), x, draws._replace(t=draws.t[:3]))
    with pytest.raises(ValueError, match="0 <= r <= t <= 1"):
        objective(Net(), x, draws._replace(t=draws.r - 0.1))
    with pytest.raises(ValueError, match="never NaN"):
        objective(Net(), x, draws._replace(omega=torch.nan * draws.omega))
    assert objective(Net(), x, draws._replace(omega=0 * draws.omega)).loss.isfinite()  # without guidance
    guided = MeanFlow(guidance=IntervalGuidance(), null={"label": 3})
    with pytest.raises(ValueError, match="draws must have omega >= 1"):
        guided(Net(), x, draws._replace(omega=0.5 * draws.omega))
    below_one = MeanFlow(guidance=ClassifierFreeGuidance(), null={"label": 3})  # whose scale may be
    with pytest.raises(ValueError, match="null names label"):
        below_one(Net(), x, draws._replace(omega=0.5 * draws.omega))
    with pytest.raises(ValueError, match="draws must have omega >= 0"):
        below_one(Net(), x, draws._replace(omega=-draws.omega))
    with pytest.raises(TypeError, match="drop must be bool, got torch.float32"):
        objective(Net(), x, draws._replace(drop=draws.drop.float()))
    with pytest.raises(ValueError, match="null names label"):
        MeanFlow(null={"label": 3})(Net(), x, draws)
    label = torch.zeros(4, dtype=torch.int64)
    for nothing in (10.7, None):
        with pytest.raises(ValueError, match=f"null value of label must fit its dtype, .* got {nothing}"):
            MeanFlow(null={"label": nothing})(Net(), x, draws, label=label)
    with pytest.raises(ValueError, match="a condition cannot be called tangents"):
        objective(Net(), x, draws, tangents=label)
    with pytest.raises(ValueError, match="IntervalGuidance supplies omega"):
        guided = MeanFlow(guidance=IntervalGuidance(), null={"label": NULL})
        guided(Net(), x, guided.draw(x), label=label, omega=x[:, 0])
    with pytest.raises(TypeError, match="pmf.sample takes labels"):
        pmf.flow.sample(Net(), [1, 2])
    for times in ((1.0,), (0.0, 1.0), (1.0, 1.0), (1.5, 0.0), (1.0, -0.1)):
        with pytest.raises(ValueError, match="times must"):
            pmf.flow.sample(Net(), x, times)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("wrap", ["module", "compiled Jvp", "compiled"])
def test_only_samples_that_need_a_tangent_have_one(named: bool, wrap: str, monkeypatch):
    """If it is known which conditions are per sample."""
    torch.manual_seed(0)
    net, counts = Net(6).double(), []
    objective = MeanFlow(times=PlaneTimes(data_proportion=0.75), null={"label": NULL} if named else None)
    x, label = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % NULL
    draws = objective.draw(x, torch.Generator().manual_seed(1))
    forward = pmf.Jvp.forward

    def counted(self, primals, tangents, *args, **constants):
        counts.append([None if t is None else len(t) for t in tangents])
        return forward(self, primals, tangents, *args, **constants)

    monkeypatch.setattr(pmf.Jvp, "forward", counted)
    network = {
        "module": lambda: net,
        "compiled Jvp": lambda: torch.compile(pmf.Jvp(net), backend="eager"),
        "compiled": lambda: torch.compile(net, backend="eager"),
    }[wrap]()
    terms = objective(network, x, draws, label=label)
    assert counts[-1] == ([2, 2, None] if named else [8, 8, None])
    expected = written_out(objective, net, x, draws, label)
    assert_close(terms.u, expected["u"].detach(), EXACT)
    assert_close(terms.du_dt, expected["du_dt"].detach(), EXACT)


def test_a_compiled_network_multiplies_only_samples_with_a_tangent():
    """Counted, in one graph for all draws; loss and gradients are the eager ones."""
    torch.manual_seed(0)
    net, backend = Net(6).double(), Counted()
    jvp = torch.compile(pmf.Jvp(net), fullgraph=True, backend=backend)
    objective = MeanFlow(times=PlaneTimes(data_proportion=0.75), null={"label": NULL})
    x, label, weights = torch.randn(8, 6).double(), torch.arange(8) % NULL, list(net.parameters())
    for seed in range(2):
        draws = objective.draw(x, torch.Generator().manual_seed(seed))
        terms, expected = (objective(network, x, draws, label=label) for network in (jvp, net))
        assert_close([terms.u, terms.du_dt], [expected.u, expected.du_dt], EXACT)
        grads = torch.autograd.grad(terms.loss, weights)
        assert_close(grads, torch.autograd.grad(expected.loss, weights), EXACT)
    with FlopCounterMode(display=False) as value:
        net(x, draws.t, draws.r, label)
    assert products(backend.counter) * 8 == products(value) * (8 + 2)
    assert backend.graphs == 1


class Holder(nn.Module):
    """Has its labels from elsewhere."""

    def __init__(self, net, labels):
        super().__init__()
        self.net, self.labels = net, labels

    def forward(self, z, t, r):
        return self.net(z, t, r, torch.as_tensor(self.labels))


def test_whatever_belongs_to_samples_stays_with_them():
    """Samples were reordered, and what null does not name was not."""
    torch.manual_seed(0)
    net, objective = Net(6).double(), MeanFlow(direction="network")
    x, label = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % NULL
    draws = objective.draw(x, torch.Generator().manual_seed(1))
    expected = objective(net, x, draws, label=label)

    def of(z, t, r, label):
        return net(z, t, r, torch.as_tensor(label["y"] if isinstance(label, dict) else label))

    for network, given in (
        (functools.partial(net, label=label), {}),
        (lambda z, t, r: net(z, t, r, label), {}),
        (Holder(net, label), {}),
        (Holder(net, label.tolist()), {}),
        (Holder(net, label.numpy()), {}),
        (of, {"label": label.tolist()}),
        (of, {"label": label.numpy()}),
        (of, {"label": {"y": label}}),
    ):
        found = objective(network, x, draws, **given)
        assert_close([found.u, found.du_dt, found.loss], [expected.u, expected.du_dt, expected.loss], EXACT)


def test_a_shared_condition_may_have_the_length_of_the_batch():
    """It was taken for one per sample, and doubled for guidance."""
    torch.manual_seed(0)
    net = Net(6).double()
    objective = MeanFlow(guidance=ClassifierFreeGuidance(2.0, 0.3), null={"label": NULL})
    x, label, text = torch.randn(8, 6).double(), torch.arange(8) % NULL, torch.randn(8, 3).double()
    draws = objective.draw(x, torch.Generator().manual_seed(1))

    class Shared(nn.Module):
        def forward(self, z, t, r, label, text):
            return net(z, t, r, label) * (text.sum() if isinstance(text, Tensor) else text)

    longer, alone = torch.cat((text, text.new_zeros(1, 3))), text.sum().item()
    expected, *found = (
        objective(Shared(), x, draws, label=label, text=given).loss for given in (alone, text, longer)
    )
    assert_close(found, [expected, expected], EXACT)


def test_without_any_tangent():
    torch.manual_seed(0)
    net, objective = Net(6).double(), MeanFlow(times=PlaneTimes(data_proportion=1.0))
    x = torch.randn(4, 6, dtype=torch.float64)
    draws = objective.draw(x, torch.Generator().manual_seed(1))
    label = torch.zeros(4, dtype=torch.int64)
    terms = objective(lambda z, t, r: net(z, t, r, label), x, draws)
    assert not terms.du_dt.any() and terms.loss.requires_grad
