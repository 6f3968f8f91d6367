"""Which kernels run: ``PMF_KERNELS=auto | reference | reference:attention,newton_schulz``.

A reference in plain PyTorch can replace each kernel, on every device and with all derivatives: slower, for
machines on which a kernel is wrong. The variable is read once, when pmf is imported.
"""

import os

from pmf.errors import UserError

NAMES = (
    "attention",
    "ema",
    "gated_residual",
    "muon",
    "newton_schulz",
    "patch_embed",
    "patch_velocity",
    "product",
    "rms_norm",
    "rotary_qk_norm",
    "swiglu",
)
"""Every op (attention_varlen is attention's kernel), the optimizer's steps, and the layers' products."""


def parse(text: str) -> frozenset[str]:
    """The names that use their references. Raises UserError for an unknown mode or name."""
    mode, colon, names = text.partition(":")
    mode = mode.strip()
    if mode in ("", "auto") and not colon:
        return frozenset()
    if mode != "reference":
        raise UserError(
            f"PMF_KERNELS={text} is not a choice of kernels: use auto, reference, or reference: followed by "
            f"names of {', '.join(NAMES)}"
        )
    if not colon:
        return frozenset(NAMES)
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in NAMES:
            raise UserError(
                f"PMF_KERNELS={text} names {name!r}, which has no kernels of its own: choose from "
                f"{', '.join(NAMES)}"
            )
    return frozenset(asked)


def problem() -> str | None:
    """What is wrong with PMF_KERNELS, in one sentence; None if nothing is."""
    return _problem


def uses_reference(name: str) -> bool:
    """Whether an op of `NAMES` uses its reference. Raises UserError if PMF_KERNELS is invalid."""
    if _problem is not None:
        raise UserError(_problem)
    return name in _references


def references() -> frozenset[str]:
    """The names that use their references."""
    return _references


def choose(text: str) -> None:
    """Set PMF_KERNELS's choice for the whole process from now on. Compiled code keeps the old choice."""
    global _references, _problem
    _references, _problem = parse(text), None


_references: frozenset[str] = frozenset()
_problem: str | None = None
try:
    choose(os.environ.get("PMF_KERNELS", "auto"))
except UserError as _error:
    _problem = str(_error)
