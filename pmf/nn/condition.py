"""The network's conditioning, as tokens before the image tokens."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tangent

__all__ = ["Condition", "ConditionTokens", "LabelEmbedder", "ScalarEmbedder"]


class Condition(NamedTuple):
    """One value per sample, each [B]: h = t - r, guidance scale omega, its interval, class label.

    The label `num_classes` is the null label. Scalars stay in float32 (or float64) whatever the network's
    dtype.
    """

    h: Tensor
    omega: Tensor
    t_min: Tensor
    t_max: Tensor
    labels: Tensor


class ScalarEmbedder(nn.Module):
    """Linear(SiLU(Linear(s))) of sinusoidal features s [B, 256] of a scalar."""

    features = 256
    max_period = 1e4

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(self.features, hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for linear in (self.linear1, self.linear2):
            linear.weight.normal_(0.0, linear.in_features**-0.5, generator=generator)
            linear.bias.zero_()

    def forward(self, s: Tensor, s_t: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        a, a_t = tangent.linear(self.linear1, s, s_t)
        if a_t is not None:
            with torch.no_grad():
                gate = torch.sigmoid(a[: len(a_t)])
                a_t = a_t * (gate + a[: len(a_t)] * gate * (1 - gate))
        return tangent.linear(self.linear2, F.silu(a), a_t)

    @classmethod
    def sinusoid(cls, x: Tensor) -> Tensor:
        """[...] -> [..., 256]: cos then sin of x f_i, f_i = max_period^(-i / 128) (Vaswani et al., 2017)."""
        angle = x[..., None] * cls._frequencies(x)
        return torch.cat((angle.cos(), angle.sin()), -1)

    @classmethod
    def sinusoid_tangent(cls, x: Tensor, x_t: Tensor) -> Tensor:
        """Tangent of `sinusoid` along x_t, both [...]."""
        frequency = cls._frequencies(x)
        angle = x[..., None] * frequency
        return torch.cat((-angle.sin(), angle.cos()), -1) * (
            x_t[..., None] * torch.cat((frequency, frequency))
        )

    @classmethod
    def _frequencies(cls, like: Tensor) -> Tensor:
        half = cls.features // 2
        exponent = torch.arange(half, device=like.device, dtype=like.dtype) / half
        return torch.exp(-math.log(cls.max_period) * exponent)


class LabelEmbedder(nn.Module):
    """A table of num_classes + 1 vectors; the last one means "no label"."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, hidden_size)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.embedding.weight.normal_(0.0, self.embedding.embedding_dim**-0.5, generator=generator)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels)


class ConditionTokens(nn.Module):
    """Tokens [class | omega | t_min | t_max | time]: each group's learned tokens plus its embedding.

    The omega embedder receives 1 - 1/omega, the time embedder h = t - r. Only h has a tangent.
    """

    def __init__(self, num_classes: int, hidden_size: int, counts: tuple[int, int, int, int, int]) -> None:
        super().__init__()
        self.counts = counts
        self.class_tokens, self.omega_tokens, self.t_min_tokens, self.t_max_tokens, self.time_tokens = (
            nn.Parameter(torch.empty(1, count, hidden_size)) for count in counts
        )
        self.label_embedder = LabelEmbedder(num_classes, hidden_size)
        self.omega_embedder = ScalarEmbedder(hidden_size)
        self.t_min_embedder = ScalarEmbedder(hidden_size)
        self.t_max_embedder = ScalarEmbedder(hidden_size)
        self.time_embedder = ScalarEmbedder(hidden_size)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for tokens in self._tokens():
            tokens.normal_(0.0, tokens.shape[-1] ** -0.5, generator=generator)
        embedders = self.omega_embedder, self.t_min_embedder, self.t_max_embedder, self.time_embedder
        for embedder in (self.label_embedder, *embedders):
            embedder.reset_parameters(generator)

    def forward(self, condition: Condition, h_t: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, P, D] and, for h_t [n], their tangent [n, P, D] (zero except in the time group)."""
        h, omega, t_min, t_max, labels = condition
        dtype = self.class_tokens.dtype
        scalars = torch.stack((1 - 1 / omega, t_min, t_max, h))
        features = ScalarEmbedder.sinusoid(scalars).to(dtype)
        h_features_t = None if h_t is None else ScalarEmbedder.sinusoid_tangent(h[: len(h_t)], h_t).to(dtype)
        time, time_t = self.time_embedder(features[3], h_features_t)
        embedded = (
            self.label_embedder(labels),
            self.omega_embedder(features[0])[0],
            self.t_min_embedder(features[1])[0],
            self.t_max_embedder(features[2])[0],
            time,
        )
        groups = [e[:, None].expand(-1, count, -1) for e, count in zip(embedded, self.counts, strict=True)]
        tokens = torch.cat(groups, 1) + torch.cat(self._tokens(), 1)
        if time_t is None:
            return tokens, None
        constant = time_t.new_zeros(len(time_t), sum(self.counts[:-1]), time_t.shape[-1])
        return tokens, torch.cat((constant, time_t[:, None].expand(-1, self.counts[-1], -1)), 1)

    def _tokens(self) -> tuple[Tensor, ...]:
        return self.class_tokens, self.omega_tokens, self.t_min_tokens, self.t_max_tokens, self.time_tokens
