"""A training step and one-step sampling, set up as in bench_training_step.py and bench_sampling.py."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import bench_sampling
import plain_port
import torch
from training_step import agreement
from training_step.sides import OURS, PORT, SMALL, Batch, Side, draw_batch, make_model, make_side

from pmf.bench.harness import Case, Planned, Setting
from pmf.check.tolerance import relative_error

PRECISION = "bf16"
BATCHES = 4
TRAINED = {"tiny": (SMALL, 2), "quick": (plain_port.Sizes(), 16), "full": (plain_port.Sizes(), 32)}
SAMPLED = {"tiny": (SMALL, 2), "quick": (plain_port.Sizes(), 64), "full": (plain_port.Sizes(), 64)}
LEAST_PSNR_ERROR = bench_sampling.RANGE * 10 ** (-bench_sampling.LEAST_PSNR / 20)


def training_cases(setting: Setting) -> Iterator[Planned]:
    """Objective, backward and optimizer, timed and checked against the plain port."""
    sizes, batch_size = TRAINED[setting.scale]
    facts = {"op": "training step", "depth": sizes.depth, "batch": batch_size, "dtype": PRECISION}
    label = f"step of depth {sizes.depth}, batch {batch_size}, {PRECISION}"
    yield Planned(label, functools.partial(_training, setting, sizes, batch_size), facts)


def _training(setting: Setting, sizes: plain_port.Sizes, batch_size: int) -> Case:
    device = setting.device.device
    with device:
        model = make_model(sizes)
    sides = {name: make_side(name, model, sizes, PRECISION) for name in (OURS, PORT)}
    batches = {
        name: [_batch(name, sizes, batch_size, seed, device) for seed in range(BATCHES)] for name in sides
    }

    def error(name: str) -> float:
        """The largest error of losses and gradients against the port's."""
        if name == PORT:
            return 0.0
        found, expected = (agreement.evaluate(sides[side], batches[side][0]) for side in (OURS, PORT))
        for side in sides.values():
            side.update()
        return max(agreement.differences(found, expected).values())

    runs = {name: _step(side, itertools.cycle(batches[name])) for name, side in sides.items()}
    return Case(runs, error, agreement.limit(PRECISION, sizes.depth))


def _batch(side: str, sizes: plain_port.Sizes, batch_size: int, seed: int, device: torch.device) -> Batch:
    """A batch. For the port every draw is on the device; pmf reads all but the noise on the host."""
    drawn = draw_batch(sizes, batch_size, seed)
    moved = drawn.on(device)
    return moved if side == PORT else moved._replace(draws=drawn.draws._replace(noise=moved.draws.noise))


def _step(side: Side, batches: Iterator[Batch]) -> Callable[[], None]:
    def run() -> None:
        side.backward(next(batches))
        side.update()

    return run


def sampling_cases(setting: Setting) -> Iterator[Planned]:
    """One-step sampling; the plain sampler runs as its authors run it on a GPU, with TF32 products."""
    sizes, batch_size = SAMPLED[setting.scale]
    facts = {"op": "sampling", "depth": sizes.depth, "batch": batch_size}
    label = f"one step, depth {sizes.depth}, batch {batch_size}"
    yield Planned(label, functools.partial(_sampling, setting, sizes, batch_size), facts)


def _sampling(setting: Setting, sizes: plain_port.Sizes, batch_size: int) -> Case:
    runs = bench_sampling.make_runs(sizes, batch_size, setting.device.device)
    truth = runs[bench_sampling.PLAIN]().double()
    size = truth.square().mean().sqrt().item()
    name, plain = f"{bench_sampling.PLAIN} weights, TF32 products", runs.pop(bench_sampling.PLAIN)
    runs[name] = functools.partial(_with_tf32, plain)
    # As in bench_sampling: a PSNR of at least 50 dB, as a relative error.
    return Case(runs, lambda key: relative_error(runs[key](), truth), LEAST_PSNR_ERROR / size)


def _with_tf32(run: Callable[[], Any]) -> Any:
    """torch.set_float32_matmul_precision("high") and cudnn.benchmark, for one call."""
    before, tuned = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        return run()
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.benchmark = tuned
