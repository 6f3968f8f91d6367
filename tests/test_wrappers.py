"""Models inside DistributedDataParallel, fully_shard and torch.compile are accepted directly."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import pmf
from pmf import models
from pmf.checkpoint import assign_weights
from pmf.errors import UserError
from pmf.optim import EMA, Muon
from pmf.wrappers import exchanges, plain_names, unwrap

PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod.")
PREFIXES += ("_fsdp_wrapped_module.", "module._checkpoint_wrapped_module.")


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, which DistributedDataParallel requires."""
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DDP,
    "data parallel": nn.DataParallel,  # without a GPU it runs the module itself
    "compiled": compiled,
    "ddp of compiled": lambda model: DDP(compiled(model)),
    "compiled ddp": lambda model: compiled(DDP(model)),
    "data parallel of compiled": lambda model: nn.DataParallel(compiled(model)),
}


def digits(seed: int = 0) -> models.PixelMeanFlow:
    torch.manual_seed(seed)
    model = pmf.create_model("digits", hidden_size=16, depth=2, head_depth=1, mlp_width=24, bottleneck=4)
    with torch.no_grad():  # both heads initially give zero, whatever the input
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return model


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrapper_prefixes_are_removed(prefix):
    names = ["block.0.weight", "module_list.weight", "head.module.bias"]
    assert plain_names(prefix + name for name in names) == names


def test_wrapper_names_inside_and_the_models_own_names():
    assert plain_names(["blocks._orig_mod.0.weight", "head.weight"]) == ["blocks.0.weight", "head.weight"]
    own = ["module.weight", "head.weight"]
    assert plain_names(own) == own
    assert plain_names(["a._orig_mod.weight", "a.weight"]) == ["a._orig_mod.weight", "a.weight"]
    assert plain_names([]) == []


@pytest.mark.parametrize("name", WRAPPERS)
def test_unwrapped(name):
    model = small()
    wrapped = WRAPPERS[name](model)
    assert unwrap(wrapped) is model and unwrap(model) is model
    assert exchanges(wrapped) == ("ddp" in name) and not exchanges(model)


@pytest.mark.parametrize("name", WRAPPERS)
def test_optimizer_and_averages_resume_with_and_without_the_wrapper(name):
    def trained(model: nn.Module, steps: range, state: tuple | None = None) -> tuple[list[Tensor], tuple]:
        optimizer, ema = Muon(model, lr=0.1), EMA(model, (0.1,))
        if state is not None:
            optimizer.load_state_dict(state[0])
            ema.load_state_dict(state[1])
        assert optimizer.routing()["muon"] == ["0.weight", "2.weight"]
        assert list(ema.weights(0.1)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        for step in steps:
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
            ema.update(8)
        moved = [p.detach().clone() for p in model.parameters()]
        return [*moved, *ema.weights(0.1).values()], copy.deepcopy((optimizer.state_dict(), ema.state_dict()))

    straight, _ = trained(small(), range(4))
    for first, second in ((WRAPPERS[name], lambda m: m), (lambda m: m, WRAPPERS[name])):
        model = small()
        _, state = trained(first(model), range(2))
        found, _ = trained(second(model), range(2, 4), state)
        assert all(map(torch.equal, found, straight))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_states_saved_with_wrapper_names(prefix):
    """Wrapper prefixes in saved names are ignored."""
    model = small()
    optimizer, ema = Muon(model, lr=0.1), EMA(model, (0.1,))
    saved, averages = optimizer.state_dict(), ema.state_dict()
    for group in saved["param_groups"]:
        group["param_names"] = [prefix + n for n in group["param_names"]]
    averages["copies"] = [{prefix + n: w + 1 for n, w in c.items()} for c in averages["copies"]]
    optimizer.load_state_dict(saved)
    ema.load_state_dict(averages)
    assert torch.equal(ema.weights(0.1)["0.bias"], model[0].bias + 1)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "2.weight"]


