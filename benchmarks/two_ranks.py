"""Compare two ranks with one, and kill a rank in the middle: prints a table and writes a JSON record.

    python benchmarks/two_ranks.py [--out record.json] [--steps 10] [--device cpu]

Trains a small network on the digits with torchrun, in float32: one process; two by DDP; two by FSDP2; both
with gradient accumulation; and each of the latter again with one rank killed by SIGKILL in the middle and the
run resumed. Reports the largest differences of logged loss_u and loss_v and of every weight and average.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pmf import checkpoint

NETWORK = """--hidden-size 64 --depth 4 --head-depth 2 --num-heads 2 --bottleneck 16
    --condition-tokens 2 1 1 1 1 --mlp-width 160 --batch-size 64 --precision fp32 --lr 1e-3 --cooldown 0
    --log-every 1 --ema-half-lives 0.1 --sample-ema 0.1 --sample-every 100000""".split()
TOLERANCE = 1e-5


def command(ranks: int, arguments: list[str]) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(torchrun if ranks > 1 else []), "-m", "pmf", "train", *arguments]


def train(ranks: int, arguments: list[str]) -> None:
    subprocess.run(command(ranks, arguments), check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)


def train_and_kill(out: Path, after: int, arguments: list[str]) -> dict[str, int]:
    """Kill the second rank once a checkpoint of `after` steps exists; returns how torchrun ended."""
    log = out.with_suffix(".log").open("wb")
    running = subprocess.Popen(command(2, arguments), stdout=log, stderr=log, env=ENVIRONMENT)
    while not checkpoint.step_folder(out, after).is_dir():
        if running.poll() is not None:
            raise SystemExit(f"the run ended on its own: {Path(log.name).read_text()[-2000:]}")
        time.sleep(0.01)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    (victim,) = [int(pid) for pid in children if b"RANK=1" in environment_of(int(pid))]
    os.kill(victim, signal.SIGKILL)
    status = running.wait()
    newest = checkpoint.newest_checkpoint(out).name
    return {"torchrun_status": status, "newest_step": int(newest.removeprefix("step-"))}


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def losses(out: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return torch.tensor([[row["loss_u"], row["loss_v"]] for row in rows], dtype=torch.float64)


def difference(found: Path, expected: Path) -> dict[str, float]:
    """The largest differences between two finished runs."""
    result = dict(
        zip(("loss_u", "loss_v"), (losses(found) - losses(expected)).abs().amax(0).tolist(), strict=True)
    )
    for name in ("weights", "ema-0.1"):
        mine, other = (
            checkpoint.read_tensors(checkpoint.newest_checkpoint(run) / f"{name}.safetensors")[0]
            for run in (found, expected)
        )
        result[name] = max((mine[key] - other[key]).abs().max().item() for key in other)
    return result


def measure(folder: Path, steps: int, device: str) -> dict[str, dict[str, float]]:
    def arguments(name: str, *more: str) -> list[str]:
        return [*NETWORK, "--steps", str(steps), "--device", device, "--out", str(folder / name), *more]

    train(1, arguments("one"))
    rows: dict[str, dict[str, float]] = {}
    for parallel in ("ddp", "fsdp"):
        how = ("--parallel", parallel)
        train(2, arguments(parallel, *how))
        rows[f"{parallel}, two ranks | one process"] = difference(folder / parallel, folder / "one")
        train(2, arguments(f"{parallel}-parts", *how, "--accumulate", "2"))
        rows[f"{parallel}, two ranks x 2 parts | one process"] = difference(
            folder / f"{parallel}-parts", folder / "one"
        )
        killed = folder / f"{parallel}-killed"
        ended = train_and_kill(killed, steps // 2, arguments(killed.name, *how, "--checkpoint-every", "1"))
        train(2, ["--resume", str(killed)])
        rows[f"{parallel}, a rank killed, resumed | never stopped"] = {
            **difference(killed, folder / parallel),
            **ended,
        }
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the JSON record here")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), given.steps, given.device)
    good = True
    for name, row in rows.items():
        limit = 0.0 if "killed" in name else TOLERANCE
        fine = all(row[key] <= limit for key in ("loss_u", "loss_v", "weights", "ema-0.1"))
        good &= fine
        shown = "  ".join(f"{key} {value:.2g}" for key, value in row.items())
        print(f"{name:55} {shown}  {'ok' if fine else f'ABOVE {limit:g}'}")
    record = {
        "command": " ".join(["python", *sys.argv]),
        "device": given.device,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "steps": given.steps,
        "tolerance": TOLERANCE,
        "largest_differences": rows,
    }
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if good else 1


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

if __name__ == "__main__":
    raise SystemExit(main())
