"""Measure a GPU's throughput per cycle: the rates that benchmarks/gpu_model.py assumes.

    python benchmarks/machine_rates.py --out FILE [--device 0]

Builds benchmarks/gpu/rates.cu with nvcc for the local GPU and runs it, half a minute in total: matrix
instructions with 1, 2 and 4 warps per scheduler, wgmma (where available) and how many a warp can queue,
ldmatrix, exp2, FMA, their latencies, copies in L2 and in memory, the clock under load. The record is the
model's own table (gpu/model/rates.json) with measured values substituted, for
`python benchmarks/gpu_model.py --rates FILE`.

Exit status: 0; 2 with a one-sentence error without a GPU or nvcc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pmf.atomic import write_file

SOURCE = Path(__file__).parent / "gpu" / "rates.cu"
ASSUMED = Path(__file__).parent / "gpu" / "model" / "rates.json"


def build_command(nvcc: str, capability: tuple[int, int], program: Path) -> list[str]:
    major, minor = capability
    is_hopper = capability == (9, 0)
    architecture = f"{major}{minor}{'a' if is_hopper else ''}"
    return [
        nvcc,
        "-O3",
        "-std=c++17",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        *(["-DPMF_WGMMA"] if is_hopper else []),
        "-o",
        str(program),
        str(SOURCE),
    ]


def problem(device: int) -> str | None:
    """Why nothing can be measured here, in one sentence; None if measuring is possible."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: rates are measured on a GPU"
    if not 0 <= device < torch.cuda.device_count():
        return f"--device {device} does not exist: torch finds {torch.cuda.device_count()} CUDA devices"
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH: it builds the probe, so install the CUDA toolkit"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="write the record to this JSON file"
    )
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    arguments = parser.parse_args(argv)
    if why := problem(arguments.device):
        print(why, file=sys.stderr)
        return 2
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "rates"
        capability = torch.cuda.get_device_capability(arguments.device)
        subprocess.run(build_command(nvcc, capability, program), check=True)
        seen = {**os.environ, "CUDA_VISIBLE_DEVICES": str(arguments.device)}
        done = subprocess.run([str(program)], env=seen, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"the probe failed: {done.stderr.strip()}", file=sys.stderr)
        return 1
    rates = merged(json.loads(done.stdout), json.loads(ASSUMED.read_text()) if ASSUMED.exists() else {})
    write_file(arguments.out, (json.dumps(rates, indent=1) + "\n").encode())
    print(json.dumps(rates, indent=1))
    return 0


def merged(measured: dict[str, Any], assumed: dict[str, Any]) -> dict[str, Any]:
    """The model's table with the measured values substituted; "what" names the rest."""
    rest = ", ".join(name for name in assumed if name not in measured)
    what = measured["what"] + (f"; still assumed: {rest}" if rest else "")
    return {**assumed, **measured, "what": what}


if __name__ == "__main__":
    sys.exit(main())
