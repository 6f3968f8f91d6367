"""Built-in sets of variants, with the paper's claims about their order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmf.ablation.study import CLASSIFIER
from pmf.ablation.variants import Variant

__all__ = ["SUITES", "Growth", "Ordering", "Suite"]


@dataclass(frozen=True)
class Ordering:
    """A claim that one variant is better than another."""

    claim: str
    better: str
    worse: str


@dataclass(frozen=True)
class Growth:
    """A claim that the distance ratio of each pair (second over first) grows along the pairs."""

    claim: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Suite:
    """Variants of a training preset, the base first, and claims about them."""

    preset: str
    settings: Mapping[str, Any]
    """The base's changes to its preset."""
    variants: tuple[Variant, ...]
    orderings: tuple[Ordering | Growth, ...]
    features: str = CLASSIFIER
    """The feature space that judges."""


def _paper(
    preset: str,
    patches: Sequence[int],
    adam_rates: Sequence[float],
    perceptual: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Suite:
    """The ablations of arXiv 2601.22158; `patches` ascend, and the base uses the largest."""
    *smaller, largest = patches
    base, u = f"x patch {largest}", f"u patch {largest}"
    variants = [Variant(base), Variant(u, {"prediction": "u"})]
    orderings: list[Ordering | Growth] = [Ordering(f"x before u, patch {largest}", base, u)]
    for patch in reversed(smaller):
        x_small, u_small = f"x patch {patch}", f"u patch {patch}"
        variants += [
            Variant(x_small, {"patch_size": patch}),
            Variant(u_small, {"patch_size": patch, "prediction": "u"}),
        ]
        orderings.append(Ordering(f"x before u, patch {patch}", x_small, u_small))
    pairs = tuple((f"x patch {patch}", f"u patch {patch}") for patch in patches)
    orderings.append(Growth("the more so the larger the patch", pairs))

    others = [
        *(
            (
                f"Muon before Adam at {rate:g}, equal steps",
                Variant(f"Adam {rate:g}", {"optimizer": "adam", "adam_lr": rate}),
            )
            for rate in adam_rates
        ),
        ("the plane before r=t", Variant("r=t", {"times": "r=t"})),
        ("the plane before r=0", Variant("r=0", {"times": "r=0"})),
        ("plain before EDM's pre-conditioner", Variant("EDM", {"preconditioner": "edm"})),
        ("plain before sCM's pre-conditioner", Variant("sCM", {"preconditioner": "scm"})),
        ("averaged weights before the last", Variant("no EMA", {"ema": False})),
        ("a v head before none", Variant("no v head", {"v_head": False})),
        ("norm_p 1 before 0", Variant("norm_p 0", {"norm_p": 0.0})),
    ]
    for claim, variant in others:
        variants.append(variant)
        orderings.append(Ordering(claim, base, variant.name))
    if perceptual is not None:
        for name, settings_of in (
            ("perceptual", perceptual),
            ("perceptual, all t", {**perceptual, "perceptual_max_t": 1.0}),
        ):
            variants.append(Variant(name, settings_of))
            orderings.append(Ordering(f"a perceptual loss before none ({name})", name, base))
    variants.append(Variant("guided", {"max_omega": 4.0, "sample_omega": 2.0}))
    variants.append(Variant("no guidance", {"guidance": False, "sample_omega": None}))
    orderings.append(Ordering("guidance before none", "guided", "no guidance"))
    return Suite(preset, settings or {}, tuple(variants), tuple(orderings))


_OFFLINE = ("stlpips-vgg", "lite0", "offline-vgg")  # judged by a network that is in none of them

# The preset's network would spend most of a study's hours; so would perceptual networks on larger crops.
_SMALLER_EMOJI = {
    "perceptual": "none",
    "minutes": None,
    "steps": 600,
    "batch_size": 64,
    "patch_size": 8,
    "hidden_size": 192,
    "num_heads": 3,
    "depth": 4,
    "head_depth": 2,
    "mlp_width": 512,
    "precision": "bf16",
}

SUITES: dict[str, Suite] = {
    "paper": _paper(
        "fashion",
        (4, 7, 14),
        (1e-3, 2e-3, 5e-3, 1e-2),
        perceptual={"perceptual": "stlpips", "perceptual_size": 32},
    ),
    "digits": _paper(
        "digits", (2, 4, 8), (1e-3, 3e-3, 7e-3), settings={"patch_size": 8, "steps": 1000, "minutes": None}
    ),
    "perceptual": Suite(
        "emoji",
        _SMALLER_EMOJI,
        (
            Variant("none"),
            *(Variant(name, {"perceptual": name, "perceptual_size": 32}) for name in _OFFLINE),
        ),
        tuple(Ordering(f"{name} before no perceptual loss", name, "none") for name in _OFFLINE),
        features="alexnet",
    ),
}
"""Suites by name. Adam is run at several learning rates, Muon at its preset's only."""
