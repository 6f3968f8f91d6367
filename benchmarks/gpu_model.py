"""How long the attention kernels of the built library should take on a GPU, by a model of its cycles.

    python benchmarks/gpu_model.py [--kernels plan|mma] [--out FILE] [--rates FILE] [NAME ...]

Nothing runs on a GPU. Each launch that the library plans for an H100 is looked up in the library's machine
code (sm_90a); the instructions of its hot path go through a model of one multiprocessor: the compiler's own
schedule, pipes, shared memory, copies, barriers. Its rates stand in one table, gpu/model/rates.json: what a
GPU measures belongs there instead. Every figure is a prediction, good for comparing two builds, and no
measurement.

The last line gives predicted time over the limit: the larger of what the products take at 800 TFLOP/s and
what the bytes take at 3.0 TB/s.

Exit status: 0; 1 if the machine code is not what the model knows; 2 if there is nothing to read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gpu.model import hopper, problems
from gpu.model.library import ToolMissingError, demangled, host_functions, kernels
from gpu.model.problems import Launch, Problem, UnexpectedCodeError

from pmf import _library

RATES = Path(__file__).parent / "gpu" / "model" / "rates.json"
PROBLEMS = (
    Problem("forward_276x64", 3072, 276, 64),
    Problem("jvp_276x64", 3072, 276, 64, tangent=True),
    Problem("jvp_276x80", 4096, 276, 80, tangent=True),
    Problem("jvp_1024x64", 3072, 1024, 64, tangent=True),
    Problem("jvp_1024x128", 3072, 1024, 128, tangent=True),
    Problem("backward_276x64", 3072, 276, 64, backward=True),
    Problem("both_276x64", 3072, 276, 64, tangent=True, backward=True),
)


KERNELS = {"plan": 227, "mma": 226}
"""Shared memory that a block may ask for, in KB: all of an H100's, or less than Hopper's own kernels need."""


def planned(plans: Any, problem: Problem, kernels: str) -> list[dict[str, Any]]:
    """The launches of a problem on an H100, as the library's own launchers make them."""
    sizes = {"batch": 1, "heads": problem.heads, "key_heads": problem.heads}
    return plans.attention_launches(
        **sizes,
        queries=problem.tokens,
        keys=problem.tokens,
        width=problem.width,
        value_width=problem.width,
        dtype="bfloat16",
        backward=problem.backward,
        tangent=problem.tangent,
        shared_per_block=KERNELS[kernels] * 1024,
    )["launches"]


def ratios(
    library: Path, plans: Any, chosen: list[Problem], rates: dict[str, float], which: str
) -> list[dict[str, Any]]:
    """A row for each problem; a line is printed for each launch."""
    hosts = host_functions(library)
    launches = {problem: planned(plans, problem, which) for problem in chosen}
    code = kernels(library, {hosts[each["kernel"]] for some in launches.values() for each in some})
    rows = []
    for problem, some in launches.items():
        seconds = []
        for each in some:
            name = demangled(hosts[each["kernel"]])
            launch = Launch(
                name, each["blocks"], each["threads"], tuple(each["tile"]), each["blocks_per_processor"]
            )
            predict = hopper.predict if hopper.takes(name) else problems.predict
            seconds.append(predict(code[hosts[each["kernel"]]], launch, problem, rates))
            kernel = name.split("(")[0].split("<")[0]
            print(
                f"{problem.name:16} {kernel:28} {launch.blocks:6} blocks of {launch.warps} warps, "
                f"{launch.blocks_per_processor} a multiprocessor: predicted {seconds[-1] * 1e6:6.0f} us",
                flush=True,
            )
        limit = problem.limit_seconds(rates)
        rows.append(
            {
                "problem": problem.name,
                "predicted_seconds": seconds,
                "limit_seconds": limit,
                "predicted_over_limit": sum(seconds) / limit,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_model.py", description="Predict the time of the attention kernels from their machine code."
    )
    names = [problem.name for problem in PROBLEMS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(names)} (default: all)")
    parser.add_argument(
        "--kernels", choices=KERNELS, default="plan", help="what an H100 launches, or mma.sync's kernels"
    )
    parser.add_argument("--rates", type=Path, default=RATES, help="the table of rates, as JSON")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in names]:
        parser.error(f"there is no problem {unknown[0]!r}: choose from {', '.join(names)}")
    if (missing := _library.missing()) is not None:
        parser.error(missing)
    plans = _library.introspection()
    if plans is None:
        parser.error("this build has no introspection module, which says what is launched")
    try:
        table = json.loads(arguments.rates.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.rates} is no table of rates: {error}")
    rates = {name: value for name, value in table.items() if not isinstance(value, str)}
    chosen = [problem for problem in PROBLEMS if not arguments.names or problem.name in arguments.names]
    try:
        rows = ratios(Path(_library.LIBRARY), plans, chosen, rates, arguments.kernels)
    except (RuntimeError, ToolMissingError) as error:  # no CUDA kernels, or no tool to read them
        parser.error(str(error))
    except UnexpectedCodeError as error:
        print(f"gpu_model.py: {error}", file=sys.stderr)
        return 1
    if arguments.out is not None:
        record = {"what": "predictions of a cycle model, not measurements", "rates": table, "rows": rows}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print("predicted time over the limit (H100; no measurement):")
    print(*(f"{row['problem']}={row['predicted_over_limit']:.2f}" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
