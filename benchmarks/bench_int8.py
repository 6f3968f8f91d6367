"""Would 8-bit products make sampling faster here? Those of pMF-B/16 for a batch of eight images.

    python benchmarks/bench_int8.py [--seconds 2] [--out FILE.json]

Weights are rounded to int8 with a scale per output channel, activations with a scale per token, and
torch._int_mm adds up in int32. Timed are float32, bfloat16 with the cast of the activations, the 8-bit
product with the passes around it (largest magnitude, rounding, scales), which PyTorch makes one by one, and
the 8-bit product alone. Errors are those of the whole product against float64; "exact" says whether the sums
are exact.
`ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI` makes a processor with bfloat16 instructions act like one without; the
record says so.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pmf.bench.device import Cpu
from pmf.bench.harness import Case, Planned, Setting, against, print_rows, record, run_case, write_record
from pmf.bench.load import OtherLoad

ROWS = 8 * 276
SHAPES = ((768, 768), (768, 2048), (2048, 768))
"""Inputs and outputs of B/16's Linear layers."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [M, K] as int8, and its scale [M, 1]."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round().to(torch.int8), scale


def cases(setting: Setting) -> Iterator[Planned]:
    for inputs, outputs in SHAPES:
        facts = {"op": "int8", "shape": [ROWS, inputs, outputs]}
        yield Planned(
            f"{ROWS} x {inputs} to {outputs}", functools.partial(_case, setting, inputs, outputs), facts
        )


def _case(setting: Setting, inputs: int, outputs: int) -> Case:
    x, weight = setting.normal((ROWS, inputs), (outputs, inputs))
    (q, scale), (q_weight, scale_weight) = quantize(x), quantize(weight)
    narrow = weight.bfloat16()

    def int8() -> Tensor:
        q, scale = quantize(x)
        return torch._int_mm(q, q_weight.t()).float().mul_(scale).mul_(scale_weight.t())

    runs = {
        "float32": lambda: x @ weight.t(),
        "bfloat16": lambda: x.bfloat16() @ narrow.t(),
        "int8": int8,
        "int8, the product alone": lambda: torch._int_mm(q, q_weight.t()),
    }
    exact = x.double() @ weight.t().double()
    sums = torch._int_mm(q, q_weight.t()).double()
    is_exact = torch.equal(sums, q.double() @ q_weight.t().double())
    errors = against({**runs, "int8, the product alone": lambda: sums * scale * scale_weight.t()}, exact)
    return Case(runs, errors, math.inf, 2.0 * ROWS * inputs * outputs, figures={"exact": is_exact})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON record")
    arguments = parser.parse_args()
    device = Cpu()
    rows = []
    with OtherLoad() as load:
        for planned in cases(Setting(device, "cpu")):
            rows += run_case(planned, device, arguments.seconds)
    print_rows(rows)
    print(load.sentence())
    for row in rows[:: len(rows) // len(SHAPES)]:
        print(f"{row['case']}: sums in int32 are {'exact' if row['exact'] else 'NOT exact'}")
    if arguments.out is not None:
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "the processor's")
        write_record(
            arguments.out, {**record("int8", rows, device), "onednn_isa": isa, "other_load": load.share}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
