"""The SwiGLU feed-forward layer."""

from torch import Tensor, nn

from . import tangent

__all__ = ["SwiGLU", "swiglu_width"]


def swiglu_width(hidden_size: int) -> int:
    """int(8/3 hidden), rounded up to a multiple of 8 where hidden > 1024: B 2048, L 2730, H 3416."""
    width = int(hidden_size * 8 / 3)
    return -(-width // 8) * 8 if hidden_size > 1024 else width


class SwiGLU(nn.Module):
    """y = w2(silu(w1 x) * w3 x) without biases; x [B, N, D] (Shazeer, 2020)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, width, bias=False)

    def forward(self, x: Tensor, x_t: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        gate, gate_t = tangent.linear(self.w1, x, x_t)
        up, up_t = tangent.linear(self.w3, x, x_t)
        y, y_t = tangent.swiglu(gate, up, gate_t, up_t)
        return tangent.linear(self.w2, y, y_t)
