"""Presets, initialisation and parameter names."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import Tensor

import pmf
from pmf.models import (
    CONFIGS,
    ModelConfig,
    NetworkOutput,
    PixelMeanFlow,
    config_from_state_dict,
    create_model,
    from_official,
)
from pmf.nn import Condition
from pmf.official import to_official

TINY = ModelConfig(
    num_classes=3, image_size=8, patch_size=4, channels=1, hidden_size=16, depth=3, head_depth=1, num_heads=2
)  # fmt: skip


def condition(config: ModelConfig, batch: int) -> Condition:
    scalars = (torch.full((batch,), value) for value in (0.3, 2.0, 0.1, 0.8))
    return Condition(*scalars, torch.arange(batch) % (config.num_classes + 1))


def to_authors_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint with the authors' names, defined independently of `pmf.official`."""
    theirs = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("condition.")
        for ours, other in (
            ("position", "pos_embed"),
            ("patch_embedding.weight_down", "x_embedder.proj1.weight"),
            ("patch_embedding.bias_down", "x_embedder.proj1.bias"),
            ("patch_embedding.weight_up", "x_embedder.proj2.weight"),
            ("patch_embedding.bias_up", "x_embedder.proj2.bias"),
            ("time_embedder", "h_embedder"),
            ("t_min_embedder", "cfg_t_start_embedder"),
            ("t_max_embedder", "cfg_t_end_embedder"),
            ("linear1.", "mlp.0._flax_linear."),
            ("linear2.", "mlp.2._flax_linear."),
            ("label_embedder.embedding.", "y_embedder.embedding_table._flax_embedding."),
            ("u_head.", "u_heads."),
            ("v_head.", "v_heads."),
            ("_final.linear.", "_final_layer.linear._flax_linear."),
            ("_final.norm.", "_final_layer.norm."),
            ("_proj.weight", "_proj._flax_linear.weight"),
            *((f"mlp.w{i}.weight", f"mlp.w{i}._flax_linear.weight") for i in (1, 2, 3)),
        ):
            name = name.replace(ours, other)
        theirs[name] = tensor[:, :, None, None] if name == "x_embedder.proj2.weight" else tensor
    return theirs


@pytest.mark.parametrize(
    ("preset", "sampling", "training"),
    [
        ("pmf-b/16", 118.2, 175.5),
        ("pmf-b/32", 120.3, 179.3),
        ("pmf-l/16", 410.3, 511.8),
        ("pmf-l/32", 413.0, 516.8),
        ("pmf-h/16", 955.5, 1113.9),
        ("pmf-h/32", 959.1, 1120.4),
        ("pmf-b/64", 128.6, 194.7),
    ],
)
def test_parameter_counts_of_the_paper(preset: str, sampling: float, training: float) -> None:
    with torch.device("meta"):
        model = create_model(preset)
        sampler = create_model(preset, v_head=False)
    assert model.config.num_tokens == 276
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == training
    assert round(sum(p.numel() for p in sampler.parameters()) / 1e6, 1) == sampling


def test_widths_of_the_presets() -> None:
    with torch.device("meta"):
        widths = {
            p: create_model(p).u_head[0].mlp.w1.out_features for p in ("pmf-b/16", "pmf-l/16", "pmf-h/16")
        }
        bottlenecks = {p: len(create_model(p).patch_embedding.bias_down) for p in ("pmf-l/16", "pmf-h/16")}
    assert widths == {"pmf-b/16": 2048, "pmf-l/16": 2730, "pmf-h/16": 3416}
    assert bottlenecks == {"pmf-l/16": 128, "pmf-h/16": 256}


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = create_model(
        num_classes=99, image_size=64, patch_size=8, hidden_size=256, depth=2, head_depth=1, num_heads=4
    )
    hidden, expected = 256, {}
    for name, parameter in model.named_parameters():
        if name.endswith(("_scale", "bias", "bias_down", "bias_up")) or "final.linear" in name:
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif "patch_embedding" in name:
            fans = {"patch_embedding.weight_down": (3 * 64, 128), "patch_embedding.weight_up": (128, hidden)}[
                name
            ]
            bound = (6 / sum(fans)) ** 0.5
            assert bound * 0.99 < parameter.abs().max() <= bound, name
            expected[name] = bound / 3**0.5
        elif "tokens" in name or "label" in name:
            expected[name] = hidden**-0.5
        elif name == "position":
            expected[name] = 0.02
        else:
            scale = 1.0 if "embedder" in name else 0.32
            expected[name] = scale * parameter.shape[1] ** -0.5
    for name, parameter in model.named_parameters():
        if name in expected:
            spread = 5 * expected[name] / (2 * parameter.numel()) ** 0.5
            assert abs(parameter.std().item() - expected[name]) < spread, name


