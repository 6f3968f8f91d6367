"""Settings: their ranges, their JSON round trip, and presets."""

import json
from pathlib import Path

import pytest

from pmf import models
from pmf.errors import UserError
from pmf.evaluation import SPACES
from pmf.flow import LineTimes, NoGuidance
from pmf.training import PRESETS, TrainConfig, get_preset, quick
from pmf.training.building import build_objective, build_optimizer, model_config
from pmf.training.config import DataSettings, OptimizerSettings, RunSettings, settings
from pmf.training.folders import new_run_folder
from pmf.training.loop import learning_rate_factor


def test_names_are_unique_across_groups() -> None:
    names = [setting.name for _, setting in settings()]
    assert len(names) == len(set(names))


def test_training_offers_every_feature_space() -> None:
    """A lower layer than evaluation, it has a list of its own."""
    (setting,) = (setting for _, setting in settings() if setting.name == "evaluate_features")
    assert setting.metadata["choices"] == SPACES


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json_and_builds_its_parts(name: str) -> None:
    # Without the weights of the perceptual losses, which this machine may lack.
    config = get_preset(name, seed=3, sample_interval=(0.25, 0.5), perceptual="none")
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    network = model_config(config, num_classes=1000)
    assert network.num_classes == 1000 and network.sample_interval == (0.25, 0.5)
    assert build_objective(config, network.noise_scale).noise_scale == network.noise_scale


