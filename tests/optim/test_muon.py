"""Muon: the authors' numbers, torch's numbers, routing, exact resuming, and rejected input."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pmf import models, reference
from pmf.optim import Muon

GOLDEN = Path(__file__).parents[1] / "golden" / "muon.npz"


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def relative(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


class Network(nn.Module):
    """One of each kind of parameter that routing distinguishes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.tied_table = nn.Embedding(6, 8)
        self.linear = nn.Linear(8, 6)
        self.tied = nn.Linear(8, 6, bias=False)
        self.tied.weight = self.tied_table.weight
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(6)
        self.tokens = nn.Parameter(torch.randn(4, 8))
        self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)


def test_three_steps_are_the_authors():
    """param_k - init is recorded in float32, which limits the comparison: 3e-5 for matrices, else 5e-6."""
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN).items()}
    params = {key[5:]: nn.Parameter(golden[key].clone()) for key in golden if key.startswith("init/")}
    optimizer = Muon(params.values(), lr=golden["learning_rate"].item())
    for step in range(3):
        for name, p in params.items():
            p.grad = golden[f"grad{step}/{name}"]
        optimizer.step()
        for name, p in params.items():
            start = golden[f"init/{name}"]
            moved = golden[f"param{step}/{name}"] - start
            assert relative(p.detach() - start, moved) < (3e-5 if p.dim() == 2 else 5e-6), name


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("preset, adjust", [("torch", "original"), ("moonlight", "match_rms_adamw")])
def test_presets_are_torch_s_muon(preset, adjust, nesterov):
    """The same up to the rounding of a bfloat16 iteration, torch's own distance from the exact step."""
    shapes = ((24, 24), (16, 40), (50, 20))
    mine, theirs = parameters(*shapes), parameters(*shapes)
    exact = parameters(*shapes, dtype=torch.float64)
    optimizers = (
        Muon(mine, lr=0.02, preset=preset, nesterov=nesterov),
        torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn=adjust, nesterov=nesterov),
        Muon(exact, lr=0.02, preset=preset, nesterov=nesterov, compute_dtype=torch.float64),
    )
    start = [p.detach().clone() for p in mine]
    for step in range(4):
        for params, optimizer in zip((mine, theirs, exact), optimizers, strict=True):
            set_gradients(params, step)
            if params is exact:  # the gradients that the float32 parameters get
                for p, q in zip(exact, mine, strict=True):
                    p.grad = q.grad.double()
            optimizer.step()
    for p, q, r, p0 in zip(mine, theirs, exact, start, strict=True):
        theirs_from_exact = relative(q.detach() - p0, r.detach() - p0)
        assert theirs_from_exact < 3e-2
        assert relative(p.detach() - p0, r.detach() - p0) < 1.5 * theirs_from_exact


def test_adam_without_nesterov_is_adamw():
    shapes = ((7,), (3, 4, 5))
    mine, theirs = parameters(*shapes), parameters(*shapes)
    pair = (
        Muon(mine, lr=0.01, preset="torch"),
        torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    )
    for step in range(5):
        for params, optimizer in zip((mine, theirs), pair, strict=True):
            set_gradients(params, step)
            optimizer.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_muon_s_equation_in_float64(nesterov, bias_correction):
    (p,) = parameters((6, 4), dtype=torch.float64)
    expected, m = p.detach().clone(), torch.zeros(6, 4, dtype=torch.float64)
    optimizer = Muon([p], lr=0.1, nesterov=nesterov, bias_correction=bias_correction, weight_decay=0.5)
    for k in range(1, 5):
        set_gradients([p], k)
        optimizer.step()
        m = 0.95 * m + 0.05 * p.grad
        if not nesterov:
            u = m / (1 - 0.95**k) if bias_correction else m
        elif bias_correction:
            u = 0.95 * m / (1 - 0.95 ** (k + 1)) + 0.05 * p.grad / (1 - 0.95**k)
        else:
            u = 0.95 * m + 0.05 * p.grad
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * (6 / 4) ** 0.5 * reference.newton_schulz(u)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_only_a_modules_linear_weights_use_muon():
    assert Muon(Network()).routing() == {
        "muon": ["linear.weight"],
        "adam": ["tokens", "table.weight", "tied_table.weight", "linear.bias", "conv.weight", "conv.bias"]
        + ["norm.weight", "norm.bias"],
        "frozen": ["frozen.weight"],
    }


