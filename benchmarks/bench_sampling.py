"""One-step sampling from pMF-B/16 against a plain float32 sampler with written-out attention (plain_port.py).

    python benchmarks/bench_sampling.py [--batch-size 8] [--quick] [--out FILE.json]

Same weights (random, with non-zero gates and final layers that give images of unit size), noise and labels.
First the images must agree: in float32 within 1e-4, and in pmf's default sampling precision (bfloat16
products if the CPU has them) with a PSNR of at least 50 dB at a range of 2; otherwise nothing is timed and
the exit status is 1. Then all run interleaved, and the rounds' ratios are compared. With them run the
plain sampler's matrix products alone, by torch in float32, which few samplers could do without.

`PMF_CPU_LEVEL=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE` makes a processor with bfloat16 instructions act like
one without.

The last line is `images_per_second_ratio=R psnr_db=P`: pmf's default over the plain sampler.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import plain_port
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_step.agreement import relative_error
from training_step.sides import make_model

from pmf.bench.device import Cpu, Run
from pmf.bench.harness import record, write_record
from pmf.bench.load import OtherLoad
from pmf.flow import Sampler

OMEGA, INTERVAL = 7.5, (0.1, 0.8)  # the preset's
LEAST_PSNR = 50.0
FLOAT32_LIMIT = 1e-4
RANGE = 2.0
"""Images lie around [-1, 1]."""
QUICK = plain_port.Sizes(
    image_size=64, patch_size=8, hidden_size=256, depth=4, head_depth=2, num_heads=4, mlp_width=682
)


PRODUCTS, PLAIN = "matrix products alone, fp32", "plain sampler, fp32"
aten = torch.ops.aten
PRODUCT_OPS = {
    aten.linear.default, aten.matmul.default, aten.conv2d.default,
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default,
}  # fmt: skip
"""The first three with `torch.inference_mode`, otherwise what they consist of."""


class Products(TorchDispatchMode):
    """Collects the matrix products of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Run] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = functools.partial(func, *args, **(kwargs or {}))
        if func in PRODUCT_OPS:
            self.found.append(call)
        return call()


def products_alone(sample: Run) -> Run:
    """The products of `sample` by the functions of PyTorch that it calls, on its own operands."""
    with Products() as products:
        sample()

    @torch.inference_mode()
    def run() -> None:
        for product in products.found:
            product()

    return run


def make_runs(sizes: plain_port.Sizes, batch_size: int, device: torch.device) -> dict[str, Run]:
    """A batch by each sampler, with the same weights, noise and labels; pmf's default first."""
    with device:
        model = make_model(sizes)
        plain = plain_port.Network(sizes, attend=plain_port.written_out_attention)
    plain_port.load(plain, model.state_dict())
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, sizes.channels, sizes.image_size, sizes.image_size)
    noise = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(sizes.num_classes, (batch_size,), generator=generator).to(device)
    default = Sampler(model)
    samplers = {f"pmf, {default.precision} (its default)": default}
    if default.precision != "fp32":
        samplers["pmf, fp32"] = Sampler(model, "fp32")
    runs: dict[str, Run] = {
        name: functools.partial(sampler, labels, omega=OMEGA, interval=INTERVAL, noise=noise)
        for name, sampler in samplers.items()
    }
    return runs | {PLAIN: lambda: plain_port.sample(plain, labels, noise, OMEGA, INTERVAL)}


def psnr(images: Tensor, truth: Tensor) -> float:
    """10 log10(RANGE^2 / mean squared difference)."""
    error = (images.double() - truth.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(RANGE**2 / error)


def median_ratio(times: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios: the processor's speed may change between rounds."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend (default: 60)")
    parser.add_argument("--quick", action="store_true", help="smoke test on a small network")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else plain_port.Sizes()
    batch_size, seconds = arguments.batch_size, 1.0 if arguments.quick else arguments.seconds

    runs = make_runs(sizes, batch_size, torch.device("cpu"))
    default, in_fp32 = list(runs)[0], list(runs)[-2]
    images = {name: run() for name, run in runs.items()}
    truth = images[PLAIN]
    error = relative_error(images[in_fp32], truth)
    found = psnr(images[default], truth)
    size = truth.square().mean().sqrt().item()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"depth {sizes.depth}, batch {batch_size}, images of root mean square {size:.2f}")
    print(f"pmf, fp32: relative error {error:.1e} (at most {FLOAT32_LIMIT:.0e})")
    print(f"{default}: PSNR {found:.2f} dB (at least {LEAST_PSNR:.0f})", flush=True)
    if not (error <= FLOAT32_LIMIT and found >= LEAST_PSNR):
        print("The images differ: nothing was timed.", file=sys.stderr)
        return 1

    plain = runs.pop(PLAIN)  # the last row
    runs |= {PRODUCTS: products_alone(plain), PLAIN: plain}
    with OtherLoad() as others:
        times = Cpu().times(runs, seconds, least_rounds=3 if arguments.quick else 7)
    medians = {name: statistics.median(found) for name, found in times.items()}
    rows = []
    print(f"{'sampler':30} {'ms a batch':>11} {'images/s':>9} {'over ours':>10} {'over products':>14}")
    for name, median in medians.items():
        row = {
            "contestant": name,
            "median_ms": 1e3 * median,
            "images_per_second": batch_size / median,
            "images_per_second_ratio": median_ratio(times[name], times[default]),
            "time_over_products": median_ratio(times[name], times[PRODUCTS]),
            "psnr_db": psnr(images[name], truth) if name.startswith("pmf") else None,
        }
        rows.append(row)
        print(
            f"{name:30} {row['median_ms']:11.1f} {row['images_per_second']:9.2f} "
            f"{row['images_per_second_ratio']:10.2f} {row['time_over_products']:14.3f}"
        )
    print(others.sentence())
    if arguments.out:
        details = {"sizes": sizes._asdict(), "batch_size": batch_size, "image_rms": size}
        details |= {"float32_error": error, "others_share": others.share}
        write_record(arguments.out, {**record("sampling", rows, Cpu()), **details})
    print(f"images_per_second_ratio={rows[-1]['images_per_second_ratio']:.4f} psnr_db={found:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
