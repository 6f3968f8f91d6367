"""Microbenchmarks behind ``pmf bench`` and ``benchmarks/bench_<op>.py``."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

BENCHMARKS = (
    "attention",
    "attention_packed",
    "patch_embed",
    "patch_velocity",
    "rms_norm",
    "swiglu",
    "rotary_qk_norm",
    "gated_residual",
    "newton_schulz",
    "muon",
)


def main(
    argv: list[str] | None = None, parser_type: type[argparse.ArgumentParser] = argparse.ArgumentParser
) -> int:
    """Run the named benchmarks (default: all) and print a table each; 1 if a result of ours was wrong.

    parser_type: the command line's parser class, which determines how errors are reported.
    """
    parser = parser_type(
        prog="pmf bench",
        description="Time the ops against their peers: correctness first, then interleaved runs, medians.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="OP", help=f"any of {', '.join(BENCHMARKS)} (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="time per case (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (timed with CUDA events); default: cpu")
    parser.add_argument("--out", type=Path, help="folder for one JSON record per benchmark")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]!r}: choose from {', '.join(BENCHMARKS)}")

    from pmf.bench.device import keep_freed_memory, make_device
    from pmf.bench.harness import Setting, run_benchmark
    from pmf.devices import find_device

    device = find_device(arguments.device)
    keep_freed_memory()
    setting = Setting(make_device(device), "full" if device.type == "cuda" else "cpu")
    status = 0
    for name in arguments.names or BENCHMARKS:
        print(f"\n{name}")
        module = importlib.import_module(f"pmf.bench.{name}")
        status |= run_benchmark(name, module.cases, setting, arguments.seconds, arguments.out)
    return status
