"""MeanFlow on points in the plane: an MLP that samples two moons in one step.

python examples/points.py [--steps N]
"""

import argparse
import math

import torch
from torch import Tensor, nn

import pmf


class Network(nn.Module):
    """(z, t, r) -> u: any module with these three arguments will do."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(4))
        layers: list[nn.Module] = [nn.Linear(2 + 12 + 16, width), nn.GELU()]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        times = torch.stack((t, t - r), 1)[..., None] * self.frequencies
        places = z[..., None] * self.frequencies[:3]  # one step tears the plane apart between the moons
        waves = [wave.flatten(1) for x in (times, places) for wave in (x.sin(), x.cos())]
        return self.layers(torch.cat((z, *waves), 1))


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Two half circles with a little noise."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.stack((angle.cos() - 0.5, angle.sin() - 0.25), 1)
    side = 1 - 2 * torch.randint(2, (count, 1), generator=generator)
    return 1.2 * side * upper + 0.05 * torch.randn(count, 2, generator=generator)


def train(steps: int, batch: int = 512) -> Network:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = Network()
    # A wide distribution of times: one step is t = 1, r = 0.
    objective = pmf.flow.MeanFlow(times=pmf.flow.PlaneTimes(mean=0.0, std=2.0, data_proportion=0.25))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = moons(batch, generator)
        terms = objective(network, x, objective.draw(x, generator))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step}: loss_u {terms.loss_u.item():.3f}", flush=True)
    return network


def main(arguments: list[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    steps = parser.parse_args(arguments).steps
    network = train(steps)
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    points = pmf.flow.sample(network, noise)
    data = moons(2000, torch.Generator().manual_seed(2))
    distance = torch.cdist(points, data).min(1).values.median()
    print(f"median distance of a one-step sample to the data: {distance:.3f}")
    return points


if __name__ == "__main__":
    main()
