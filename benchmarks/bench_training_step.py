"""One Pixel MeanFlow training step against a plain PyTorch port of the same objective (plain_port.py).

    python benchmarks/bench_training_step.py [--quick] [--also CONTESTANT ...] [--out FILE.json]

Same weights (random, with non-zero gates and final layers), images and draws. First both sides' loss_u,
loss_v and all gradients must agree: in float64, float32 and bfloat16 on small networks for batches of every
case, then in the precision and size that is timed; otherwise nothing is timed and the exit status is 1. Then,
for objective + backward + optimizer step:

- time: interleaved medians, in fp32, and in bf16 (ours: a bfloat16 model with float32 master weights; the
  port: autocast). torch.optim.Muon orthogonalises in bfloat16, so ours is set to do the same. The memory
  allocator keeps freed memory, for both.
- FLOPs executed by objective and backward at depth 16, batch 128, averaged over draws, counted by
  torch.utils.flop_counter on meta tensors.
- peak memory: growth of the resident set over the loaded model, in a fresh process per side.

The last line is `step_time_ratio=T flops_ratio=F peak_memory_ratio=M`, each ours over the port's: T and M are
for the whole step in fp32.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plain_port
import torch
from training_step import agreement, flops, memory
from training_step.sides import (
    CAREFUL,
    CHECKPOINTING,
    COMPILED,
    DEFAULT,
    OURS,
    PORT,
    SMALL,
    draw_batch,
    make_model,
    make_side,
)
from training_step.timing import interleaved

from pmf.bench.device import Cpu
from pmf.bench.harness import record, write_record
from pmf.bench.load import OtherLoad

ALSO = {"careful": CAREFUL, "checkpointing": CHECKPOINTING, "compiled": COMPILED}
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"}  # see mallopt(3)

Rows = list[dict[str, Any]]


def check_cases(precisions: tuple[str, ...]) -> Rows:
    rows = agreement.check(precisions)
    print(f"{'agreement: worst relative error':51} {'limit':>8} {'loss_u':>8} {'loss_v':>8} {'any':>8}  of")
    for row in rows:
        print_agreement(row)
    return [{"part": "agreement", **row} for row in rows]


def print_agreement(row: dict[str, Any]) -> None:
    figures = " ".join(f"{row[name]:8.1e}" for name in ("limit", "loss_u", "loss_v", "error"))
    verdict = "" if row["agrees"] else "  DISAGREES"
    print(f"{row['precision']} {row['case']:46} {figures}  {row['worst']}{verdict}", flush=True)


def time_steps(
    sizes: plain_port.Sizes, batch_size: int, precision: str, rounds: int, contestants: Sequence[str]
) -> tuple[Rows, Rows]:
    """Check the agreement of each form of this library with the port at this size; time them if all agree."""
    model = make_model(sizes)
    sides = {name: make_side(name, model, sizes, precision) for name in contestants}
    del model
    batches = [draw_batch(sizes, batch_size, seed) for seed in range(rounds + 1)]
    expected = agreement.evaluate(sides[PORT], batches[0])
    checked: Rows = []
    for name, side in sides.items():
        if name != PORT:
            errors = agreement.differences(agreement.evaluate(side, batches[0]), expected)
            checked.append(agreement.row(f"as timed: {name}", precision, sizes, errors))
            print_agreement(checked[-1])
    del expected
    if not all(row["agrees"] for row in checked):
        return checked, []

    for name, side in sides.items():
        side.update()
        if name == COMPILED:  # compile the graphs for every number of samples
            for batch in batches[1:]:
                side.backward(batch)
                side.update()
    with OtherLoad() as others:
        times = interleaved(sides, batches[1:])
    print(f"{precision}: {others.sentence()}", flush=True)
    rows: Rows = []
    for name, found in times.items():
        rows.append({
            "part": "time",
            "precision": precision,
            "contestant": name,
            "rounds": rounds,
            "step_ms": 1e3 * found.step,
            "backward_ms": 1e3 * found.backward,
            "update_ms": 1e3 * found.update,
            "step_ratio": times[OURS].step / found.step,
            "backward_ratio": times[OURS].backward / found.backward,
            "others_share": others.share,
        })  # fmt: skip
    return checked, rows


def print_times(rows: Rows) -> None:
    print(
        f"\n{'time (medians)':45} {'step ms':>9} {'without optimizer':>18} {'ours / it':>10} {'without':>8}"
    )
    for row in rows:
        label = f"{row['precision']} {row['contestant']}"
        print(
            f"{label:45} {row['step_ms']:9.0f} {row['backward_ms']:18.0f} "
            f"{row['step_ratio']:10.3f} {row['backward_ratio']:8.3f}"
        )


def count_flops(sizes: plain_port.Sizes, batch_size: int, draws: int) -> dict[str, Any]:
    row = flops.count(sizes, batch_size, draws)
    print(
        f"\nFLOPs executed at depth {row['depth']}, batch {batch_size}, mean of {draws} draws "
        "(1 unit: one block over the batch)"
    )
    for name, value in row["flops"].items():
        print(f"{name:45} {value / 1e12:8.3f} TFLOP {row['units'][name]:7.1f} units")
    print(f"ours / port {row['ratio']:.3f}; {flops.EXPLANATION}")
    return {"part": "flops", **row}


def measure_memory(
    sizes: plain_port.Sizes, batch_size: int, precisions: Sequence[str], contestants: Sequence[str]
) -> Rows:
    rows: Rows = []
    print(f"\n{'peak memory of a step, over the loaded model':45} {'MiB':>9} {'ours / it':>10}")
    for precision in precisions:
        grown = {name: memory.growth(name, precision, sizes, batch_size) for name in contestants}
        for name, size in grown.items():
            row = {"part": "memory", "precision": precision, "contestant": name, "bytes": size}
            rows.append({**row, "ratio": grown[OURS] / size})
            label = f"{precision} {name}"
            print(f"{label:45} {size / 2**20:9.0f} {rows[-1]['ratio']:10.3f}", flush=True)
    return rows


def keep_freed_memory() -> None:
    """Restart with glibc set to keep freed memory.

    By default it returns large blocks to the system and requests them again in every step: a second of page
    faults in the port, which careful users disable and which varies with the machine's state.
    """
    if any(name not in os.environ for name in KEEP_MEMORY):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds in fp32; twice as many in bf16")
    parser.add_argument("--also", nargs="+", default=[], choices=list(ALSO), help="additional contestants")
    parser.add_argument("--quick", action="store_true", help="smoke test on a small network")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    arguments = parser.parse_args()
    batch_size, rounds = arguments.batch_size, arguments.rounds
    timed, counted, draws = (SMALL, SMALL, 5) if arguments.quick else (DEFAULT, plain_port.Sizes(), 1000)
    precisions = ("fp32", "bf16")
    contestants = [OURS, PORT, *(ALSO[name] for name in arguments.also)]

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    rows = check_cases(("fp64", *precisions))
    if not all(row["agrees"] for row in rows):
        print("The sides disagree: nothing was timed.", file=sys.stderr)
        return 1
    times: Rows = []
    for precision in precisions:
        many = rounds if precision == "fp32" else 2 * rounds
        checked, found = time_steps(timed, batch_size, precision, many, contestants)
        rows += [{"part": "agreement", **row} for row in checked]
        if not found:
            print("The sides disagree at the size that is timed: nothing was timed.", file=sys.stderr)
            return 1
        times += found
    print_times(times)
    counts = count_flops(counted, 16 if arguments.quick else 128, draws)
    weighed = [name for name in contestants if name in (OURS, PORT, CHECKPOINTING)]
    peaks = measure_memory(timed, batch_size, precisions[:1] if arguments.quick else precisions, weighed)

    sizes = {"timed": timed._asdict(), "batch_size": batch_size, "counted": counted._asdict()}
    rows += [*times, counts, *peaks]
    if arguments.out:
        write_record(arguments.out, {**record("training_step", rows, Cpu()), "sizes": sizes})
    step, peak = (
        next(row for row in part if row["precision"] == "fp32" and row["contestant"] == PORT)
        for part in (times, peaks)
    )
    print(
        f"step_time_ratio={step['step_ratio']:.4f} flops_ratio={counts['ratio']:.4f} "
        f"peak_memory_ratio={peak['ratio']:.4f}"
    )
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
