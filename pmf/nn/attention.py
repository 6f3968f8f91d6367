"""Self-attention with normalised queries and keys and rotary embedding on the image tokens."""

from torch import Tensor, nn

from . import tangent
from .norm import RMSNorm

__all__ = ["Attention"]


class Attention(nn.Module):
    """out_proj(softmax(q k^T / sqrt(d)) v), q and k RMS-normalised per head and rotated; x [B, N, D]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, x_t: Tensor | None = None, keep: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D], x_t [n, N, D] or None -> [B, N, D], its tangent; of the last `keep` tokens only."""
        q, q_t = tangent.linear(self.q_proj, x, x_t)
        k, k_t = tangent.linear(self.k_proj, x, x_t)
        v, v_t = tangent.linear(self.v_proj, x, x_t)
        q, k, q_t, k_t = tangent.rotary_qk_norm(
            self._split(q),
            self._split(k),
            self.q_norm.weight,
            self.k_norm.weight,
            cos,
            sin,
            None if q_t is None else self._split(q_t),
            None if k_t is None else self._split(k_t),
            self.q_norm.eps,
        )
        if keep is not None:
            q, q_t = q[:, :, -keep:], None if q_t is None else q_t[:, :, -keep:]
        y, y_t = tangent.attention(q, k, self._split(v), q_t, k_t, None if v_t is None else self._split(v_t))
        return tangent.linear(self.out_proj, self._join(y), None if y_t is None else self._join(y_t))

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, H, N, D / H], a view."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        """[B, H, N, D / H] -> [B, N, D], a view where attention kept the layout of the query."""
        return x.transpose(1, 2).flatten(2)
