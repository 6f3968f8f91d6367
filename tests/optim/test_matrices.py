"""Fused matrices, heads, experts and convolutions: each matrix is stepped like a separate parameter."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import emulator
from helpers.kernels import PLACES, at_place
from helpers.levels import EMULATED
from torch import Tensor, nn

from pmf.optim import Muon
from pmf.optim._matrices import layout_of

D, H = 16, 4
# A group's settings, the parameter's shape, and how to split it by hand.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], Callable[[Tensor], list[Tensor]]]] = {
    "fused": ({"split_sizes": [D, D, D]}, (3 * D, D), lambda x: list(x.split(D))),
    "heads": ({"num_heads": H}, (D, 24), lambda x: list(x.split(D // H))),
    "fused, by head": ({"split_sizes": [D] * 3, "num_heads": H}, (3 * D, D), lambda x: list(x.split(D // H))),
    "grouped queries": (
        {"split_sizes": (D, 8, 8), "num_heads": (4, 2, 2)},
        (D + 16, D),
        lambda x: list(x.split(4)),
    ),
    "unequal parts": ({"split_sizes": [30, 6]}, (36, 10), lambda x: list(x.split([30, 6]))),
    "experts": ({}, (5, 12, 20), lambda x: list(x.unbind())),
    "one expert": ({}, (1, 12, 20), lambda x: list(x.unbind())),
    "experts, fused": (
        {"split_sizes": [8, 4]},
        (3, 12, 10),
        lambda x: [part for expert in x for part in expert.split([8, 4])],
    ),
    "convolution": ({"flatten": True}, (8, 3, 3, 2), lambda x: [x.flatten(1)]),
    "convolution in one dimension": ({"flatten": True}, (8, 3, 5), lambda x: [x.flatten(1)]),
    "convolution, by head": (
        {"flatten": True, "num_heads": 2},
        (8, 3, 3),
        lambda x: list(x.flatten(1).split(4)),
    ),
    "vectors for heads": ({"num_heads": 6}, (6, 9), lambda x: list(x.split(1))),
}


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimizer_of(p: nn.Parameter, group: dict[str, Any], **settings: Any) -> Muon:
    return Muon([{"params": [("qkv.weight", p)], "algorithm": "muon", **group}], lr=0.1, **settings)


def stepped(p: nn.Parameter, optimizer: Muon, steps: range) -> Tensor:
    for step in steps:
        # Parts of different scales, as in fused matrices: unsplit, the largest would dominate.
        p.grad = (
            random(tuple(p.shape), 100 + step) * torch.logspace(0, 4, len(p)).view(-1, *[1] * (p.dim() - 1))
        ).to(p)
        optimizer.step()
    return p.detach().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("place", "scale"), [("cpu", "match_rms"), *((place, "spectral") for place in ("cpu", *PLACES))]
)
@pytest.mark.parametrize("name", CASES)
def test_each_matrix_steps_independently(name, place, scale, dtype):
    """On the CPU and with the CUDA kernels, including momentum, decay and masters."""
    group, shape, cut = CASES[name]
    settings = {"weight_decay": 0.1, "scale": scale, "compute_dtype": torch.float32}
    if dtype == torch.float64:
        settings["compute_dtype"] = torch.float64
    start = random(shape, 0).to(dtype)

    def fused(device: torch.device) -> Tensor:
        p = nn.Parameter(start.to(device, copy=True))
        return stepped(p, optimizer_of(p, group, **settings), range(3))

    if place == "cpu":
        found = fused(torch.device("cpu"))
    else:
        with at_place(place) as device:
            found = fused(device)
    whole = nn.Parameter(start.clone())
    parts = [nn.Parameter(x.clone()) for x in cut(start)]
    alone = Muon(parts, lr=0.1, **settings)
    for step in range(3):
        grad = random(shape, 100 + step) * torch.logspace(0, 4, len(whole)).view(-1, *[1] * (len(shape) - 1))
        for part, g in zip(parts, cut(grad.to(dtype)), strict=True):
            part.grad = g
        alone.step()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for x, part, first in zip(cut(found), parts, cut(start), strict=True):
        moved, expected = x.double() - first.double(), part.detach().double() - first.double()
        assert (moved - expected).norm() <= tolerance * expected.norm()


@pytest.mark.skipif(not EMULATED, reason="the emulator counts launches")
def test_all_heads_and_experts_are_one_batch_of_launches():
    def launches(group: dict[str, Any], shape: tuple[int, ...]) -> int:
        with at_place("emulated") as device:
            p = nn.Parameter(torch.ones(shape, device=device))
            optimizer = optimizer_of(p, group)
            p.grad = torch.ones_like(p)
            before = emulator.launches()
            optimizer.step()
            return emulator.launches() - before

    alone = launches({}, (4, 6))
    assert launches({"split_sizes": [8, 8, 8], "num_heads": 2}, (24, 6)) == alone
    assert launches({}, (9, 4, 6)) == alone


def test_all_matrices_of_a_group_are_one_call(monkeypatch):
    calls = []
    real = torch.ops.pmf.newton_schulz

    class Ops:
        def newton_schulz(self, matrices: list[Tensor], *settings: Any) -> list[Tensor]:
            calls.append(len(matrices))
            return real(matrices, *settings)

    params = [nn.Parameter(random((3 * D, D), i)) for i in range(2)]
    optimizer = Muon([{"params": params, "split_sizes": [D] * 3, "num_heads": H}])
    monkeypatch.setattr(torch.ops, "pmf", Ops())
    for p in params:
        p.grad = random((3 * D, D), 9)
    optimizer.step()
    assert calls == [2 * 3 * H]


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_convolution_of_any_memory_format(channels_last):
    w, g = random((8, 4, 3, 3), 0), random((8, 4, 3, 3), 1)
    form = torch.channels_last if channels_last else torch.contiguous_format
    p, q = nn.Parameter(w.contiguous(memory_format=form)), nn.Parameter(w.flatten(1).clone())
    p.grad, q.grad = g.contiguous(memory_format=form), g.flatten(1)
    optimizer_of(p, {"flatten": True}).step()
    Muon([q], lr=0.1).step()
    assert torch.equal(p.detach().flatten(1), q.detach())


@pytest.mark.parametrize("place", ["cpu", *PLACES])
@pytest.mark.parametrize("name", ["fused, by head", "experts, fused", "convolution"])
def test_a_saved_state_continues_bitwise(name, place):
    group, shape, _ = CASES[name]

    def check(device: torch.device) -> None:
        first = nn.Parameter(random(shape, 0).to(device))
        optimizer = optimizer_of(first, group)
        stepped(first, optimizer, range(2))
        second = nn.Parameter(first.detach().clone())
        resumed = optimizer_of(second, group)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert torch.equal(stepped(first, optimizer, range(2, 4)), stepped(second, resumed, range(2, 4)))

    if place == "cpu":
        check(torch.device("cpu"))
    else:
        with at_place(place) as device:
            check(device)


def test_a_copied_or_pickled_optimizer_still_splits():
    model = nn.MultiheadAttention(D, H)
    for other, optimizer in (
        copy.deepcopy((model, Muon(model, lr=0.1))),
        pickle.loads(pickle.dumps((model, Muon(model, lr=0.1)))),
    ):
        p = other.in_proj_weight
        assert optimizer.routing()["muon"] == ["out_proj.weight", "in_proj_weight"]
        before = p.detach().clone()
        p.grad = random((3 * D, D), 0) * torch.logspace(0, 6, 3 * D)[:, None]
        optimizer.step()
        for part in (before - p.detach()).split(D):
            assert torch.linalg.matrix_norm(part, 2) > 0.05


def test_counts_may_be_numpy_integers() -> None:
    weight = nn.Parameter(random((3 * D, D), 0))
    optimizer = Muon([weight], split_sizes=[np.int64(D)] * 3, num_heads=np.int64(2))
    saved = optimizer.state_dict()["param_groups"][0]
    assert saved["split_sizes"] == [D] * 3
    assert {*map(type, saved["split_sizes"]), type(saved["num_heads"])} == {int}


def test_a_state_with_different_splits_is_rejected():
    p = nn.Parameter(random((3 * D, D), 0))
    saved = optimizer_of(p, {})
    stepped(p, saved, range(1))
    optimizer = optimizer_of(p, {"split_sizes": [D] * 3})
    with pytest.raises(
        ValueError, match=r"qkv.weight has split_sizes \[16, 16, 16\], but was saved with None"
    ):
        optimizer.load_state_dict(saved.state_dict())
    same = optimizer_of(p, {"split_sizes": (D, D, D)})
    optimizer.load_state_dict(same.state_dict())


class Network(nn.Module):
    """A realistic network: a transformer layer on top of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, D, 2, 2)
        self.layer = nn.TransformerEncoderLayer(D, H, 2 * D, batch_first=True, dropout=0.0)
        self.cross = nn.MultiheadAttention(D, H, kdim=6, vdim=6, batch_first=True)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.layer(self.conv(x).flatten(2).mT)
        return self.head(self.cross(tokens, tokens[..., :6], tokens[..., 6:12])[0].mean(1))


