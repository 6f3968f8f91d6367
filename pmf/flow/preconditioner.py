"""What stands between (z, t) and the network: scalings of its input and its output."""

from typing import Protocol

from torch import Tensor

__all__ = ["NoPreconditioner", "Preconditioner"]


class Preconditioner(Protocol):
    """input(z, t) is what the network is shown; output(z, raw, t) is the prediction made of what it returns.

    z and raw are [B, C, S, S], t [B]. The *_tangent methods give the derivative along tangents of all
    arguments.
    """

    def input(self, z: Tensor, t: Tensor) -> Tensor: ...

    def input_tangent(self, z: Tensor, t: Tensor, z_t: Tensor, t_t: Tensor) -> Tensor: ...

    def output(self, z: Tensor, raw: Tensor, t: Tensor) -> Tensor: ...

    def output_tangent(
        self, z: Tensor, raw: Tensor, t: Tensor, z_t: Tensor, raw_t: Tensor, t_t: Tensor
    ) -> Tensor: ...


class NoPreconditioner:
    """The network is shown z and its output is the prediction."""

    def input(self, z: Tensor, t: Tensor) -> Tensor:
        return z

    def input_tangent(self, z: Tensor, t: Tensor, z_t: Tensor, t_t: Tensor) -> Tensor:
        return z_t

    def output(self, z: Tensor, raw: Tensor, t: Tensor) -> Tensor:
        return raw

    def output_tangent(
        self, z: Tensor, raw: Tensor, t: Tensor, z_t: Tensor, raw_t: Tensor, t_t: Tensor
    ) -> Tensor:
        return raw_t
