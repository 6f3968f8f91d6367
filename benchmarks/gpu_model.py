"""Predict how long the kernels of the built library take on a GPU, with a cycle model.

    python benchmarks/gpu_model.py [--kernels mma] [--rate NAME=VALUE] [--rates FILE] [--out FILE] [NAME ...]
    python benchmarks/gpu_model.py --muon [--rate NAME=VALUE] [--rates FILE] [--out FILE]
    python benchmarks/gpu_model.py --step [--rate NAME=VALUE] [--rates FILE] [--out FILE]

Nothing runs on a GPU. Each kernel that the library would launch on an H100 is looked up in the library's
machine code (sm_90a), and the instructions of its hot path run through a model of one multiprocessor: the
compiler's schedule, pipes, shared memory, copies, barriers. All rates are in gpu/model/rates.json; measured
ones should replace them. `--rate` changes one, to see what depends on it, and can be repeated. Every figure
is a prediction, useful for comparing two builds, not a measurement.

The last line gives the predicted time over the limit: the larger of the products' time at 800 TFLOP/s and the
bytes' time at 3.0 TB/s.

`--muon` predicts the Muon step of pMF-B/16 and pMF-H/16 instead, product by product, beside that of
torch.optim.Muon: its products at the rate of linear layers, its other operations by their bytes.

`--step` predicts a whole training step of pMF-B/16 and pMF-H/16 instead, kernel by kernel: attention and Muon
by the model, linear layers by their operations, everything else by its bytes.

Exit status: 0; 1 if the model does not recognise the machine code; 2 if there is nothing to read.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

from gpu.model import hopper, problems
from gpu.model.library import ToolMissingError, demangled, host_functions, kernels
from gpu.model.muon import Multiplier, of_torch
from gpu.model.problems import Launch, Problem, UnexpectedCodeError
from gpu.model.sass import Kernel
from gpu.model.step import MUON_BYTES, step

from pmf import _library
from pmf.bench.muon import shapes_of

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


NETWORKS, BATCH = ("pmf-b/16", "pmf-h/16"), 128
"""For --step: an eighth of the paper's batch."""
KERNELS = {"plan": (9, 0), "mma": (8, 0)}
"""The compute capability to plan for: an H100's, or one without the Hopper kernels."""


def planned(plans: Any, problem: Problem, kernels: str) -> list[dict[str, Any]]:
    """The launches of a problem on an H100, as planned by the library's launchers."""
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
        compute_capability=KERNELS[kernels],
    )["launches"]


def seconds_of(
    planned: dict[str, Any],
    problem: Problem,
    hosts: dict[int, str],
    code: dict[str, Kernel],
    rates: dict[str, float],
) -> float:
    """The predicted seconds of a planned launch."""
    name = hosts[planned["kernel"]]
    launch = Launch(
        demangled(name),
        planned["blocks"],
        planned["threads"],
        tuple(planned["tile"]),
        planned["blocks_per_processor"],
    )
    predict = hopper.predict if hopper.takes(launch.kernel) else problems.predict
    return predict(code[name], launch, problem, rates)


