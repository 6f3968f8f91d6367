"""Operations in the forms that networks use, each a function of a matrix [6, 6] with a tangent."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pmf


class Spelled(nn.Module):
    """Single operations, each in its functional and its in-place form."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(6, 6).double(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def in_place_rope(x: Tensor) -> Tensor:
    x = x.clone()
    a, b = x[..., 0::2], x[..., 1::2]
    kept = a.clone()
    a.mul_(0.6).sub_(b * 0.8)
    b.mul_(0.6).add_(kept, alpha=0.8)
    return x


def written_into_zeros(x: Tensor) -> Tensor:
    """The buffer has no tangent when the views are taken, and one afterwards."""
    buffer = torch.zeros(2, *x.shape, dtype=x.dtype)
    first, flat = buffer[0], buffer.view(-1)
    first.copy_(x)
    buffer[1, :, 2:4] = x[:, :2] * 3
    flat[:3].mul_(2)
    return buffer.sum(0) + first.sin() + flat.sum()


def shared_then_written(x: Tensor) -> Tensor:
    """y shares the tangent of x when it is overwritten; x must keep its own."""
    y = x + 1
    y.relu_()
    z = x - 2
    z.mul_(x)
    return x * y + z + (x + torch.ones(1, dtype=x.dtype)).tanh_()


def transposed_in_place(x: Tensor) -> Tensor:
    return x.clone().t_().unsqueeze_(0).squeeze_().sin().t()


def strided(x: Tensor) -> Tensor:
    diagonal = x.contiguous().as_strided((3,), (x.shape[1] + 1,), 1)
    return x * diagonal.exp().sum() + x.unfold(1, 2, 1).prod(-1).sum()


def detached(x: Tensor) -> Tensor:
    return x * x.detach() + x.data.sin()


def overwritten(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1].zero_()
    y[0].fill_(3.0)
    y[:, 2:4].copy_(torch.ones(2, dtype=x.dtype))
    return y * x


def complex_numbers(x: Tensor) -> Tensor:
    z = torch.fft.fft(x)
    z = torch.view_as_complex(torch.view_as_real(z.conj() * 2j).contiguous()) * z.conj().resolve_conj()
    return torch.fft.ifft(z * z.imag).real + z.abs() + torch.polar(x.abs(), x).imag


def real_and_complex_views_of_a_buffer(x: Tensor) -> Tensor:
    """Written as one, read as the other."""
    z, y = torch.zeros(6, 6, dtype=torch.complex128), torch.zeros(73, dtype=x.dtype)
    torch.view_as_real(z)[..., 0].copy_(x)
    z.imag.add_(x.sin())
    y[:72:2].copy_(x.flatten())
    halves = torch.view_as_complex(y[:72].view(6, 6, 2))
    halves.mul_(2j)
    return (z * z).real + z.imag * y[1:72:2].view(6, 6)


def rotary_by_complex_numbers(x: Tensor) -> Tensor:
    turns = torch.polar(torch.ones(3, dtype=x.dtype), torch.arange(3, dtype=x.dtype) + 1)
    return torch.view_as_real(torch.view_as_complex(x.reshape(-1, 3, 2)) * turns).flatten(1)


def padded(x: Tensor) -> Tensor:
    return (
        F.pad(x, (1, 2), value=7.0).square() @ torch.ones(9, 6, dtype=x.dtype)
        + F.pad(x, (1, 0), "circular")[:, :6]
    )


def integers(x: Tensor) -> Tensor:
    order = x.argsort(-1)
    kept = (x > 0).double()
    return (
        x.gather(1, order) * kept
        + x.long().double() * x
        + x.topk(6).values
        + x[order[:, 0]].max(1, True).values
    )


def products(x: Tensor) -> Tensor:
    w = x.softmax(-1) @ x.transpose(0, 1)
    return (
        w @ x
        + torch.einsum("ij,kj->ki", x, x) @ x
        + torch.bmm(x[None], x.t()[None])[0] @ x
        + torch.addmm(x, w, x)
    )


def reductions(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True) + x.var(1, keepdim=True) + x.logsumexp(0) + x.cumprod(1) + x.std()


def masked(x: Tensor) -> Tensor:
    y = x.masked_fill(x > 1, -1.0)
    y[x < -1] = 0.5
    z = torch.where(x > 0, x, x.exp())
    return y * z + x.clone().index_add_(0, torch.tensor([0, 1]), x[1:3] * 2)


