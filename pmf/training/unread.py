"""Settings that have no effect because another one switches off what reads them."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from pmf.errors import UserError
from pmf.perceptual.losses import FEATURE_NETWORKS, LPIPS_NETWORKS
from pmf.training.config import TrainConfig, flag


class _Unread(NamedTuple):
    """Settings that nothing reads if another one, the switch, is off; and that case in words."""

    names: tuple[str, ...]
    switch: str
    is_off: Callable[[TrainConfig], bool]
    when: str


_UNREAD = (
    _Unread(
        ("max_omega", "omega_beta", "sample_interval"),
        "guidance",
        lambda c: not c.objective.guidance,
        "with --no-guidance",
    ),
    _Unread(
        ("sigma_data",),
        "preconditioner",
        lambda c: c.model.preconditioner in (None, "none"),
        "without a --preconditioner",
    ),
    _Unread(("data_proportion",), "times", lambda c: c.objective.times != "plane", "with --times r=t or r=0"),
    _Unread(("norm_eps",), "norm_p", lambda c: c.objective.norm_p == 0, "with --norm-p 0"),
    _Unread(
        ("perceptual_max_t", "perceptual_size"),
        "perceptual",
        lambda c: c.objective.perceptual == "none",
        "with --perceptual none",
    ),
    _Unread(
        ("lpips_lambda",),
        "perceptual",
        lambda c: c.objective.perceptual not in LPIPS_NETWORKS,
        "without LPIPS in --perceptual",
    ),
    _Unread(
        ("convnext_lambda",),
        "perceptual",
        lambda c: c.objective.perceptual not in FEATURE_NETWORKS,
        "without ConvNeXt or lite0 in --perceptual",
    ),
    _Unread(
        ("lr",),
        "adam_lr",
        lambda c: c.optimizer.main_rate == "adam_lr",
        "with --optimizer adam and an --adam-lr",
    ),
    _Unread(("ema_half_lives", "sample_ema"), "ema", lambda c: not c.optimizer.ema, "with --no-ema"),
    _Unread(
        ("evaluate_features", "evaluate_weights", "evaluate_images"),
        "evaluate_every",
        lambda c: c.evaluation.evaluate_every is None,
        "without --evaluate-every",
    ),
)


def refuse_unread(config: TrainConfig, given: Collection[str], replaced: Collection[str] = ()) -> None:
    """UserError for the first of the given settings that has no effect.

    given: names that the user set for this run; presets and saved runs may hold values that wait for their
    switch. replaced: names set by what takes precedence: a flag may switch off what a file sets.
    """
    for name in given:
        if (why := why_unread(config, name, replaced)) is not None:
            raise UserError(f"{why}: leave it out, or change that")


def why_unread(config: TrainConfig, name: str, replaced: Collection[str] = ()) -> str | None:
    """Why a setting has no effect, as the beginning of a sentence; None if something reads it."""
    for names, switch, is_off, when in _UNREAD:
        if name in names and switch not in replaced and is_off(config):
            return f"{flag(name)} has no effect {when}"
    return None
