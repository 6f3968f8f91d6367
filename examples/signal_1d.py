"""MeanFlow on a signal: a small residual network that samples damped oscillations in one step.

python examples/signal_1d.py [--steps N]
"""

import argparse

import torch
from torch import Tensor, nn

import pmf

LENGTH = 64


class Network(nn.Module):
    """(z, t, r) -> the clean signal (x-prediction); z [B, LENGTH]."""

    def __init__(self, width: int = 320, depth: int = 3) -> None:
        super().__init__()
        self.times = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.first, self.last = nn.Linear(LENGTH, width), nn.Linear(width, LENGTH)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )

    def forward(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        x = self.first(z)
        c = self.times(torch.stack((t, t - r), 1))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x) + c)
        return self.last(x)


def oscillations(count: int, generator: torch.Generator) -> Tensor:
    """A plucked string: one to three periods with any phase, decaying after a random onset."""
    frequency, phase, onset = torch.rand(3, count, 1, generator=generator)
    s = torch.linspace(0, 1, LENGTH)
    since = s - 0.4 * onset
    wave = torch.sin(2 * torch.pi * ((2 + 3 * frequency) * since + phase))
    return torch.where(since > 0, wave * torch.exp(-3 * since), 0.0)


def train(steps: int, batch: int = 128) -> Network:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = Network()
    objective = pmf.flow.MeanFlow(prediction="x", direction="network", times=pmf.flow.PlaneTimes(0.4, 1.2))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.9, 0.99))
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
    parser.add_argument("--steps", type=int, default=1500)
    network = train(parser.parse_args(arguments).steps)
    noise = torch.randn(256, LENGTH, generator=torch.Generator().manual_seed(1))
    signals = pmf.flow.sample(network, noise, prediction="x")
    data = oscillations(4096, torch.Generator().manual_seed(2))
    distance = torch.cdist(signals, data).min(1).values.median() / LENGTH**0.5
    print(f"median distance of a one-step sample to the data (rms): {distance:.3f}")
    return signals


if __name__ == "__main__":
    main()