def test_both_heads_predict_zero_at_the_start() -> None:
    model = PixelMeanFlow(TINY)
    out = model(
        torch.randn(2, 1, 8, 8), condition(TINY, 2), torch.randn(1, 1, 8, 8), torch.ones(1), heads="uv"
    )
    assert out.u.shape == out.v.shape == (2, 1, 8, 8)
    assert out.u_t.shape == (1, 1, 8, 8)
    assert not out.u.any() and not out.v.any() and not out.u_t.any()


def test_only_the_requested_heads_are_computed() -> None:
    model, images, given = PixelMeanFlow(TINY), torch.randn(2, 1, 8, 8), condition(TINY, 2)
    for heads, present in (("u", (True, False)), ("v", (False, True)), ("uv", (True, True))):
        out = model(images, given, heads=heads)
        assert (out.u is not None, out.v is not None) == present
        assert out.u_t is None


def test_compiles_as_one_graph_with_the_same_tangents_and_gradients() -> None:
    torch.manual_seed(0)
    model = PixelMeanFlow(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    inputs = torch.randn(3, 1, 8, 8), condition(TINY, 3), torch.randn(2, 1, 8, 8), torch.ones(2)

    def evaluate(function: Callable[..., NetworkOutput]) -> list[Tensor]:
        out = function(*inputs, heads="uv")
        loss = out.u.square().sum() + out.v.square().sum()
        return [*out, *torch.autograd.grad(loss, list(model.parameters()))]

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(evaluate(compiled), evaluate(model), strict=True):
        torch.testing.assert_close(ours, eager)


def test_the_same_seed_gives_the_same_model() -> None:
    def build(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return create_model("digits").state_dict()["u_head.0.mlp.w1.weight"]

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))


def test_rotary_tables_stay_exact_and_follow_the_weights() -> None:
    exact = PixelMeanFlow(TINY)
    half = PixelMeanFlow(TINY).bfloat16()
    assert half.cos.dtype == torch.float32 and torch.equal(half.cos, exact.cos)
    assert PixelMeanFlow(TINY).double().cos.dtype == torch.float64
    assert "cos" not in exact.state_dict()
    with torch.device("meta"):
        empty = PixelMeanFlow(TINY)
    empty.load_state_dict(exact.state_dict(), assign=True)
    assert torch.equal(empty.sin, exact.sin)
    with torch.device("meta"):
        empty = PixelMeanFlow(TINY)
    assert torch.equal(empty.to_empty(device="cpu").cos, exact.cos)


def test_rotary_turns_rows_then_columns() -> None:
    from pmf.nn import rotary_tables

    cos, sin = rotary_tables(3, 8)
    assert cos.shape == sin.shape == (9, 4)
    row, column = 2, 1
    angles = torch.tensor([row, row / 100, column, column / 100])  # theta^(-i / 2) with theta = 10^4
    torch.testing.assert_close(cos[row * 3 + column], angles.cos())
    torch.testing.assert_close(sin[row * 3 + column], angles.sin())


