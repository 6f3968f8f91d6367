"""The benchmarks' baseline is correct, and independent of the library it is compared with."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import plain_port
import pytest
import torch
from torch import Tensor
from training_step.agreement import batches, relative_error
from training_step.sides import SMALL, Batch, Ours, Port, make_model

from pmf.models import config_from_state_dict, from_official
from pmf.reference.objective import objective as reference_objective

GOLDEN = Path(__file__).parents[1] / "golden" / "objective.npz"
GOLDEN_TOLERANCE = 1e-4  # float32, and another implementation's
FLOAT64_TOLERANCE = 1e-10


def test_it_imports_nothing_but_torch():
    imported = set()
    for node in ast.walk(ast.parse(Path(plain_port.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported == {"collections", "math", "torch", "typing"}


@pytest.mark.parametrize(("case", "batch"), list(batches("fp64")), ids=lambda x: x if type(x) is str else "")
def test_it_agrees_with_the_reference_in_float64(case: str, batch: Batch):
    model = make_model(SMALL).double()
    port = Port(model, SMALL, "fp64")
    losses = port.backward(batch)
    params = dict(model.named_parameters())
    plain = reference_objective(
        params, batch.images, batch.labels, **batch.given(), num_heads=SMALL.num_heads
    )
    expected = torch.autograd.grad(plain.loss, list(params.values()))
    for ours, theirs in zip(losses, (plain.loss_u, plain.loss_v), strict=True):
        assert relative_error(ours, theirs) < FLOAT64_TOLERANCE
    found = port.gradients()
    for name, theirs in zip(params, expected, strict=True):
        assert relative_error(found[name], theirs) < FLOAT64_TOLERANCE, name


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """The authors' trainer and sampler results for one tiny network."""
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def below(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in golden.items() if name.startswith(prefix)}


def golden_network(golden: dict[str, Tensor], **options: Any) -> plain_port.Network:
    config = config_from_state_dict(below(golden, "param/"), noise_scale=1.0)
    width = golden["param/u_heads.0.mlp.w1._flax_linear.weight"].shape[0]
    rank = golden["param/x_embedder.proj1.weight"].shape[0]
    given = {name: getattr(config, name) for name in plain_port.Sizes._fields}
    sizes = plain_port.Sizes(**{**given, "mlp_width": width, "bottleneck": rank})
    network = plain_port.Network(sizes, **options)
    return plain_port.load(network, from_official(below(golden, "param/")))


def test_its_losses_and_gradients_match_the_authors(golden: dict[str, Tensor]):
    network = golden_network(golden)
    labels = golden["in/labels"]
    draws = {name: golden[f"in/{name}"] for name in ("t", "r", "noise", "omega", "t_min", "t_max")}
    drop = torch.arange(len(labels)) < int(golden["in/num_dropped_labels"])
    losses = plain_port.objective(network, golden["in/images"], labels, **draws, drop=drop)
    losses.loss.backward()
    for name in ("loss", "loss_u", "loss_v"):
        error = relative_error(getattr(losses, name).detach(), golden[f"out/{name}"])
        assert error < GOLDEN_TOLERANCE, name
    expected = from_official(below(golden, "grad/"))
    for name, found in plain_port.gradients(network, expected).items():
        assert relative_error(found, expected[name].reshape(found.shape)) < GOLDEN_TOLERANCE, name


@pytest.mark.parametrize("attend", [plain_port.torch_attention, plain_port.written_out_attention])
def test_its_samples_match_the_authors(golden: dict[str, Tensor], attend: plain_port.Attend):
    given = below(golden, "sample1/")
    interval = float(given["t_min"]), float(given["t_max"])
    network = golden_network(golden, attend=attend)
    images = plain_port.sample(network, given["labels"], given["z"], float(given["omega"]), interval)
    assert relative_error(images, given["images"]) < GOLDEN_TOLERANCE


def test_weights_that_do_not_fit_are_refused():
    weights = make_model(SMALL).state_dict()
    missing = {name: w for name, w in weights.items() if name != "position"}
    for wrong in (missing, {**weights, "position2": weights["position"]}):
        with pytest.raises(RuntimeError, match="position"):
            plain_port.load(plain_port.Network(SMALL), wrong)


def test_its_optimizers_have_the_same_parameters_and_steps():
    """One step from the same full-rank gradients, whose directions bfloat16 can distinguish from noise."""
    model = make_model(SMALL)
    ours, port = Ours(model, "fp32"), Port(model, SMALL, "fp32")
    theirs = dict(port.network.named_parameters())
    named = {
        name: (p, theirs[plain_port.RENAMED.get(name, name)]) for name, p in ours.model.named_parameters()
    }
    muon = {id(p) for group in port.optimizers[0].param_groups for p in group["params"]}
    assert set(ours.optimizer.routing()["muon"]) == {name for name, (_, p) in named.items() if id(p) in muon}

    generator = torch.Generator().manual_seed(0)
    before = {name: p.detach().clone() for name, (p, _) in named.items()}
    for mine, other in named.values():
        mine.grad = torch.randn(mine.shape, generator=generator)
        other.grad = mine.grad.reshape(other.shape).clone()
    ours.update()
    port.update()
    for name, (mine, other) in named.items():
        step, expected = (p.detach().reshape(before[name].shape) - before[name] for p in (mine, other))
        # Both orthogonalise in bfloat16 with different formulas: five steps amplify its rounding.
        assert relative_error(step, expected) < (0.05 if id(other) in muon else 1e-3), name
        assert mine.grad is None and other.grad is None


def test_the_guidance_passes_need_only_the_v_path():
    model = make_model(SMALL)
    _, batch = next(b for b in batches("fp32") if b[0] == "everything")
    sides = [Port(model, SMALL, "fp32", guidance_heads=heads) for heads in ("uv", "v")]
    both, careful = (side.backward(batch) for side in sides)
    assert all(map(torch.equal, both, careful))
