"""A careful port of Pixel MeanFlow to plain PyTorch: the baseline of the benchmarks.

One network that returns both heads, three guidance passes over the whole batch, torch.func.jvp over the whole
batch with torch's math attention (the only torch backend with a forward mode), and torch.optim.Muon with
torch.optim.AdamW. Nothing is slow on purpose: the shared blocks run once for both heads, attention is flash
attention wherever there is no tangent, and norms and optimizers are torch's fused ones. It imports only
torch, so that it is independent of the library it is compared with.

    python -c "import plain_port; help(plain_port.objective)"
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CONDITIONS = ("class", "omega", "t_min", "t_max", "time")


class Sizes(NamedTuple):
    """The network's shape; the defaults are pMF-B/16."""

    num_classes: int = 1000
    image_size: int = 256
    patch_size: int = 16
    channels: int = 3
    hidden_size: int = 768
    depth: int = 16
    head_depth: int = 8
    num_heads: int = 12
    condition_tokens: tuple[int, ...] = (8, 4, 2, 2, 4)
    bottleneck: int = 128
    mlp_width: int = 2048


# ---- layers ---------------------------------------------------------------------------------------------


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def written_out_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As in the authors' PyTorch sampler."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


class RMSNorm(nn.RMSNorm):
    """torch's own; its fused form needs weight and input in the same dtype, and autocast gives two."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, attend: Attend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)
        self.attend = attend

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.out_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.norm1 = RMSNorm(sizes.hidden_size)
        self.attn = Attention(sizes.hidden_size, sizes.num_heads, attend)
        self.attn_scale = nn.Parameter(torch.zeros(sizes.hidden_size))
        self.norm2 = RMSNorm(sizes.hidden_size)
        self.mlp = SwiGLU(sizes.hidden_size, sizes.mlp_width)
        self.mlp_scale = nn.Parameter(torch.zeros(sizes.hidden_size))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn_scale * self.attn(self.norm1(x), cos, sin)
        return x + self.mlp_scale * self.mlp(self.norm2(x))


class ScalarEmbedder(nn.Module):
    """Linear(SiLU(Linear(cos, sin of 128 frequencies)))."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(256, hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, value: Tensor) -> Tensor:
        steps = torch.arange(128, dtype=value.dtype, device=value.device)
        angle = value[:, None] * torch.exp(-math.log(1e4) / 128 * steps)
        return self.linear2(F.silu(self.linear1(torch.cat((angle.cos(), angle.sin()), -1))))