def test_exactly_the_recipes_matrices_of_the_model_use_muon():
    """Attention, MLP, the embedders' linears, both final linears; the patch embedding is convolutions."""
    model = models.PixelMeanFlow(
        models.ModelConfig(
            image_size=8,
            patch_size=4,
            channels=1,
            num_classes=3,
            hidden_size=16,
            depth=2,
            head_depth=1,
            num_heads=2,
        )
    )
    parts = (
        "_proj.weight",
        "w1.weight",
        "w2.weight",
        "w3.weight",
        "linear1.weight",
        "linear2.weight",
        "linear.weight",
    )
    routing = Muon(model).routing()
    names = [name for name, _ in model.named_parameters()]
    assert routing["muon"] == [name for name in names if name.endswith(parts)]
    assert sorted(routing["muon"] + routing["adam"]) == sorted(names)
    blocks = 3  # one shared block, one in each head
    assert len(routing["muon"]) == blocks * (4 + 3) + 4 * 2 + 2


def test_names_tensors_and_groups_are_routed_as_documented():
    p = parameters((2, 3), (2, 3), (2, 3), (2, 3), (2, 3), (4,))
    names = [
        "time_embedder.linear1.weight",
        "label.embedding.weight",
        "wte.weight",
        "model.embed_tokens.weight",  # of transformers' language models: was Muon's
        "patch.weight_up",
        "bias",
    ]
    routing = Muon(zip(names, p, strict=True)).routing()
    assert routing["muon"] == names[:1] and routing["adam"] == names[1:]
    assert Muon(p).routing() == {"muon": [f"param{i}" for i in range(5)], "adam": ["param5"], "frozen": []}
    optimizer = Muon([{"params": p[:2], "algorithm": "adam", "lr": 0.5}, {"params": p[2:]}], lr=0.1)
    assert optimizer.routing() == {
        "muon": ["param2", "param3", "param4"],
        "adam": ["param0", "param1", "param5"],
        "frozen": [],
    }
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1, 0.1]
    (extra,) = parameters((5, 5))
    optimizer.add_param_group({"params": [("extra.weight", extra)]})
    assert "extra.weight" in optimizer.routing()["muon"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_takes_the_same_step(dtype):
    """Bit for bit, even for matrices that MKL and the loops divide among threads."""

    def stepped(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        shapes = [(300, 500), (129, 129), (500, 64), (70_000,)]
        params = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
        optimizer = Muon(params, lr=0.05, weight_decay=0.1)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
        return [p.detach() for p in params]

    before = torch.get_num_threads()
    try:
        first, *others = [stepped(threads) for threads in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_state_continues_bitwise(dtype):
    shapes = ((6, 9), (9, 6), (5,), (2, 3, 4))
    first = parameters(*shapes, dtype=dtype)
    optimizer = Muon(first, lr=0.01)
    for step in range(3):
        set_gradients(first, step)
        if step == 1:
            first[0].grad = first[2].grad = None  # step counts differ between parameters from here
        optimizer.step()
    second = [nn.Parameter(p.detach().clone()) for p in first]
    state = copy.deepcopy(optimizer.state_dict())
    resumed = Muon(second, lr=0.5)
    resumed.load_state_dict(state)
    for step in range(3, 6):
        for params, each in ((first, optimizer), (second, resumed)):
            set_gradients(params, step)
            each.step()
        assert all(map(torch.equal, first, second))
    assert resumed.param_groups[0]["lr"] == 0.01
    plain = (Tensor, int, float, str, bool, tuple, list, type(None))
    assert all(isinstance(x, plain) for group in state["param_groups"] for x in group.values())
    assert all(isinstance(x, (Tensor, int)) for entry in state["state"].values() for x in entry.values())


@pytest.mark.parametrize("loads", [True, False])
@pytest.mark.parametrize(
    "before, after",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float16),
    ],
)
def test_a_state_follows_its_parameters_to_another_dtype(before, after, loads):
    module = nn.Linear(5, 4).to(before)
    optimizer = Muon(module, lr=0.1)
    set_gradients(list(module.parameters()), 0)
    optimizer.step()
    momenta = [state["momentum"].clone() for state in optimizer.state.values()]
    state = copy.deepcopy(optimizer.state_dict())
    module.zero_grad()
    module.to(after)
    if loads:
        optimizer = Muon(module, lr=0.1)
        optimizer.load_state_dict(state)
    wide = torch.float64 if after == torch.float64 else torch.float32
    expected = copy.deepcopy(module).to(wide)
    set_gradients(list(module.parameters()), 1)
    other = Muon(expected, lr=0.1)
    for p, q, momentum in zip(module.parameters(), expected.parameters(), momenta, strict=True):
        q.grad = p.grad.to(wide)
        square = {} if momentum.dim() == 2 else {"square": optimizer.state[p]["square"].to(wide, copy=True)}
        other.state[q] = {"step": 1, "momentum": momentum.to(wide), **square}
    other.step()
    optimizer.step()
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q.to(after))
        assert ("master" in optimizer.state[p]) == (after.itemsize == 2)