def ratios(
    library: Path, plans: Any, chosen: list[Problem], rates: dict[str, float], which: str
) -> list[dict[str, Any]]:
    """A row for each problem; prints a line for each launch."""
    hosts = host_functions(library)
    launches = {problem: planned(plans, problem, which) for problem in chosen}
    code = kernels(library, {hosts[each["kernel"]] for some in launches.values() for each in some})
    rows = []
    for problem, some in launches.items():
        seconds = []
        for each in some:
            seconds.append(seconds_of(each, problem, hosts, code, rates))
            kernel = demangled(hosts[each["kernel"]]).split("(")[0].split("<")[0]
            print(
                f"{problem.name:16} {kernel:28} {each['blocks']:6} blocks of {each['threads'] // 32} warps, "
                f"{each['blocks_per_processor']} a multiprocessor: predicted {seconds[-1] * 1e6:6.0f} us",
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


def multiplier(library: Path, rates: dict[str, float]) -> Multiplier:
    hosts = host_functions(library)
    return Multiplier(hosts, functools.cache(lambda name: kernels(library, {name})[name]), rates)


def muon(library: Path, plans: Any, rates: dict[str, float], which: str) -> list[dict[str, Any]]:
    """A row for each product of a Muon step of each network; also prints them."""
    multiply = multiplier(library, rates)
    rows = []
    for network in NETWORKS:
        counts, _ = shapes_of(network)
        shapes = [shape for shape, count in counts.items() for _ in range(count)]
        plan = plans.newton_schulz_launches(shapes=shapes, muon=True, compute_capability=KERNELS[which])
        size = MUON_BYTES * sum(math.prod(shape) for shape in shapes) / rates["memory_bytes"]
        found: dict[tuple[Any, ...], list[float]] = {}
        for kernel, product, seconds in multiply.rows(plan):
            kind = kernel, product.m, product.n, product.k, product.symmetric, product.adds_left
            sums = found.setdefault(kind, [0, 0, 0, 0])
            limit = product.limit_seconds(rates, "update" in kernel)
            for i, more in enumerate((1, product.flops(), seconds, limit)):
                sums[i] += more
        total = size + sum(seconds for _, _, seconds, _ in found.values())
        torchs = of_torch(shapes, rates)
        for (kernel, m, n, k, symmetric, adds), (calls, flops, seconds, limit) in found.items():
            shape = f"{m}x{n}x{k}{' symmetric' if symmetric else ''}{' + left' if adds else ''}"
            print(
                f"{network:9} {kernel:22} {shape:32} {calls:3} launches {seconds * 1e3:6.2f} ms, "
                f"{flops / seconds / 1e12:4.0f} TFLOP/s, {seconds / limit:.2f} of the limit"
            )
            rows.append(
                {
                    "network": network,
                    "kernel": kernel,
                    "product": shape,
                    "launches": calls,
                    "flops": flops,
                    "predicted_seconds": seconds,
                    "limit_seconds": limit,
                }
            )
        print(
            f"{network}: predicted {total * 1e3:.1f} ms, of which {size * 1e3:.1f} for gradients and "
            f"momentum; torch.optim.Muon {torchs * 1e3:.1f} ms, {torchs / total:.2f} times as long"
        )
        rows.append(
            {"network": network, "predicted_seconds": total, "memory_seconds": size, "torch_seconds": torchs}
        )
    return rows


def steps(library: Path, plans: Any, rates: dict[str, float], which: str) -> list[dict[str, Any]]:
    """A row for each kernel of a training step of each network; also prints them."""
    hosts = host_functions(library)
    multiply = multiplier(library, rates)
    known: dict[Problem, float] = {}

    def attend(problem: Problem) -> float:
        if problem not in known:
            launches = planned(plans, problem, which)
            code = kernels(library, {hosts[each["kernel"]] for each in launches})
            known[problem] = sum(seconds_of(each, problem, hosts, code, rates) for each in launches)
        return known[problem]

    rows = []
    for network in NETWORKS:
        found = step(network, BATCH, plans, rates, attend, multiply.seconds)
        total = sum(seconds for *_, seconds in found)
        print(f"{network}, batch {BATCH}: predicted {total * 1e3:.0f} ms")
        for kernel, calls, seconds in found:
            print(f"{kernel:28} {calls:5} calls {seconds * 1e3:8.2f} ms {seconds / total:6.1%}")
            rows.append(
                {
                    "network": network,
                    "batch": BATCH,
                    "kernel": kernel,
                    "calls": calls,
                    "predicted_seconds": seconds,
                    "share": seconds / total,
                }
            )
    return rows


def read_rates(path: Path) -> dict[str, Any]:
    """A table of rates, assumed or measured; raises OSError or ValueError if it is not a whole one."""
    table = json.loads(path.read_text())
    if not isinstance(table, dict):
        raise ValueError("it must be a JSON object")
    for name, assumed in json.loads(RATES.read_text()).items():
        if isinstance(assumed, (int, float)) and not isinstance(table.get(name), (int, float)):
            raise ValueError(f"it has no number {name!r} (benchmarks/machine_rates.py writes whole tables)")
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_model.py", description="Predict the time of the attention kernels from their machine code."
    )
    names = [problem.name for problem in PROBLEMS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(names)} (default: all)")
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        default="plan",
        help="plan: those that an H100 uses; mma: the mma.sync kernels",
    )
    parser.add_argument("--muon", action="store_true", help="predict a Muon step instead")
    parser.add_argument("--step", action="store_true", help="predict a whole training step instead")
    parser.add_argument("--rates", type=Path, default=RATES, help="JSON file with the table of rates")
    parser.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="use this value instead of the table's; may be repeated",
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in names]:
        parser.error(f"there is no problem {unknown[0]!r}: choose from {', '.join(names)}")
    if (missing := _library.missing()) is not None:
        parser.error(missing)
    plans = _library.introspection()
    if plans is None:
        parser.error("this build lacks the introspection module, which reports what is launched")
    try:
        table = read_rates(arguments.rates)
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.rates} is not a table of rates: {error}")
    for change in arguments.rate:
        name, _, value = change.partition("=")
        if not isinstance(table.get(name, ""), (int, float)):
            parser.error(f"--rate {change}: there is no rate {name!r} in {arguments.rates}")
        try:
            table[name] = float(value)
        except ValueError:
            parser.error(f"--rate {change}: {value!r} is no number")
    rates = {name: value for name, value in table.items() if not isinstance(value, str)}
    if (arguments.step or arguments.muon) and arguments.names:
        parser.error("--step and --muon take no NAME: their problems are those of a training step")
    chosen = [problem for problem in PROBLEMS if not arguments.names or problem.name in arguments.names]
    try:
        library = Path(_library.LIBRARY)
        if arguments.muon:
            rows = muon(library, plans, rates, arguments.kernels)
        elif arguments.step:
            rows = steps(library, plans, rates, arguments.kernels)
        else:
            rows = ratios(library, plans, chosen, rates, arguments.kernels)
    except (RuntimeError, ToolMissingError) as error:  # no CUDA kernels, or no tool to read them
        parser.error(str(error))
    except UnexpectedCodeError as error:
        print(f"gpu_model.py: {error}", file=sys.stderr)
        return 1
    if arguments.out is not None:
        record = {"what": "predictions of a cycle model, not measurements", "rates": table, "rows": rows}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    if not (arguments.step or arguments.muon):
        print("predicted time over the limit (H100; not measured):")
        print(*(f"{row['problem']}={row['predicted_over_limit']:.2f}" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
