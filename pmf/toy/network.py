"""The toy's network: a residual multi-layer perceptron that propagates a tangent with its value."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Mlp"]


class Mlp(nn.Module):
    """Residual SiLU MLP from a point z [B, D, 1, 1] and times t, h = t - r [B] to an output shaped like z.

        y = enter(embed(z), t, h);    y <- y + layer(silu(y)) for each hidden layer;    leave(silu(y))

    embed is linear, without bias, to `bottleneck` numbers, as in the paper's patch embedding. All that
    reaches the output passes it: a point in a plane does, noise of more dimensions cannot. A point is an
    image of D channels and one pixel, so that `pmf.flow` applies unchanged.
    """

    def __init__(self, dim: int, width: int, depth: int, bottleneck: int) -> None:
        """A network with `depth` hidden layers of the given width."""
        super().__init__()
        self.embed = nn.Linear(dim, bottleneck, bias=False)
        self.enter = nn.Linear(bottleneck + 2, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.leave = nn.Linear(width, dim)

    def forward(self, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """The output [B, D, 1, 1]."""
        y = self.enter(self._row(z, t, h))
        for layer in self.hidden:
            y = y + layer(F.silu(y))
        return self.leave(F.silu(y)).view_as(z)

    def jvp(self, z: Tensor, t: Tensor, h: Tensor, z_t: Tensor, t_t: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` and its tangent along (z_t, t_t), a constant for autograd; r is fixed, so h_t = t_t.

        Tangents belong to the first n samples: z_t [n, D, 1, 1] and t_t [n] give an output tangent for n
        samples.
        """
        y = self.enter(self._row(z, t, h))
        with torch.no_grad():
            y_t = F.linear(self._row(z_t, t_t, t_t), self.enter.weight)
        for layer in self.hidden:
            with torch.no_grad():
                y_t = y_t + F.linear(_silu_tangent(y, y_t), layer.get_parameter("weight"))
            y = y + layer(F.silu(y))
        with torch.no_grad():
            output_t = F.linear(_silu_tangent(y, y_t), self.leave.weight)
        return self.leave(F.silu(y)).view_as(z), output_t.view_as(z_t)

    def _row(self, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return torch.cat((self.embed(z.flatten(1)), t[:, None], h[:, None]), dim=1)


def _silu_tangent(y: Tensor, y_t: Tensor) -> Tensor:
    """The tangent of silu at the first samples of y: like its gradient, one factor per element."""
    return torch.ops.aten.silu_backward(y_t, y[: len(y_t)])
