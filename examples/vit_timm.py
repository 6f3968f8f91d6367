"""MeanFlow on a ViT from timm: its blocks unchanged, with times and label as one additional token.

pip install timm scikit-learn
python examples/vit_timm.py [--steps N]
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pmf


class Network(nn.Module):
    """(z, t, r, label) -> the clean image (x-prediction); z [B, 1, 8, 8]."""

    def __init__(
        self, size: int = 8, patch: int = 2, classes: int = 10, width: int = 96, depth: int = 4
    ) -> None:
        super().__init__()
        self.vit = timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, img_size=size, patch_size=patch, in_chans=1,
            embed_dim=width, depth=depth, num_heads=4, num_classes=patch * patch,
        )  # fmt: skip
        self.register_buffer("frequencies", torch.linspace(1, 16, width // 2))
        self.time, self.label = nn.Linear(2 * width, width), nn.Embedding(classes + 1, width)
        self.grid, self.patch = size // patch, patch

    def forward(self, z: Tensor, t: Tensor, r: Tensor, label: Tensor) -> Tensor:
        vit, batch = self.vit, len(z)
        angles = torch.stack((t, t - r), 1)[..., None] * self.frequencies
        condition = self.time(torch.cat((angles.sin(), angles.cos()), 2).flatten(1)) + self.label(label)
        x = vit.patch_embed(z) + vit.pos_embed[:, vit.num_prefix_tokens :]
        x = vit.norm(vit.blocks(torch.cat((condition[:, None], x), 1)))
        x = vit.head(x[:, 1:]).view(batch, self.grid, self.grid, self.patch, self.patch)
        return x.transpose(2, 3).reshape(z.shape)


def main(arguments: list[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    settings = parser.parse_args(arguments)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = pmf.Jvp(Network())  # DDP(...), fully_shard(...) and torch.compile(...) go around this
    objective = pmf.flow.MeanFlow(
        prediction="x",
        guidance=pmf.flow.ClassifierFreeGuidance(omega=2.0),
        null={"label": 10},
    )
    optimizer = pmf.optim.Muon(network, lr=1e-3)
    for step in range(settings.steps):
        rows = torch.randint(len(images), (settings.batch,), generator=generator)
        draws = objective.draw(images[rows], generator)
        terms = objective(network, images[rows], draws, label=labels[rows])
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss_u {terms.loss_u.item():.3f}", flush=True)
    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return pmf.flow.sample(network, noise, prediction="x", label=torch.arange(10))


if __name__ == "__main__":
    main()
