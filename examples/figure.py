"""The figure of docs/any-network.md: one-step samples of two examples next to their data.

python examples/figure.py [--out docs/any-network.png] [--points-steps N] [--signal-steps N]
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import points
import signal_1d
import torch


def draw(drawn_points: torch.Tensor, drawn_signals: torch.Tensor, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    generator = torch.Generator().manual_seed(3)
    pairs = (
        (points.moons(2000, generator), drawn_points),
        (signal_1d.oscillations(12, generator), drawn_signals[:12]),
    )
    figure, axes = plt.subplots(2, 2, figsize=(7, 7), layout="constrained")
    titles = "data", "samples in one step"
    for column, title in enumerate(titles):
        axes[0, column].scatter(*pairs[0][column].T, s=2, color=("tab:blue", "tab:orange")[column])
        axes[0, column].set(title=f"points: {title}", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
        for i, signal in enumerate(pairs[1][column]):
            axes[1, column].plot(signal - 1.4 * i, color=("tab:blue", "tab:orange")[column], linewidth=1.2)
        axes[1, column].set(title=f"signals: {title}", yticks=[])
    figure.savefig(out, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/any-network.png"))
    parser.add_argument("--points-steps", default="5000")
    parser.add_argument("--signal-steps", default="1000")
    settings = parser.parse_args(arguments)
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as both:
        drawn_points = both.submit(points.main, ["--steps", settings.points_steps])
        drawn_signals = both.submit(signal_1d.main, ["--steps", settings.signal_steps])
        draw(drawn_points.result(), drawn_signals.result(), settings.out)
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    main()