@pytest.mark.parametrize("net", ["", "net."])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("v_head", [True, False])
def test_checkpoints_of_wrapped_models_load(tmp_path, prefix, net, v_head):
    model = pmf.create_model("digits")
    file = tmp_path / "weights.pth"
    theirs = models.from_official({prefix + net + k: x for k, x in model.state_dict().items()})
    assert all(torch.equal(theirs[name], p) for name, p in model.named_parameters())
    torch.save({prefix + net + name: x for name, x in model.state_dict().items()}, file)
    loaded = pmf.load_checkpoint(file, v_head=v_head)
    expected = dict(model.named_parameters())
    for name, p in loaded.named_parameters():
        assert torch.equal(p, expected[name])


@pytest.mark.parametrize("name", WRAPPERS)
def test_weights_go_into_wrapped_models(name):
    model, other = small(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    assign_weights(WRAPPERS[name](other), WRAPPERS[name](model).state_dict(), Path("file"))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    with pytest.raises(UserError, match=r"lacks '2.bias'"):
        assign_weights(
            other, {"module." + n: p for n, p in model.named_parameters() if n != "2.bias"}, Path("file")
        )


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_objective_and_the_sampler_take_wrapped_models(name):
    """The wrapped model's numbers, gradients and images equal the model's."""
    model = digits()
    wrapped = WRAPPERS[name](copy.deepcopy(model))
    objective = pmf.flow.Objective(noise_scale=model.config.noise_scale)
    images, labels = torch.rand(6, 1, 8, 8) * 2 - 1, torch.randint(10, (6,))
    draws = objective.draw(images, labels, torch.Generator().manual_seed(0))
    for each in (model, wrapped):
        objective(each, images, labels, draws).loss.backward()
    for p, q in zip(model.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
    for precision in ("fp32", "bf16"):
        noise = torch.randn(3, 1, 8, 8)
        found, expected = (
            pmf.sample(m, [0, 1, 2], noise=noise, precision=precision) for m in (wrapped, model)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_data_parallel_on_several_devices_is_refused():
    """It would send the tangents of the first samples to copies that hold other samples."""
    model = nn.DataParallel(digits())
    model.device_ids = [0, 1]
    objective = pmf.flow.Objective(noise_scale=model.module.config.noise_scale)
    images, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="DataParallel on 2 devices.*use DistributedDataParallel"):
        objective(model, images, labels, objective.draw(images, labels))
    with pytest.raises(TypeError, match="DataParallel on 2 devices"):
        pmf.sample(model, [0, 1])


@pytest.mark.filterwarnings("ignore:.*FSDP.*", "ignore:.*NO_SHARD.*")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flattened_parameters_are_refused(use_orig_params):
    """FSDP1's parameters are pieces of one vector: Muon would mistake a piece of a matrix for a bias."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = digits()
    objective = pmf.flow.Objective(noise_scale=model.config.noise_scale)
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    images, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    attempts = {
        "Muon": lambda: Muon(wrapped),
        "Muon of pairs": lambda: Muon(wrapped.named_parameters()),
        "EMA": lambda: EMA(wrapped),
        "objective": lambda: objective(wrapped, images, labels, objective.draw(images, labels)),
        "sample": lambda: pmf.sample(wrapped, [0, 1]),
        "sample, compiled": lambda: pmf.sample(compiled(wrapped), [0, 1]),
    }
    for name, attempt in attempts.items():
        with pytest.raises(TypeError, match=r"FullyShardedDataParallel \(FSDP1\).*fully_shard"):
            pytest.fail(f"{name} took it: {attempt()}")


def test_a_model_with_compiled_blocks():
    model = digits()
    other = copy.deepcopy(model)
    for i, block in enumerate(other.u_head):
        other.u_head[i] = compiled(block)
    noise = torch.randn(2, 1, 8, 8)
    found, expected = (pmf.sample(m, [0, 1], noise=noise, precision="bf16") for m in (other, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert Muon(other).routing() == Muon(model).routing()
