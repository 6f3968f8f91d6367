"""A MeanFlow step of third-party networks: `pmf.Jvp` against torch.func.jvp through math attention.

    python benchmarks/bench_any_network.py [--rounds 5] [--quick] [--compiled] [--out FILE.json]

Networks, float32, batch 4: ViT-S/16 from timm at 224 pixels (197 tokens), and six DiT blocks with adaLN
(width 384, six heads) on 1024 tokens. A step is value, tangent, loss and the gradients of all weights.
Contestants:

- pmf.Jvp, and with --compiled torch.compile of it;
- pmf.Jvp with the tangent of only the first sample;
- torch.func.jvp with the math backend, which is what PyTorch offers;
- the two-pass recipe: the same under no_grad, and a second forward pass for the gradients;
- a plain training step without a tangent: the cost if tangents were free. A step with a tangent has a third
  more products, so its lower bound is 4/3 of this time.

First losses and gradients must agree within 1e-5; otherwise nothing is timed and the exit status is 1. Times
are medians of interleaved rounds; peak memory is the growth of the resident set in one step, in a fresh
process per contestant that has made a step of a small network before. The last line is `NAME=T,M`s: time and
memory relative to torch.func.jvp's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_step.memory import reset_high_water_mark, status

import pmf
from pmf.bench.device import Cpu
from pmf.bench.harness import record, write_record
from pmf.bench.load import OtherLoad

OURS, COMPILED, MATH = "pmf.Jvp", "pmf.Jvp, compiled", "torch.func.jvp, math attention"
FIRST = "pmf.Jvp, tangent of one sample in four"
TWO_PASSES, PLAIN = "two passes", "plain step, no tangent"
LIMIT = 1e-5

Inputs = tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.time = nn.Linear(2, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        c = self.time(torch.stack((t, t - r), 1))
        for block in self.blocks:
            x = block(x, c)
        return x


def make_vit(quick: bool) -> tuple[nn.Module, Inputs]:
    schemas = torch.library.Library("torchvision", "FRAGMENT")  # missing in CPU builds of torch
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    small: dict[str, Any] = {"img_size": 32, "depth": 2} if quick else {}
    network = timm.create_model("vit_small_patch16_224", pretrained=False, **small)
    size = 32 if quick else 224
    x, x_t = torch.randn(2, 4, 3, size, size).unbind(0)
    return network, ((x,), (x_t,))


def make_dit(quick: bool) -> tuple[nn.Module, Inputs]:
    network = DiT(64, 2, 2) if quick else DiT(384, 6, 6)
    x, x_t = torch.randn(2, 4, 256 if quick else 1024, 64 if quick else 384).unbind(0)
    t = torch.rand(4)
    return network, ((x, t, t / 2), (x_t, torch.ones(4), None))


NETWORKS: dict[str, Callable[[bool], tuple[nn.Module, Inputs]]] = {"vit": make_vit, "dit": make_dit}


def make_step(name: str, network: nn.Module, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradients of one step."""
    primals, tangents = inputs
    if name == FIRST:
        tangents = tuple(None if t is None else t[:1] for t in tangents)
    weights = list(network.parameters())
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def function(*moved: Tensor) -> Tensor:
        given = list(primals)
        for i, x in zip(moving, moved, strict=True):
            given[i] = x
        return network(*given)

    def by_math() -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            directions = tuple(t for t in tangents if t is not None)
            return torch.func.jvp(function, tuple(primals[i] for i in moving), directions)[:2]

    jvp: Any = pmf.Jvp(network)
    if name == COMPILED:
        jvp = torch.compile(jvp, fullgraph=True)

    def step() -> tuple[Tensor, ...]:
        if name == MATH:
            out, out_t = by_math()
        elif name == TWO_PASSES:
            with torch.no_grad():
                out_t = by_math()[1]
            out = network(*primals)
        elif name == PLAIN:
            out, out_t = network(*primals), torch.zeros(())
        else:
            out, out_t = jvp(primals, tangents)
        if name == FIRST:
            out_t = torch.cat((out_t, out_t.new_zeros(len(out) - len(out_t), *out_t.shape[1:])))
        loss = (out + 0.3 * out_t.detach()).square().mean()
        return loss.detach(), *torch.autograd.grad(loss, weights)

    return step