class FinalLayer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patch_size = sizes.patch_size
        self.norm = RMSNorm(sizes.hidden_size)
        self.linear = nn.Linear(sizes.hidden_size, sizes.patch_size**2 * sizes.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Image tokens [B, side^2, D] -> [B, C, S, S]; pixels within a token are ordered (p, p, C)."""
        side, p = math.isqrt(x.shape[1]), self.patch_size
        x = self.linear(self.norm(x)).unflatten(-1, (p, p, -1)).unflatten(1, (side, side))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Condition(nn.Module):
    """Tokens [class | omega | t_min | t_max | time]: learned tokens plus an embedding per group."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.counts = sizes.condition_tokens
        for name, count in zip(CONDITIONS, self.counts, strict=True):
            self.register_parameter(
                f"{name}_tokens", nn.Parameter(torch.randn(1, count, sizes.hidden_size) * 0.02)
            )
        self.label_embedder = nn.Embedding(sizes.num_classes + 1, sizes.hidden_size)
        self.omega_embedder = ScalarEmbedder(sizes.hidden_size)
        self.t_min_embedder = ScalarEmbedder(sizes.hidden_size)
        self.t_max_embedder = ScalarEmbedder(sizes.hidden_size)
        self.time_embedder = ScalarEmbedder(sizes.hidden_size)

    def forward(self, h: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor, labels: Tensor) -> Tensor:
        embedded = (
            self.label_embedder(labels),
            self.omega_embedder(1 - 1 / omega),
            self.t_min_embedder(t_min),
            self.t_max_embedder(t_max),
            self.time_embedder(h),
        )
        groups = [
            self.get_parameter(f"{name}_tokens") + e[:, None]
            for name, e in zip(CONDITIONS, embedded, strict=True)
        ]
        return torch.cat(groups, 1)


class Network(nn.Module):
    """The Pixel MeanFlow transformer (arXiv 2601.22158) with its two heads."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes, attend: Attend = torch_attention) -> None:
        super().__init__()
        self.sizes = sizes
        side = sizes.image_size // sizes.patch_size
        self.condition = Condition(sizes)
        self.patch_down = nn.Conv2d(
            sizes.channels, sizes.bottleneck, sizes.patch_size, stride=sizes.patch_size
        )
        self.patch_up = nn.Conv2d(sizes.bottleneck, sizes.hidden_size, 1)
        tokens = sum(sizes.condition_tokens) + side**2
        self.position = nn.Parameter(torch.randn(1, tokens, sizes.hidden_size) * 0.02)
        self.shared_blocks = nn.ModuleList(
            Block(sizes, attend) for _ in range(sizes.depth - sizes.head_depth)
        )
        self.u_head = nn.ModuleList(Block(sizes, attend) for _ in range(sizes.head_depth))
        self.v_head = nn.ModuleList(Block(sizes, attend) for _ in range(sizes.head_depth))
        self.u_final = FinalLayer(sizes)
        self.v_final = FinalLayer(sizes)
        cos, sin = rotary_tables(sum(sizes.condition_tokens), side, sizes.hidden_size // sizes.num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        z: Tensor,
        h: Tensor,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
        labels: Tensor,
        heads: str = "uv",
    ) -> tuple[Tensor, ...]:
        """The images that the heads predict from z [B, C, S, S]; each condition is [B]."""
        prefix = self.condition(h, omega, t_min, t_max, labels)
        patches = self.patch_up(self.patch_down(z)).flatten(2).transpose(1, 2)
        x = torch.cat((prefix, patches), 1) + self.position
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.shared_blocks:
            x = block(x, cos, sin)
        images = []
        for head in heads:
            y = x
            for block in self.get_submodule(f"{head}_head").children():
                y = block(y, cos, sin)
            images.append(self.get_submodule(f"{head}_final")(y[:, prefix.shape[1] :]))
        return tuple(images)


def rotary_tables(prefix: int, side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, head_dim / 2], float64, of a 2-D rotary embedding; the prefix is not rotated.

    The first half of the pairs rotate with the token's row, the others with its column.
    """
    quarter = head_dim // 4
    frequency = 1e4 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angle = torch.cat((row.flatten()[:, None] * frequency, column.flatten()[:, None] * frequency), 1)
    angle = F.pad(angle, (0, 0, prefix, 0))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent elements of x [..., tokens, head_dim], as real and imaginary part, by the angle."""
    pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


# ---- training -------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """The value to differentiate, and the plain means of (V - v_g)^2 and (v - v_g)^2."""

    loss: Tensor
    loss_u: Tensor
    loss_v: Tensor


def objective(
    network: Network,
    images: Tensor,
    labels: Tensor,
    *,
    t: Tensor,
    r: Tensor,
    noise: Tensor,
    omega: Tensor,
    t_min: Tensor,
    t_max: Tensor,
    drop: Tensor,
    norm_eps: float = 0.01,
    guidance_heads: str = "uv",
) -> Losses:
    """The MeanFlow objective for images [B, C, S, S], with every draw given ([B]; noise like images).

    guidance_heads: "v" skips the u head in the guidance passes, which use only v.
    """
    x, e = images, noise
    t_, r_ = t[:, None, None, None], r[:, None, None, None]
    z = (1 - t_) * x + t_ * e
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    null = torch.full_like(labels, network.sizes.num_classes)

    def velocity(z: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (z - x) / t.clamp(0.05, 1)[:, None, None, None]

    @torch.no_grad()
    def guidance_pass(omega: Tensor, labels: Tensor) -> Tensor:
        images = network(z, zero, omega, zero, one, labels, heads=guidance_heads)
        return velocity(z, images[-1], t)

    # The guided target. Flow-matching samples have no interval; the others are guided only inside theirs.
    omega_inside = torch.where((t_min <= t) & (t <= t_max), omega, one)
    v_t = velocity(z, x, t)
    v_u = guidance_pass(one, null)
    v_c = guidance_pass(omega, labels)
    v_c_inside = guidance_pass(omega_inside, labels)
    v_g = torch.where(
        (r == t)[:, None, None, None],
        v_t + (1 - 1 / omega)[:, None, None, None] * (v_c - v_u),
        v_t + (1 - 1 / omega_inside)[:, None, None, None] * (v_c_inside - v_u),
    )
    v_g = torch.where(drop[:, None, None, None], v_t, v_g)

    def u_and_v(z: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        x_u, x_v = network(z, t - r, omega, t_min, t_max, torch.where(drop, null, labels))
        return velocity(z, x_u, t), velocity(z, x_v, t)

    with sdpa_kernel(SDPBackend.MATH):
        # Three results with has_aux, which torch's annotation omits.
        u, du_dt, v = torch.func.jvp(u_and_v, (z, t, r), (v_c_inside, one, zero), has_aux=True)  # type: ignore[misc]
    V = u + (t_ - r_) * du_dt.detach()

    error_u = (V - v_g).square().sum((1, 2, 3))
    error_v = (v - v_g).square().sum((1, 2, 3))
    loss = sum(error / (error.detach() + norm_eps) for error in (error_u, error_v)).mean()
    return Losses(loss, error_u.detach().mean() / x[0].numel(), error_v.detach().mean() / x[0].numel())


def optimizers(network: Network, lr: float = 1e-3) -> list[torch.optim.Optimizer]:
    """Muon for the weights of linear layers, AdamW for everything else."""
    matrices = [m.weight for m in network.modules() if isinstance(m, nn.Linear)]
    muon = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in muon]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


# ---- sampling -------------------------------------------------------------------------------------------


@torch.inference_mode()
def sample(
    network: Network, labels: Tensor, noise: Tensor, omega: float, interval: tuple[float, float]
) -> Tensor:
    """Images in one step from noise [B, C, S, S]: z - (1 - 0) u(z, 1, 0)."""
    one = torch.ones(len(labels), dtype=noise.dtype, device=noise.device)
    conditions = one, omega * one, interval[0] * one, interval[1] * one, labels
    (x,) = network(noise, *conditions, heads="u")
    u = (noise - x) / 1.0
    return noise - u


# ---- weights under other names --------------------------------------------------------------------------

RENAMED = {
    "condition.label_embedder.embedding.weight": "condition.label_embedder.weight",
    "patch_embedding.weight_down": "patch_down.weight",
    "patch_embedding.bias_down": "patch_down.bias",
    "patch_embedding.weight_up": "patch_up.weight",
    "patch_embedding.bias_up": "patch_up.bias",
}
"""pixelmeanflow's names, where they differ, to those here."""


def load(network: Network, weights: Mapping[str, Tensor]) -> Network:
    """Load pixelmeanflow's weights into the network; the names must correspond one to one."""
    named = {RENAMED.get(name, name): weight for name, weight in weights.items()}
    own = network.state_dict()
    network.load_state_dict({n: w.reshape(own[n].shape) if n in own else w for n, w in named.items()})
    return network


def gradients(network: Network, names: Iterable[str]) -> dict[str, Tensor]:
    """Gradients under pixelmeanflow's names; zeros where there is none."""
    own = dict(network.named_parameters())
    found = {}
    for name in names:
        p = own[RENAMED.get(name, name)]
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad
    return found