def test_a_gradient_that_the_optimizer_does_not_know_is_named_once():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].weight.requires_grad_(False)
    optimizer = Muon(module)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    module[0].weight.grad = None
    optimizer.step()
    module[0].weight.requires_grad_(True).grad = torch.ones(2, 2)
    with pytest.warns(UserWarning, match="Muon: 0.weight has a gradient but is not trained"):
        optimizer.step()
    optimizer.step()
    optimizer.add_param_group({"params": [("0.weight", module[0].weight)]})
    assert optimizer.routing()["frozen"] == [] and "0.weight" in optimizer.routing()["muon"]


def test_16_bit_parameters_have_float32_masters():
    """Steps far below bfloat16's spacing add up; without a master they would all round to nothing."""
    (p,) = parameters((4, 4), dtype=torch.bfloat16)
    start = p.detach().clone()
    optimizer = Muon([p], lr=1e-4)
    for _ in range(100):
        p.grad = start.clone()
        optimizer.step()
    assert {x.dtype for x in optimizer.state[p].values() if isinstance(x, Tensor)} == {torch.float32}
    moved = (p.detach().float() - start.float()).norm().item()
    (q,) = parameters((4, 4), dtype=torch.bfloat16)
    exact = nn.Parameter(q.detach().float())
    other = Muon([exact], lr=1e-4)
    for _ in range(100):
        exact.grad = start.float()
        other.step()
    assert torch.equal(p.detach(), exact.detach().bfloat16()) and moved > 0
    with torch.no_grad():
        p.fill_(3)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (p - 3).abs().max() < 0.1


def test_a_parameter_set_after_it_was_nan_starts_a_new_master():
    """The master kept its NaN and gave it back in the next step; the kernels took the parameter."""
    for shape in ((4, 4), (4,)):
        (p,) = parameters(shape, dtype=torch.bfloat16)
        optimizer = Muon([p])
        p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
        assert p.isnan().all()
        with torch.no_grad():
            p.fill_(3)
        for key in ("momentum", "square"):
            if key in optimizer.state[p]:
                optimizer.state[p][key].zero_()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert (p == 3).all()


def test_zero_and_absent_gradients():
    p = parameters((6, 4), (4, 6), (3,), (5, 5))
    start = [x.detach().clone() for x in p]
    optimizer = Muon(p)
    for x in p[:3]:
        x.grad = torch.zeros_like(x)
    for _ in range(2):
        optimizer.step()
    assert all(map(torch.equal, p, start))
    assert p[3] not in optimizer.state or not optimizer.state[p[3]]
    set_gradients(p[:2], 0)
    kept = [x.grad.clone() for x in p[:2]]
    optimizer.step()
    assert all(torch.equal(x.grad, g) for x, g in zip(p[:2], kept, strict=True))
    assert all(x.isfinite().all() for x in p) and not torch.equal(p[0], start[0])


def test_a_nan_gradient_affects_only_its_own_parameter():
    p = parameters((6, 4), (6, 4), (3,))
    optimizer = Muon(p)
    set_gradients(p, 0)
    p[0].grad[1, 1] = float("nan")
    optimizer.step()
    assert p[0].isnan().all() and p[1].isfinite().all() and p[2].isfinite().all()