def of_the_first(inputs: Inputs) -> Inputs:
    """With zero tangents for all samples except the first."""
    primals, tangents = inputs
    return primals, tuple(None if t is None else torch.cat((t[:1], 0 * t[1:])) for t in tangents)


def agreement(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Relative error of the loss and of all gradients as one vector; some are zero except for rounding."""
    loss = abs(found[0] - expected[0]) / expected[0]
    one, other = (torch.cat([g.flatten() for g in grads[1:]]) for grads in (found, expected))
    return max(loss.item(), ((one - other).norm() / other.norm()).item())


def peak_memory(network: str, contestant: str, quick: bool) -> int:
    """Growth of the resident set in one step, in bytes, in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", network, contestant]
    done = subprocess.run(command + ["--quick"] * quick, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {contestant} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def print_memory(network: str, contestant: str, quick: bool) -> None:
    torch.manual_seed(0)
    make_step(contestant, *NETWORKS[network](True))()  # imports 90 MB of PyTorch's modules
    step = make_step(contestant, *NETWORKS[network](quick))
    torch.ones(256, 256) @ torch.ones(256, 256)
    before = reset_high_water_mark()
    step()
    print(status("VmHWM") - before)


def measure(network: str, contestants: list[str], rounds: int, quick: bool) -> list[dict[str, Any]]:
    """A row per contestant; without times if ours is wrong."""
    torch.manual_seed(0)
    made = NETWORKS[network](quick)
    steps = {name: make_step(name, *made) for name in contestants}
    expected = steps[MATH]()
    rows: list[dict[str, Any]] = []
    for name, step in steps.items():
        wanted = make_step(MATH, made[0], of_the_first(made[1]))() if name == FIRST else expected
        error = agreement(step(), wanted) if name != PLAIN else 0.0
        rows.append({"network": network, "contestant": name, "error": error, "right": error <= LIMIT})
    if not all(row["right"] for row in rows):
        return rows
    times: dict[str, list[float]] = {name: [] for name in steps}
    with OtherLoad() as others:
        for _ in range(rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    print(f"{network}: {others.sentence()}", flush=True)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for row in rows:
        name = row["contestant"]
        row |= {"median_ms": 1e3 * medians[name], "rounds": rounds, "others_share": others.share}
        row["time_over_math"] = medians[name] / medians[MATH]
        row["time_over_plain"] = medians[name] / medians[PLAIN]
        if name != COMPILED:  # this would include the compiler's own memory
            row["peak_bytes"] = peak_memory(network, name, quick)
    peaks = {row["contestant"]: row.get("peak_bytes") for row in rows}
    for row in rows:
        if "peak_bytes" in row:
            row["memory_over_math"] = row["peak_bytes"] / peaks[MATH]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--compiled", action="store_true", help="also run torch.compile of pmf.Jvp, which takes minutes"
    )
    parser.add_argument("--quick", action="store_true", help="smoke test on small networks")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.memory_of:
        network, contestant = settings.memory_of
        print_memory(network, contestant, settings.quick)
        return 0
    contestants = [OURS, *([COMPILED] if settings.compiled else []), FIRST, MATH, TWO_PASSES, PLAIN]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    rows: list[dict[str, Any]] = []
    for network in settings.networks:
        rows += measure(network, contestants, settings.rounds, settings.quick)
    for row in rows:
        ratios = ("time_over_math", "time_over_plain", "memory_over_math")
        cells = " ".join(f"{row[key]:8.3f}" for key in ratios if key in row)
        time_ms = row.get("median_ms", 0)
        print(f"{row['network']:4} {row['contestant']:32} error {row['error']:.1e} {time_ms:9.0f} ms {cells}")
    if not all(row["right"] for row in rows):
        print("The contestants disagree: nothing was timed.", file=sys.stderr)
        return 1
    if settings.out is not None:
        write_record(settings.out, record("any_network", rows, Cpu()))
    ours = [row for row in rows if row["contestant"] == OURS]
    print(" ".join(f"{r['network']}={r['time_over_math']:.3f},{r['memory_over_math']:.3f}" for r in ours))
    return 0


if __name__ == "__main__":
    sys.exit(main())
