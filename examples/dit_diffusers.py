"""MeanFlow on a DiT with adaLN from diffusers: the second time is an additional input channel.

pip install diffusers
python examples/dit_diffusers.py [--steps N] [--compile]
"""

import argparse

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import pmf


class Network(nn.Module):
    """(z, t, r, label) -> u; z [B, 1, S, S]. DiT's own timestep is t, and t - r fills a second channel."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.dit = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=2, out_channels=1, num_layers=3,
            sample_size=size, patch_size=2, norm_num_groups=1, num_embeds_ada_norm=classes,
        )  # fmt: skip

    def forward(self, z: Tensor, t: Tensor, r: Tensor, label: Tensor) -> Tensor:
        h = (t - r)[:, None, None, None].expand(z.shape)
        return self.dit(torch.cat((z, h), 1), timestep=1000 * t, class_labels=label).sample


def rings(labels: Tensor, size: int) -> Tensor:
    """A circle whose radius is given by the label."""
    axis = torch.linspace(-1, 1, size)
    radius = (axis[:, None].square() + axis.square()).sqrt()
    wanted = 0.2 + 0.15 * labels[:, None, None, None]
    return 2 * torch.exp(-100 * (radius - wanted).square()) - 1


def main(arguments: list[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--compile", action="store_true")
    settings = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network: nn.Module = pmf.Jvp(Network(settings.size, classes=4))
    if settings.compile:
        network = torch.compile(network, fullgraph=True)
    objective = pmf.flow.MeanFlow(direction="network")  # improved MeanFlow
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    for step in range(settings.steps):
        labels = torch.randint(4, (settings.batch,), generator=generator)
        x = rings(labels, settings.size)
        terms = objective(network, x, objective.draw(x, generator), label=labels)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss_u {terms.loss_u.item():.3f}", flush=True)
    network.eval()  # in training, DiT drops one label in ten
    noise = torch.randn(4, 1, settings.size, settings.size, generator=torch.Generator().manual_seed(1))
    return pmf.flow.sample(network, noise, label=torch.arange(4))


if __name__ == "__main__":
    main()
