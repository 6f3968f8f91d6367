"""The toy's network: a multi-layer perceptron that propagates a tangent with its value."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Mlp"]


class Mlp(nn.Module):
    """ReLU MLP from a point z [B, D, 1, 1] and times t, h = t - r [B] to an output shaped like z.

    A point is an image of D channels and one pixel, so that `pmf.flow` applies unchanged.
    """

    def __init__(self, dim: int, width: int, depth: int) -> None:
        """A network of `depth` hidden layers of the given width."""
        super().__init__()
        inputs = [dim + 2] + [width] * (depth - 1)
        self.hidden = nn.ModuleList(nn.Linear(size, width) for size in inputs)
        self.last = nn.Linear(width, dim)

    def forward(self, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """The output [B, D, 1, 1]."""
        value = _row(z, t, h)
        for layer in self.hidden:
            value = F.relu(layer(value))
        return self.last(value).view_as(z)

    def jvp(self, z: Tensor, t: Tensor, h: Tensor, z_t: Tensor, t_t: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` and its tangent along (z_t, t_t), a constant for autograd; r is fixed, so h_t = t_t.

        Tangents belong to the first n samples: z_t [n, D, 1, 1] and t_t [n] give an output tangent for n
        samples. A Linear layer multiplies the tangent by its weight; a ReLU passes it where the value is
        positive.
        """
        value, tangent = _row(z, t, h), _row(z_t, t_t, t_t)
        for layer in self.hidden:
            before = layer(value)
            tangent = F.linear(tangent, layer.get_parameter("weight").detach()) * (before[: len(tangent)] > 0)
            value = F.relu(before)
        output, output_t = self.last(value), F.linear(tangent, self.last.weight.detach())
        return output.view_as(z), output_t.view_as(z_t)


def _row(z: Tensor, t: Tensor, h: Tensor) -> Tensor:
    return torch.cat((z.flatten(1), t[:, None], h[:, None]), dim=1)
