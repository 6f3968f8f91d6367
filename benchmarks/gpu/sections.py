"""The sections of a run, each with a time limit. Their sum limits the run."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from peers import published
from torch import Tensor

from pmf.bench import BENCHMARKS, attention, muon, newton_schulz, pairs, patch_embed
from pmf.bench.harness import Planned, Scale, Setting

from . import capture, commands, network, sums

Cases = Callable[[Setting], Iterator[Planned]]
PUBLISHED = "published peers"
OTHERS = ("attention", "attention_packed", "patch_embed", "newton_schulz", "muon")
"""Timed in separate sections, or not at all on a GPU."""
ELEMENTWISE = tuple(name for name in BENCHMARKS if name not in OTHERS)


class Limits(NamedTuple):
    """Seconds: for the whole section, and for the timing of one case."""

    section: float
    case: float


class Section(NamedTuple):
    """Cases, with time limits for full and quick runs."""

    name: str
    cases: Cases
    full: Limits
    quick: Limits

    def limits(self, scale: Scale) -> Limits:
        """On the CPU those of a full run, but each case is timed for only the minimum number of rounds."""
        if scale == "quick":
            return self.quick
        return self.full if scale == "full" else self.full._replace(case=0.0)


def rates(setting: Setting) -> Iterator[Planned]:
    """The device's limits; results are reported as fractions of them."""
    yield pairs.copy_case(setting, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield attention.gemm(setting, dtype)


def _without(op: str, cases: Iterator[Planned]) -> Iterator[Planned]:
    return (planned for planned in cases if planned.facts.get("op") != op)


def attention_cases(setting: Setting) -> Iterator[Planned]:
    """Torch's backends and the Triton baseline, which is correct at every length."""
    jvp_peers: dict[str, attention.Jvp] = {}
    if setting.device.device.type == "cuda":
        jvp_peers["Triton baseline"] = triton_baseline
    return _without("gemm", attention.cases(setting, jvp_peers))


def triton_baseline(primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    from peers.attention_jvp import attention_jvp

    return attention_jvp(*primals, *tangents)


def elementwise_cases(setting: Setting) -> Iterator[Planned]:
    for name in ELEMENTWISE:
        module = importlib.import_module(f"pmf.bench.{name}")
        for planned in _without("copy", module.cases(setting)):
            yield dataclasses.replace(planned, label=f"{name} {planned.label}")


def patch_embed_cases(setting: Setting) -> Iterator[Planned]:
    return _without("gemm", patch_embed.cases(setting))


def newton_schulz_cases(setting: Setting) -> Iterator[Planned]:
    return _without("gemm", newton_schulz.cases(setting))


def published_cases(setting: Setting) -> Iterator[Planned]:
    """Against the published packages that are installed; some compile for long."""
    if published.is_installed("gram_newton_schulz"):
        made = functools.cache(published.gram_newton_schulz)
        peers = {"gram-newton-schulz": lambda matrices: made()(matrices)}
        yield from _without("gemm", newton_schulz.cases(setting, peers))
    if published.is_installed("jvp_flash_attention"):
        jvp_peers = {"jvp-flash-attention": published.jvp_flash_attention}
        for planned in attention.cases(setting, jvp_peers):
            if planned.facts["op"] == "attention forward + JVP":
                yield planned


PARTS: tuple[Section | commands.Command, ...] = (
    commands.CHECKS,
    commands.TESTS,
    Section("mma sums", sums.cases, Limits(10, 0), Limits(5, 0)),
    Section("rates", rates, Limits(20, 1.0), Limits(8, 0.3)),
    commands.RATES,
    Section("attention", attention_cases, Limits(300, 3.0), Limits(28, 0.5)),
    *commands.PROFILES,
    Section(PUBLISHED, published_cases, Limits(100, 1.0), Limits(0, 0)),
    commands.TUNE,
    Section("muon", muon.cases, Limits(90, 6), Limits(8, 1)),
    Section("graph capture", capture.cases, Limits(20, 2), Limits(5, 0.5)),
    commands.RACES,
    Section("training step", network.training_cases, Limits(55, 12), Limits(24, 3)),
    Section("sampling", network.sampling_cases, Limits(25, 4), Limits(10, 1.5)),
    Section("newton_schulz", newton_schulz_cases, Limits(30, 1), Limits(5, 0.5)),
    Section("elementwise", elementwise_cases, Limits(45, 0.4), Limits(8, 0.15)),
    Section("patch_embed", patch_embed_cases, Limits(15, 0.6), Limits(4, 0.3)),
)
"""In this order: correctness, rates of the machine, attention and its peers, competing plans, the optimizer,
everything else. Quick runs omit what takes too long."""
SECTIONS = tuple(part for part in PARTS if isinstance(part, Section))
