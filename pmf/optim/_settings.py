"""The optimizer's settings: presets, which algorithm reads which, and validation."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pmf.arguments import are_numbers, as_plain, require_number
from pmf.ops.newton_schulz import DTYPES, METHODS
from pmf.reference.newton_schulz import step_coefficients

from ._matrices import SCALES, check_layouts

__all__ = [
    "ITERATION",
    "LAYOUT",
    "MUON_PRESETS",
    "check",
    "check_keys",
    "check_read",
    "dtype_name",
    "plain_counts",
    "reads",
]

MUON_PRESETS: dict[str, dict[str, Any]] = {
    "pmf": {
        "momentum": 0.95,
        "nesterov": True,
        "bias_correction": True,
        "scale": "spectral",
        "weight_decay": 0.0,
        "compute_dtype": None,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "adam_nesterov": True,
    },
    "torch": {
        "momentum": 0.95,
        "nesterov": True,
        "bias_correction": False,
        "scale": "spectral",
        "weight_decay": 0.1,
        "compute_dtype": "bfloat16",
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "adam_nesterov": False,
    },
}
MUON_PRESETS["moonlight"] = {**MUON_PRESETS["torch"], "scale": "match_rms"}

LAYOUT = {"split_sizes": None, "num_heads": None, "flatten": False}
"""Settings that define a group's matrices: not tuned numbers, so a saved state does not change them."""

ITERATION = {"ns_steps": 5, "ns_coefficients": "quintic", "ns_method": "auto"}
"""Newton-Schulz's settings, the same in every preset."""

_MUON = ("momentum", "nesterov", "bias_correction", "scale", "compute_dtype")
_READ = {"muon": {*_MUON, *ITERATION, *LAYOUT}, "adam": {"betas", "eps", "adam_nesterov"}}
_BOTH = {"lr", "weight_decay"}
_NOT_SETTINGS = {"params", "param_names", "algorithm"}
_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
"""Entries that torch.optim's schedulers add to a group."""


def check_keys(group: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown key of a group."""
    known = set.union(*_READ.values(), _BOTH)
    for key in group:
        if key not in known | _NOT_SETTINGS | _SCHEDULERS:
            near = difflib.get_close_matches(str(key), known, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise ValueError(f"Muon: a group has no setting {key!r}: {meant}")


def check_read(group: Mapping[str, Any], algorithms: Iterable[str], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that none of the group's algorithms reads.

    A setting equal to its default is allowed: groups are copied with all their settings.
    """
    algorithms = sorted(set(algorithms))
    for key, value in group.items():
        if not any(reads(algorithm, key) for algorithm in algorithms) and value != defaults[key]:
            raise ValueError(
                f"Muon: {key} is set for parameters that all use {' and '.join(algorithms)}, which does not "
                "read it: leave it out, or give their group another algorithm"
            )


def reads(algorithm: str, key: str) -> bool:
    """Whether a group with this algorithm uses this key."""
    return not any(key in keys for other, keys in _READ.items() if other != algorithm)


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """A dtype as a string, so that saved settings can be read without unpickling."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def plain_counts(given: Any) -> Any:
    """split_sizes or num_heads in Python's numbers, which a saved state can hold; a list stays one."""
    return list(as_plain(given)) if isinstance(given, list) else as_plain(given)


def check(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting out of range, or for parameters that do not fit it."""
    for name, words in (("lr", "the learning rate"), ("weight_decay", "weight_decay")):
        value = group[name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"Muon: {words} must be one number, got shape {list(value.shape)}")
            if value.device.type != "cpu":
                continue  # reading it would wait for the device and end a capture
            value = value.item()
        require_number(f"Muon: {words}", value, at_least=0)
    require_number("Muon: eps", group["eps"], at_least=0)
    betas = group["betas"]
    if not are_numbers(betas) or len(betas) != 2:
        raise ValueError(f"Muon: betas must be two numbers, got {betas!r}")
    for name, value in (("momentum", group["momentum"]), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        require_number(f"Muon: {name}", value, at_least=0, below=1)
    for name in ("nesterov", "bias_correction", "adam_nesterov"):
        if not isinstance(group[name], bool):
            raise ValueError(f"Muon: {name} must be True or False, got {group[name]!r}")
    if group["scale"] not in SCALES:
        raise ValueError(f"Muon: scale must be one of {', '.join(SCALES)}, got {group['scale']!r}")
    if group["ns_method"] not in METHODS:
        raise ValueError(f"Muon: ns_method must be one of {', '.join(METHODS)}, got {group['ns_method']!r}")
    if group["compute_dtype"] not in (None, *map(dtype_name, DTYPES)):
        raise ValueError(f"Muon: compute_dtype must be a floating dtype, got {group['compute_dtype']}")
    step_coefficients(group["ns_steps"], group["ns_coefficients"])
    if group.get("algorithm") == "muon":
        check_layouts(group)