@pytest.mark.parametrize("prefix", ["", "net."])
def test_the_authors_names_load(prefix: str) -> None:
    model = PixelMeanFlow(TINY)
    theirs = {prefix + name: tensor for name, tensor in to_authors_names(model.state_dict()).items()}
    theirs[prefix + "rope_freqs"] = torch.zeros(4)
    renamed = from_official(theirs)
    assert renamed.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(renamed[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("v_head", [True, False])
def test_the_authors_names_round_trip(prefix: str, v_head: bool) -> None:
    theirs = to_authors_names(PixelMeanFlow(replace(TINY, v_head=v_head)).state_dict())
    given = {prefix + name: tensor for name, tensor in theirs.items()}
    again = to_official(from_official(given), prefix)
    assert again.keys() == given.keys()
    for name, tensor in given.items():
        assert again[name].shape == tensor.shape and torch.equal(again[name], tensor), name
    with pytest.raises(ValueError, match="unknown fc"):
        to_official({**from_official(given), "fc": torch.zeros(1)})


def test_our_own_names_load() -> None:
    model = PixelMeanFlow(TINY)
    assert from_official(model.state_dict()).keys() == model.state_dict().keys()


def test_a_checkpoint_without_v_head_samples_and_says_why_it_cannot_train() -> None:
    full = to_authors_names(PixelMeanFlow(TINY).state_dict())
    state_dict = from_official({name: tensor for name, tensor in full.items() if not name.startswith("v_")})
    config = config_from_state_dict(state_dict, noise_scale=1.0)
    assert not config.v_head
    model = PixelMeanFlow(config)
    model.load_state_dict(state_dict)
    images = torch.randn(2, 1, 8, 8)
    assert model(images, condition(config, 2)).u.shape == images.shape
    with pytest.raises(RuntimeError, match="has no v head, so it can sample but not be trained"):
        model(images, condition(config, 2), heads="uv")


@pytest.mark.parametrize("authors", [True, False])
def test_unknown_and_missing_weights_are_named(authors: bool) -> None:
    def rename(name: str) -> str:
        return next(iter(to_authors_names({name: torch.zeros(1, 1)}))) if authors else name

    own = PixelMeanFlow(TINY).state_dict()
    good = to_authors_names(own) if authors else own
    for name in (
        "shared_blocks.0.attn.q_proj.weight",
        "v_final.norm.weight",
        "u_head.0.mlp_scale",
        "position",
    ):
        broken = dict(good)
        del broken[rename(name)]
        with pytest.raises(ValueError, match=f"missing {rename(name)}"):
            from_official(broken)
    with pytest.raises(ValueError, match="unknown u_head.0.attn.bias"):
        from_official({**good, "u_head.0.attn.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing"):
        from_official({})


def test_configuration_is_inferred_from_the_shapes() -> None:
    config = replace(TINY, condition_tokens=(3, 1, 2, 2, 1), bottleneck=24, mlp_width=40, noise_scale=2.0)
    read = config_from_state_dict(to_authors_names(PixelMeanFlow(config).state_dict()), noise_scale=2.0)
    assert read == config
    with pytest.raises(ValueError, match="noise_scale"):
        config_from_state_dict(PixelMeanFlow(config).state_dict())
    with torch.device("meta"):
        authors = to_authors_names(create_model("pmf-h/32").state_dict())
    known = config_from_state_dict(authors)
    preset = CONFIGS["pmf-h/32"]
    assert known == replace(preset, bottleneck=256, mlp_width=3416)


def test_configuration_survives_json() -> None:
    import json

    for config in (*CONFIGS.values(), TINY):
        assert ModelConfig(**json.loads(json.dumps(asdict(config)))) == config
    counted = ModelConfig(  # such as labels.max() + 1
        num_classes=np.int64(10),
        condition_tokens=np.ones(5, int),
        image_size=np.array([32, 64]),
        sample_interval=torch.tensor([0.25, 0.5]),
    )
    assert ModelConfig(**json.loads(json.dumps(asdict(counted)))) == counted
    assert (counted.num_classes, counted.image_size) == (10, (32, 64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 3}, "image_size 8 is not a multiple of patch_size 3"),
        ({"num_heads": 3}, "hidden_size / num_heads must be a multiple of 4, got 16 / 3"),
        ({"num_heads": 8}, "must be a multiple of 4, got 16 / 8"),
        ({"hidden_size": 260, "num_heads": 1}, "must be at most 256, got 260 / 1"),
        ({"mlp_width": 0}, "mlp_width must be at least 1"),
        ({"bottleneck": -1}, "bottleneck must be at least 1"),
        ({"head_depth": 4}, "head_depth 4 exceeds depth 3"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"noise_scale": 0.0}, "noise_scale must be positive"),
        ({"noise_scale": "1"}, "noise_scale must be a finite number, got '1'"),
        ({"num_classes": 2.5}, "num_classes must be a whole number, got 2.5"),
        ({"depth": True}, "depth must be a whole number, got True"),
        ({"v_head": "no"}, "v_head must be true or false, got 'no'"),
        ({"bottleneck": 2.5}, "bottleneck must be a whole number or empty"),
        ({"sample_omega": float("inf")}, "sample_omega must be a finite number"),
        ({"sample_interval": (1,)}, "sample_interval must be 2 finite numbers"),
        ({"condition_tokens": (1, 1, 1, 0, 1)}, "condition_tokens must be five counts"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **settings)


def test_a_model_can_be_copied_and_pickled() -> None:
    model = PixelMeanFlow(TINY)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.load_state_dict(model.state_dict())
        assert twin.config == TINY and torch.equal(twin.cos, model.cos)


def test_the_package_exports_what_others_rely_on() -> None:
    assert pmf.create_model is create_model
    assert pmf.PixelMeanFlow is PixelMeanFlow
    assert pmf.sample is pmf.flow.sampler.sample
    assert {"Objective", "Draws"} <= set(pmf.flow.__all__)


def test_unknown_presets_and_settings_are_named() -> None:
    with pytest.raises(ValueError, match="no preset 'pmf-x/16'; there are pmf-b/16"):
        create_model("pmf-x/16")
    with pytest.raises(TypeError, match="unknown setting width; there are num_classes"):
        create_model("digits", width=3)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = PixelMeanFlow(TINY)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 8, 8\], got \[2, 3, 8, 8\]"):
        model(torch.zeros(2, 3, 8, 8), condition(TINY, 2))
    with pytest.raises(ValueError, match=r"conditions must be \[2\], got \[3, 3, 3, 3, 3\]"):
        model(torch.zeros(2, 1, 8, 8), condition(TINY, 3))
    with pytest.raises(ValueError, match="heads must be"):
        model(torch.zeros(2, 1, 8, 8), condition(TINY, 2), heads="w")
    with pytest.raises(ValueError, match="both tangents"):
        model(torch.zeros(2, 1, 8, 8), condition(TINY, 2), torch.zeros(1, 1, 8, 8))