def test_paper_presets_hold_the_paper_recipe() -> None:
    for name in (name for name in models.CONFIGS if name.startswith("pmf-")):
        config = PRESETS[name]
        assert (config.data.batch_size, config.optimizer.lr) == (1024, 1e-3)
        assert config.optimizer.ema_half_lives == (500, 1000, 2000)
        assert config.objective.omega_beta == (2.0 if name == "pmf-l/16" else 1.0)
        assert config.objective.uniform_fraction == (0.1 if "-h/" in name else 0.0)
        centred = name in ("pmf-l/32", "pmf-h/16", "pmf-h/32")
        assert config.objective.time_mean == (0.0 if centred else 0.8)
        assert config.objective.perceptual_max_t == (0.6 if centred else 0.8)
        assert (config.objective.perceptual, config.objective.perceptual_size) == ("both", 224)
        assert (config.objective.lpips_lambda, config.objective.convnext_lambda) == (0.4, 0.1)


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("lr", float("nan"), "--lr must be a finite number, got nan"),
        ("lr", float("inf"), "--lr must be a finite number, got inf"),
        ("lr", -1.0, "--lr must be above 0"),
        ("adam_lr", 0.0, "--adam-lr must be above 0"),
        ("batch_size", 0, "--batch-size must be 1 or more"),
        ("minutes", 0.0, "--minutes must be above 0"),
        ("cooldown", 1.5, "--cooldown must lie between 0 and 1"),
        ("class_dropout", -0.1, "--class-dropout must lie between"),
        ("perceptual", "vgg", "--perceptual must be none, lpips, convnext"),
        ("perceptual_max_t", 1.1, "--perceptual-max-t must lie between 0 and 1"),
        ("perceptual_size", 16, "--perceptual-size must be 32 or more"),
        ("lpips_lambda", -1.0, "--lpips-lambda must be 0 or more"),
        ("max_omega", 0.5, "--max-omega must be 1 or more"),
        ("sample_omega", 0.9, "--sample-omega must be 1 or more"),
        ("ema_half_lives", (5.0, 5.0), "--ema-half-lives must be distinct"),
        ("ema_half_lives", (1000.001, 1000.002), "distinct numbers above 0, also when rounded to six digits"),
        ("sample_ema", 7.0, "--sample-ema must be one of"),
        ("sample_interval", (0.9, 0.1), "--sample-interval"),
        ("precision", "fp8", "--precision"),
        ("compile", "yes", "--compile must be true or false, got 'yes'"),
        ("checkpointing", "all", "--checkpointing must be none or blocks, got 'all'"),
        ("row_multiple", 0, "--row-multiple must be 1 or more"),
        ("prediction", "eps", "--prediction must be x or u, got 'eps'"),
        ("preconditioner", "ddpm", "--preconditioner must be none, edm or scm, got 'ddpm'"),
        ("sigma_data", 0.0, "--sigma-data must be above 0"),
        ("times", "r=1", "--times must be plane, r=t or r=0, got 'r=1'"),
        ("optimizer", "sgd", "--optimizer must be muon or adam, got 'sgd'"),
        ("guidance", 1.0, "--guidance must be true or false, got 1.0"),
        ("v_head", None, "--v-head must be true or false, got None"),
        ("seed", -1, "--seed"),
        ("learning_rate", 1.0, "there is no setting 'learning_rate'"),
    ],
)
def test_settings_out_of_range_are_named(setting: str, value: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        get_preset("digits", **{setting: value})


def test_values_of_another_type_are_named_in_python_too() -> None:
    """They were a TypeError of a comparison, or were found in the middle of the first step."""
    with pytest.raises(UserError, match="--steps must be a whole number or empty, got '5'"):
        TrainConfig(run=RunSettings(steps="5"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--batch-size must be a whole number, got 8.0"):
        TrainConfig(data=DataSettings(batch_size=8.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model": "pmf-z/9"}, "no model preset 'pmf-z/9'"),
        ({"patch_size": 3}, "not a multiple of patch_size"),
        ({"num_heads": 7}, "num_heads"),
        ({"condition_tokens": (1, 1)}, "condition_tokens"),
        ({"prediction": "u", "preconditioner": "edm"}, "--preconditioner edm turns .* leave out one"),
        (
            {"guidance": False, "sample_omega": 2.0},
            "--no-guidance trains at omega 1 only",
        ),
    ],
)
def test_impossible_networks_are_named(overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        model_config(get_preset("digits", **overrides), num_classes=10)


def test_config_of_another_version_says_what_it_lacks() -> None:
    content = PRESETS["digits"].to_json()
    del content["optimizer"]["lr"]
    with pytest.raises(UserError, match=r"lacks optimizer\.lr"):
        TrainConfig.from_json(content)


def test_every_switch_reaches_its_part() -> None:
    switches = {
        "prediction": "u",
        "v_head": False,
        "times": "r=0",
        "guidance": False,
        "optimizer": "adam",
        "norm_p": 0.5,
        "ema": False,
        "sample_omega": None,
    }
    config = get_preset("digits", **switches)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    network = model_config(config, num_classes=10)
    assert (network.prediction, network.v_head) == ("u", False)
    assert (network.sample_omega, network.sample_interval) == (1.0, (0.0, 1.0))
    objective = build_objective(config, network.noise_scale)
    assert isinstance(objective.times, LineTimes) and objective.times.line == "r=0"
    assert isinstance(objective.guidance, NoGuidance)
    assert (objective.v_head, objective.norm_p) == (False, 0.5)
    optimizer = build_optimizer(config, models.PixelMeanFlow(network))
    assert not optimizer.routing()["muon"]
    scaled = model_config(get_preset("digits", preconditioner="scm", sigma_data=0.25), num_classes=10)
    assert (scaled.preconditioner, scaled.sigma_data) == ("scm", 0.25)


def test_learning_rate_falls_over_the_last_fraction_of_the_run() -> None:
    cooling = OptimizerSettings(cooldown=0.25)
    factors = [learning_rate_factor(cooling, 9, spent) for spent in (0.0, 0.5, 0.75, 0.875, 1.0, 1.01)]
    assert factors == [1, 1, 1, 0.5, 0, 0]
    assert learning_rate_factor(OptimizerSettings(), 9, 1.0) == 1


def test_run_folders_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "runs" / "00007-old").mkdir(parents=True)
    (tmp_path / "runs" / "notes-here").mkdir()
    assert new_run_folder(tmp_path / "runs", "pmf-b/16").name == "00008-pmf-b-16"
    assert new_run_folder(tmp_path / "runs", "digits").name == "00009-digits"


def test_quick_shrinks_only_the_network_and_the_steps() -> None:
    config = get_preset("pmf-b/16", accumulate=2, lr=3e-4, minutes=5.0)
    small = quick(config, ranks=2)
    assert (small.run.steps, small.run.minutes, small.data.batch_size) == (2, None, 32)
    network = model_config(small, 10)
    assert (network.hidden_size, network.depth, network.image_size, network.patch_size) == (32, 2, 256, 16)
    same = ("image_size", "accumulate", "lr", "parallel", "times", "prediction")
    flat = [
        {name: v for group in c.to_json().values() if isinstance(group, dict) for name, v in group.items()}
        for c in (config, small)
    ]
    assert [flat[0][name] for name in same] == [flat[1][name] for name in same]
    assert quick(get_preset("digits", batch_size=4)).data.batch_size == 4


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("keep_checkpoints", 2.5, "a whole number"),
        ("lr", True, "a finite number"),
        ("lr", None, "a finite number"),
        ("data", 2024, "text"),
        ("minutes", "four", "a finite number or empty"),
        ("condition_tokens", 3, "a list of whole numbers or empty"),
        ("ema_half_lives", (1.0, "b"), "a list of finite numbers"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_setting(name, value, words):
    """lr: true trained at rate 1.0, and keeping half a checkpoint failed only when saving."""
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be {words}, got "):
        get_preset("digits", **{name: value})