@pytest.mark.parametrize("named", [True, False])
def test_attention_of_a_module_and_of_its_names(named):
    model = Network()
    optimizer = Muon(model.named_parameters() if named else model)
    muon = set(optimizer.routing()["muon"])
    assert muon == {
        "layer.self_attn.in_proj_weight",
        "layer.self_attn.out_proj.weight",
        "layer.linear1.weight",
        "layer.linear2.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "head.weight",
    }
    (fused,) = [g for g in optimizer.param_groups if g["split_sizes"] is not None]
    assert (fused["param_names"], fused["split_sizes"]) == (["layer.self_attn.in_proj_weight"], [D] * 3)


@pytest.mark.parametrize("named", [True, False])
def test_convolutions_use_muon_on_request(named):
    model = Network()
    optimizer = Muon(model.named_parameters() if named else model, flatten=True)
    assert "conv.weight" in optimizer.routing()["muon"]
    assert "conv.weight" not in Muon(model).routing()["muon"]
    (group,) = [g for g in optimizer.param_groups if "conv.weight" in g["param_names"]]
    assert layout_of(group, model.conv.weight.shape).columns == 4


def test_training_attention_agrees_with_torch_s_muon():
    """Up to the rounding of a bfloat16 iteration: torch's has separate projections, AdamW the rest."""

    def trained(make: Callable[[Network], Callable[[], None]]) -> tuple[list[float], Tensor]:
        torch.manual_seed(0)
        model = Network()
        start = [p.detach().clone() for p in model.parameters()]
        step, x, y = make(model), torch.randn(32, 1, 8, 8), torch.randint(3, (32,))
        found = []
        for _ in range(6):
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            step()
            found.append(loss.item())
        pairs = zip(model.parameters(), start, strict=True)
        # Adam moves by its full rate where gradients are only rounding errors: the keys' bias.
        return found, torch.cat([(p.detach() - q).flatten() for p, q in pairs if p.dim() == 2])

    def theirs(model: Network) -> Callable[[], None]:
        fused = model.layer.self_attn.in_proj_weight
        names = Muon(model).routing()["muon"]
        named = dict(model.named_parameters())
        apart = [nn.Parameter(x.clone()) for x in fused.detach().split(D)]
        matrices = [p for n, p in named.items() if n in names and p is not fused]
        muon = torch.optim.Muon([*matrices, *apart], lr=0.02)
        rest = [p for n, p in named.items() if n not in names]
        adam = torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)

        def step() -> None:
            for p, g in zip(apart, fused.grad.split(D), strict=True):
                p.grad = g
            muon.step()
            adam.step()
            with torch.no_grad():
                fused.copy_(torch.cat(apart))

        return step

    def exact(model: Network) -> Callable[[], None]:
        return Muon(model, lr=0.02, preset="torch", compute_dtype=torch.float32).step

    ours, moved = trained(lambda model: Muon(model, lr=0.02, preset="torch").step)
    expected, their_moves = trained(theirs)
    _, truth = trained(exact)
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-3)
    assert ours[-1] < 0.95 * ours[0]
    assert (their_moves - truth).norm() < 0.2 * truth.norm()  # six steps of feedback
    assert (moved - truth).norm() < 1.5 * (their_moves - truth).norm()