def test_closure_schedule_and_tensor_learning_rate():
    p, q = parameters((4, 4), (3,)), parameters((4, 4), (3,))
    ours, tensor = Muon(p, lr=0.1), Muon(q, lr=torch.tensor(0.1, dtype=torch.float64))
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 0.5**step)

    def closure() -> Tensor:
        ours.zero_grad()
        loss = sum((x * x).sum() for x in p)
        loss.backward()
        return loss

    expected = sum((x * x).sum() for x in p).item()
    assert ours.step(closure).item() == expected
    for x, y in zip(q, p, strict=True):
        x.grad = y.grad
    tensor.step()
    assert all(map(torch.equal, p, q))
    schedule.step()
    assert [group["lr"] for group in ours.param_groups] == [0.05, 0.05]


def test_memory_chunks_do_not_change_the_bits(monkeypatch):
    shapes = ((8, 8), (4, 12), (20, 4), (6, 6))
    p, q = parameters(*shapes), parameters(*shapes)
    set_gradients(p, 0)
    set_gradients(q, 0)
    Muon(p).step()
    monkeypatch.setattr("pmf.optim._plain.CHUNK", 70)
    Muon(q).step()
    assert all(map(torch.equal, p, q))


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1.0])
def test_a_learning_rate_out_of_range_is_one_sentence(lr):
    p = parameters((3, 3))
    with pytest.raises(ValueError, match="the learning rate must be a finite number, at least 0, got"):
        Muon(p, lr=lr)
    optimizer = Muon(p)
    optimizer.param_groups[0]["lr"] = lr
    start = p[0].detach().clone()
    set_gradients(p, 0)
    with pytest.raises(ValueError, match="the learning rate must be a finite number, at least 0, got"):
        optimizer.step()
    assert torch.equal(p[0], start)


def test_states_by_name_need_names_that_differ():
    """Of two parameters with one name, the second's state replaced the first's."""
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = Muon([{"params": layer.named_parameters()} for layer in layers])
    set_gradients(list(layers.parameters()), 0)
    optimizer.step()
    with pytest.raises(ValueError, match="two parameters are called weight, .* names that differ"):
        optimizer.named_state()
    optimizer = Muon(parameters((2, 2)))
    optimizer.add_param_group({"params": parameters((2, 2))})
    assert len(optimizer.named_state()) == 2


