"""The ops: the location of each one's parts, and small inputs for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pmf.check.cases import Form

# Where an op lives, by layer; `{}` is its stem. A part in ABSENT does not exist, for the reason given.
PARTS = (
    "pmf/reference/{}.py",
    "pmf/ops/{}.py",
    "csrc/include/pmf/{}.h",
    "csrc/cpu/*/{}.cpp",
    "csrc/ops/{}.cpp",
    "csrc/cuda/*/{}.cu",
    "tests/ops/test_{}.py",
    "pmf/bench/{}.py",
    "benchmarks/bench_{}.py",
)
STEMS = (
    "attention",
    "gated_residual",
    "newton_schulz",
    "patch_embed",
    "patch_velocity",
    "rms_norm",
    "rotary_qk_norm",
    "swiglu",
)
VARIANTS = {"attention_varlen": "attention"}
"""Public ops that run another op's kernels with additional arguments: name -> that op."""
GEMM = "its CPU work is torch's GEMM, called from csrc/ops"
TWO_FILES = "forward and backward are a kernel file each"
ABSENT = {
    **{("csrc/cpu/*/{}.cpp", stem): GEMM for stem in ("newton_schulz", "patch_embed")},
    ("csrc/cpu/*/{}.cpp", "attention"): TWO_FILES,
    ("csrc/cuda/*/{}.cu", "attention"): TWO_FILES,
}


@dataclass(frozen=True)
class Case(Form):
    """An op with inputs: `args`, in float64."""

    args: tuple[Tensor, ...] = ()

    def directions(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(
            torch.randn(self.args[i].shape, generator=generator, dtype=torch.float64) for i in self.tangents
        )


def _cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    angles, mask = r(3, 2), torch.rand(4, 5, generator=generator) > 0.3
    mask[1] = False
    cases = (
        Case("swiglu", (0, 1), args=(r(2, 2, 3), r(2, 2, 3))),
        Case("rms_norm", (0, 1), args=(r(2, 2, 3), r(3))),
        Case("gated_residual", (0, 1, 2), args=(r(2, 2, 3), r(2, 2, 3), r(3))),
        Case(
            "rotary_qk_norm",
            (0, 1),
            args=(r(2, 2, 4, 4), r(2, 1, 4, 4), r(4), r(4), angles.cos(), angles.sin()),
        ),
        Case(
            "patch_embed",
            (0, 6),
            "gemm",
            args=(r(2, 2, 4, 4), r(3, 2, 2, 2), r(3), r(2, 3), r(2), r(5, 2), r(2, 1, 2)),
        ),
        Case(
            "patch_velocity",
            (0, 1),
            weave=lambda args, tangents: (*args, *tangents, None),
            args=(r(2, 4, 8), r(2, 2, 4, 4), torch.tensor([0.3, 0.7]).double()),
        ),
        Case(
            "attention",
            (0, 1, 2),
            "attention gradient",
            {"attn_mask": mask, "enable_gqa": True},
            args=(r(2, 2, 4, 3), r(2, 1, 5, 3), r(2, 1, 5, 2)),
        ),
    )
    return {case.name: case for case in cases}


CASES = _cases()