def test_the_shapes_of_torchs_tests():
    """The shapes of PyTorch's tests of torch.optim.Muon, within a bfloat16 iteration's rounding."""
    from torch.testing._internal.common_optimizers import optim_inputs_func_muon

    inputs = optim_inputs_func_muon("cpu")
    assert len(inputs) >= 7
    for case in inputs:
        ours, theirs, exact = (
            [nn.Parameter(random(s, 0)) for s in ((10, 20), (20, 10), (7, 7))] for _ in range(3)
        )
        made = [
            (ours, Muon(ours, preset="torch", **copy.deepcopy(case.kwargs))),
            (theirs, torch.optim.Muon(theirs, **copy.deepcopy(case.kwargs))),
            (exact, Muon(exact, preset="torch", compute_dtype=torch.float32, **copy.deepcopy(case.kwargs))),
        ]
        for step in range(4):
            for params, optimizer in made:
                for i, p in enumerate(params):
                    p.grad = random(tuple(p.shape), 10 * step + i)
                optimizer.step()
        for p, q, r in zip(ours, theirs, exact, strict=True):
            bound = (q - r).norm()
            assert 0 < bound < 3e-2 * (r - random(tuple(r.shape), 0)).norm(), case.desc
            assert (p - r).norm() < 1.5 * bound, case.desc