def test_bad_arguments_are_named():
    p = parameters((3, 3), (4,))
    for make, message in (
        (lambda: Muon([]), "there are no parameters"),
        (lambda: Muon([p[0], p[1], p[0]]), "a parameter is given twice, as param0 and as param2"),
        (lambda: Muon([{"params": p[:1]}, {"params": p[:1]}]), "a parameter is given twice"),
        (lambda: Muon([{"params": p, "algorithm": "muon"}]), r"param1 of shape \[4\] is not a matrix"),
        (lambda: Muon([{"params": p, "algorithm": "sgd"}]), "algorithm must be 'muon' or 'adam', got 'sgd'"),
        (lambda: Muon(p, preset="adam"), "preset must be one of pmf, torch, moonlight"),
        (lambda: Muon(p, momentum=1.0), "momentum must be a finite number, at least 0 and less than 1"),
        (lambda: Muon(p, betas=(0.9, 1.5)), r"betas\[1\] must be"),
        (lambda: Muon(p, weight_decay=float("nan")), "weight_decay must be a finite number"),
        (lambda: Muon(p, scale="big"), "scale must be one of spectral, match_rms, none"),
        (lambda: Muon(p, ns_method="svd"), "ns_method must be one of auto, direct, gram"),
        (lambda: Muon(p, ns_coefficients="cubic"), "coefficients must be quintic, taylor or polar-express"),
        (lambda: Muon([{"params": p, "compute_dtype": "fp8"}]), "compute_dtype must be a floating dtype"),
        (lambda: Muon(p, lr=torch.ones(2)), "the learning rate must be one number"),
        (lambda: Muon(p).load_state_dict({}), "the saved state has no param_groups"),
        (lambda: Muon(p).load_state_dict(torch.optim.AdamW(p).state_dict()), "is another optimizer's"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="must be a module, or a list .* not NoneType"):
        Muon(None)
    with pytest.raises(TypeError, match=r"a group's params must be .* got Linear: .*named_parameters\(\)"):
        Muon([{"params": nn.Linear(2, 2)}])
    with pytest.raises(TypeError, match="or a list of parameters, pairs or groups, not dict"):
        Muon({"weight": p[0]})
    with pytest.raises(TypeError, match="not one tensor"):
        Muon(p[0])
    with pytest.raises(TypeError, match="cannot be mixed"):
        Muon([{"params": p[:1]}, p[1]])


@pytest.mark.parametrize(
    "setting, value",
    [
        ("lr", "1e-3"),
        ("lr", None),
        ("lr", True),
        ("adam_lr", "1e-3"),
        ("momentum", "a"),
        ("nesterov", "no"),
        ("bias_correction", "no"),
        ("adam_nesterov", 1),
        ("betas", 0.9),
        ("betas", (0.9,)),
        ("betas", "ab"),
        ("eps", "a"),
        ("ns_steps", 2.5),
        ("ns_steps", "5"),
        ("ns_coefficients", None),
        ("ns_coefficients", [(1.0, 2.0, 3.0), (1.0, 2.0)]),
        ("process_group", 3),
    ],
)
def test_values_of_another_type_are_named(setting, value):
    words = {"lr": "the learning rate", "adam_lr": "the learning rate", "ns_steps": "steps"}.get(
        setting, setting
    )
    p = parameters((3, 3), (4,))
    with pytest.raises((ValueError, TypeError), match=f"^(Muon|newton_schulz): {words.removeprefix('ns_')}"):
        Muon(p, **{setting: value})


@pytest.mark.parametrize(
    "shape, settings, algorithm",
    [
        ((4,), {"momentum": 0.5}, "adam"),
        ((4,), {"ns_steps": 6}, "adam"),
        ((4,), {"split_sizes": [2, 2]}, "adam"),
        ((4, 4), {"betas": (0.5, 0.5)}, "muon"),
        ((4, 4), {"adam_lr": 0.1}, None),
    ],
)
def test_a_setting_that_no_parameter_reads_is_named(shape, settings, algorithm):
    used = f"parameters that all use {algorithm}" if algorithm else "no parameter uses adam"
    with pytest.raises(ValueError, match=f"Muon: {next(iter(settings))} is set.*{used}"):
        Muon(parameters(shape), **settings)


def test_a_group_s_own_compute_dtype():
    ours, theirs = parameters((3, 4)), parameters((3, 4))
    for p, optimizer in (
        (ours, Muon([{"params": ours, "compute_dtype": torch.bfloat16}])),
        (theirs, Muon(theirs, compute_dtype=torch.bfloat16)),
    ):
        set_gradients(p, 0)
        optimizer.step()
    assert torch.equal(ours[0], theirs[0])


def test_a_copied_optimizer_keeps_its_routing():
    module = nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    optimizer = Muon(module)
    expected = {"muon": ["weight"], "adam": [], "frozen": ["bias"]}
    assert copy.deepcopy(optimizer).routing() == optimizer.routing() == expected


def test_a_state_of_other_parameters_is_rejected():
    optimizer = Muon(parameters((3, 3), (4,)))
    with pytest.raises(ValueError, match="other parameters"):
        optimizer.load_state_dict(Muon(parameters((3, 3))).state_dict())
    other = parameters((3, 5), (4,))
    set_gradients(other, 0)
    source = Muon(other)
    source.step()
    with pytest.raises(ValueError, match="other shapes"):
        optimizer.load_state_dict(source.state_dict())


@pytest.mark.parametrize("on_ranks", [False, True])
def test_the_state_of_one_of_several_ranks_is_rejected(tmp_path, on_ranks):
    """The momentum that other ranks had kept started from zero, with the step count of a long run."""
    p = parameters((3, 3), (4,))
    set_gradients(p, 0)
    source = Muon(p)
    source.step()
    part = source.state_dict()
    part["state"][0] = {"step": part["state"][0]["step"]}
    group = None
    if on_ranks:
        store = f"file://{tmp_path}/meet"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        group = torch.distributed.group.WORLD
    try:
        optimizer = Muon(parameters((3, 3), (4,)), process_group=group)
        with pytest.raises(ValueError, match="has no momentum of param0, which another rank kept: save the"):
            optimizer.load_state_dict(part)
        optimizer.load_state_dict(source.state_dict())
    finally:
        if on_ranks:
            torch.distributed.destroy_process_group()
