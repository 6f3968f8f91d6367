"""MeanFlow on a signal: a 1-D U-Net, convolutions only, that samples plucked strings in one step.

python examples/signal_1d.py [--steps N]
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pmf

LENGTH = 64


class Residual(nn.Module):
    """Two convolutions, scaled and shifted by the embedded times."""

    def __init__(self, inputs: int, outputs: int, times: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList((nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)))
        self.first = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv1d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv1d(inputs, outputs, 1)
        self.time = nn.Linear(times, 2 * outputs)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.time(c)[..., None].chunk(2, 1)
        y = self.norms[1](self.first(F.silu(self.norms[0](x))))
        return self.skip(x) + self.second(F.silu(y * (1 + scale) + shift))


class Network(nn.Module):
    """(z, t, r) -> the clean signal (x-prediction); z [B, LENGTH]."""

    def __init__(self, widths: tuple[int, ...] = (32, 48, 64, 96), times: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(4))
        self.times = nn.Sequential(nn.Linear(16, times), nn.SiLU(), nn.Linear(times, times), nn.SiLU())
        self.first = nn.Conv1d(1, widths[0], 3, padding=1)
        levels = list(zip(widths, widths[1:], strict=False))
        self.down = nn.ModuleList(Residual(width, width, times) for width, _ in levels)
        self.smaller = nn.ModuleList(nn.Conv1d(width, wider, 4, 2, 1) for width, wider in levels)
        self.middle = Residual(widths[-1], widths[-1], times)
        self.larger = nn.ModuleList(nn.ConvTranspose1d(wider, width, 4, 2, 1) for width, wider in levels)
        self.up = nn.ModuleList(Residual(2 * width, width, times) for width, _ in levels)
        self.last = nn.Sequential(nn.GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv1d(widths[0], 1, 3, 1, 1))

    def forward(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        angles = torch.stack((t, t - r), 1)[..., None] * self.frequencies
        c = self.times(torch.cat((angles.sin(), angles.cos()), 2).flatten(1))
        x, kept = self.first(z[:, None]), []
        for block, smaller in zip(self.down, self.smaller, strict=True):
            x = block(x, c)
            kept.append(x)
            x = smaller(x)
        x = self.middle(x, c)
        for block, larger in zip(reversed(self.up), reversed(self.larger), strict=True):
            x = block(torch.cat((larger(x), kept.pop()), 1), c)
        return self.last(x)[:, 0]


def oscillations(count: int, generator: torch.Generator) -> Tensor:
    """Plucked strings: silence, then a decaying wave of any phase, two to five periods in LENGTH samples."""
    frequency, phase, onset = torch.rand(3, count, 1, generator=generator)
    s = torch.linspace(0, 1, LENGTH)
    since = s - 0.4 * onset
    wave = torch.sin(2 * torch.pi * ((2 + 3 * frequency) * since + phase))
    return torch.where(since > 0, wave * torch.exp(-3 * since), 0.0)


def train(steps: int, batch: int = 64) -> Network:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = Network()
    # A wide distribution of times: one step is t = 1, r = 0.
    times = pmf.flow.PlaneTimes(mean=0.0, std=2.0, data_proportion=0.25)
    objective = pmf.flow.MeanFlow(prediction="x", direction="network", times=times)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = oscillations(batch, generator)
        terms = objective(network, x, objective.draw(x, generator))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}: loss_u {terms.loss_u.item():.3f}", flush=True)
    return network


def main(arguments: list[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    network = train(parser.parse_args(arguments).steps)
    noise = torch.randn(256, LENGTH, generator=torch.Generator().manual_seed(1))
    signals = pmf.flow.sample(network, noise, prediction="x")
    data = oscillations(4096, torch.Generator().manual_seed(2))
    distance = torch.cdist(signals, data).min(1).values.median() / LENGTH**0.5
    print(f"median distance of a one-step sample to the data (rms): {distance:.3f}")
    return signals


if __name__ == "__main__":
    main()