@pytest.mark.parametrize(
    "group, shape, message",
    [
        (
            {"split_sizes": [D, D]},
            (48, D),
            r"qkv.weight of shape \[48, 16\] has 48 rows.*split_sizes \[16, 16\] sum to 32",
        ),
        (
            {"split_sizes": [D, D, D], "num_heads": 5},
            (48, D),
            "a part of 16 rows, which its group's num_heads 5 does not",
        ),
        (
            {"split_sizes": [D, 2 * D], "num_heads": [4]},
            (48, D),
            r"has 2 parts, but its group's num_heads are 1",
        ),
        ({"split_sizes": D}, (48, D), "split_sizes must be a list of whole numbers of at least 1, got 16"),
        ({"split_sizes": []}, (48, D), r"split_sizes must be a list.*got \[\]"),
        ({"split_sizes": [48, 0]}, (48, D), "split_sizes must be a list"),
        ({"split_sizes": [16.0] * 3}, (48, D), "split_sizes must be a list"),
        (
            {"num_heads": 0},
            (48, D),
            "num_heads must be a whole number, or one for each part, of at least 1, got 0",
        ),
        ({"num_heads": True}, (48, D), "num_heads must be a whole number"),
        ({"flatten": 1}, (48, D), "flatten must be True or False, got 1"),
        ({}, (4, 3, 2, 2), "has more than three dimensions: flatten=True in its group"),
        ({}, (4,), "is not a matrix, and Muon only steps matrices"),
        ({"splitsizes": [D] * 3}, (48, D), "no setting 'splitsizes': did you mean split_sizes?"),
        ({"foreach": True}, (48, D), "no setting 'foreach': there are"),
        ({"betas": (0.5, 0.5)}, (48, D), "betas is set for parameters that all use muon"),
    ],
)
def test_settings_that_do_not_fit_are_named(group, shape, message):
    p = nn.Parameter(random(shape, 0))
    with pytest.raises(ValueError, match=message):
        optimizer_of(p, group)
    optimizer = Muon([nn.Parameter(random((3, 3), 0))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("qkv.weight", p)], "algorithm": "muon", **group})
    assert len(optimizer.param_groups) == 1


def test_settings_that_no_parameter_reads_are_named():
    vector, matrix = nn.Parameter(random((4,), 0)), nn.Parameter(random((4, 4), 0))
    with pytest.raises(ValueError, match="split_sizes is set for parameters that all use adam"):
        Muon([{"params": [vector], "split_sizes": [2, 2]}])
    with pytest.raises(ValueError, match="num_heads is set for parameters that all use adam"):
        Muon([vector], num_heads=2)
    with pytest.raises(ValueError, match="momentum is set for parameters that all use adam"):
        Muon([{"params": [matrix], "algorithm": "adam", "momentum": 0.5}])
    with pytest.raises(TypeError, match="foreach"):
        Muon([matrix], foreach=True)
    both = Muon([{"params": [vector, matrix], "split_sizes": [2, 2], "betas": (0.5, 0.6)}])
    assert both.routing()["muon"] == ["param1"]
    # A group copied for other parameters: it has all settings, equal to the defaults.
    both.add_param_group({**both.param_groups[1], "params": [nn.Parameter(random((3,), 0))]})


def test_a_split_set_later_is_checked_before_anything_moves():
    p, q = nn.Parameter(random((6, 4), 0)), nn.Parameter(random((6, 4), 1))
    optimizer = Muon([{"params": [p]}, {"params": [q]}])
    p.grad = q.grad = random((6, 4), 2)
    optimizer.param_groups[1]["split_sizes"] = [4, 4]
    start = p.detach().clone()
    with pytest.raises(ValueError, match="sum to 8"):
        optimizer.step()
    assert torch.equal(p, start)
    optimizer.param_groups[1]["split_sizes"] = [3, 3]
    optimizer.step()


def test_sparse_gradients_are_refused_before_anything_moves():
    table = nn.Embedding(5, 4, sparse=True)
    p = nn.Parameter(random((6, 4), 0))
    optimizer = Muon([("p.weight", p), ("table.embedding.weight", table.weight)])
    p.grad, start = random((6, 4), 2), p.detach().clone()
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="the gradient of table.embedding.weight is sparse; make it dense"):
        optimizer.step()
    assert torch.equal(p, start)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 4), (2, 0, 4)])
def test_parameters_without_elements(shape):
    p = nn.Parameter(torch.empty(shape))
    p.grad = torch.empty(shape)
    optimizer_of(p, {}).step()


def test_groups_added_after_steps_and_gradients_that_come_and_go():
    model = nn.MultiheadAttention(D, H)
    optimizer = Muon(model, lr=0.1, adam_lr=0.01)
    for step in range(2):
        for i, p in enumerate(model.parameters()):
            p.grad = None if i == step else random(tuple(p.shape), i)
        optimizer.step()
    late = nn.MultiheadAttention(D, H)
    optimizer.add_param_group({"params": late.named_parameters(), "num_heads": H})
    assert {g["lr"] for g in optimizer.param_groups if g["algorithm"] == "adam"} == {0.01}
    for p in late.parameters():
        p.grad = random(tuple(p.shape), 5)
    optimizer.step()
    counts = {s["step"] for s in optimizer.state.values()}
    assert counts == {2, 3, 1} or counts == {1, 2, 3}