def split(x: Tensor) -> Tensor:
    a, b, c = x.chunk(3, 1)
    a, b = a.unbind(1)[0], torch.stack((b[:, 0], c[:, 1]), 1)
    return (
        torch.cat((a[:, None] * b, x, c.new_ones(len(x), 3)), 1).roll(1, 1)[:, :6].flip(0)
        * x.repeat(1, 2)[:, 3:9]
    )


def scalars(x: Tensor) -> Tensor:
    return 2 - x / 3 + (1 / (x.square() + 1)) ** 1.5 + 0.5 * (x + 1) ** 2 + x.clamp(-0.5, 0.5) * x


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        frozen = x.sin()
    return x * frozen


def mapped(x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: row.sin() * row.sum())(x)


def rms_norms(x: Tensor) -> Tensor:
    written = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return (
        F.rms_norm(x, (6,), torch.ones(6, dtype=x.dtype))
        + pmf.ops.rms_norm(x, torch.ones(6).double())
        + written
    )


def ours(x: Tensor) -> Tensor:
    y = pmf.ops.swiglu(x, x.sin())
    y = pmf.ops.gated_residual(x[None], y[None], x.mean(0))
    return pmf.ops.attention(y[None], y[None] * 2, y[None])[0, 0]


def arguments_without_a_kernel(x: Tensor) -> Tensor:
    """An attention mask, times and rotary tables that depend on the primals."""
    y, weight = x[None, None], torch.ones(6, dtype=x.dtype)
    out = F.scaled_dot_product_attention(y, y.cos(), y.sin(), x.tanh())[0, 0]
    query, key = pmf.ops.rotary_qk_norm(y, y.sin(), weight, weight, x[:, :3].cos(), x[:, 3:].sin())
    images = x.view(6, 1, 2, 3).repeat(1, 2, 1, 2)[..., :2]
    velocity = pmf.ops.patch_velocity(images.flatten(1)[:, None], images, x[:, 0].sigmoid(), 0.05)
    return out + (query * key)[0, 0] + velocity.flatten(1)[:, :6]


def attention_past_the_replacement(x: Tensor) -> Tensor:
    """replace_sdpa cannot replace an operator's own overload."""
    q, mask = x[None, None], x[:, :1] * torch.ones(1, len(x), dtype=x.dtype)
    attend = torch.ops.aten.scaled_dot_product_attention
    out = attend(q, q.sin(), q, mask.detach()) + attend(
        torch.cat((q, -q), 1), q, q, None, 0.0, True, enable_gqa=True
    )
    return out[0, 1] + out[0, 0]


def scattered(x: Tensor) -> Tensor:
    rows = torch.tensor([0, 2])
    y = torch.zeros_like(x).index_put_((rows,), x[rows] * 2).scatter_add_(1, rows.expand(6, 2), x[:, :2])
    return torch.slice_scatter(y, x[:1] * 3, 0, 1, 2) + torch.as_strided_scatter(
        x.contiguous(), x[0], (6,), (1,), 2
    )


def activations_in_place(x: Tensor) -> Tensor:
    y = F.dropout(x * 1, 0.5, training=False, inplace=True)
    y = y + F.relu(x * 1, inplace=True) + F.silu(x * 1, inplace=True) + F.elu(x * 1, inplace=True)
    return y + F.leaky_relu(x * 1, inplace=True) + F.glu(torch.cat((x, x), -1)) + F.logsigmoid(x) + F.celu(x)


def powers_in_place(x: Tensor) -> Tensor:
    """Their operators have overloads of other names than those that return a new tensor."""
    y = (x * 1).square_() + (x.abs() + 1).pow_(1.5) + (x.abs() + 1).pow_(x)
    return y + (x * 1).ldexp_(torch.ones(6, dtype=x.dtype)) + (x.abs() + 1).float_power_(x)


def memory_formats(x: Tensor) -> Tensor:
    image = x.reshape(1, 2, -1, 3).contiguous(memory_format=torch.channels_last) * 2
    y = F.conv2d(image, torch.ones(2, 2, 3, 3, dtype=x.dtype), padding=1)
    pooled = F.adaptive_avg_pool2d(y, 1)  # of channels_last, restrided in place
    return (F.instance_norm(F.max_pool2d(y, 1)).add_(image) * pooled).flatten().reshape(x.shape)


SPELLED = (
    in_place_rope, written_into_zeros, shared_then_written, transposed_in_place, strided, detached,
    overwritten, complex_numbers, real_and_complex_views_of_a_buffer, rotary_by_complex_numbers, padded,
    integers, products, reductions, masked, split, scalars, without_grad, mapped, rms_norms, ours,
    memory_formats, arguments_without_a_kernel, attention_past_the_replacement, scattered,
    activations_in_place, powers_in_place,
)  # fmt: skip
