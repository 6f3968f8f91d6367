"""Attention and its tangent, written out.

    S = c Q K^T + mask      P = softmax(S)      O = P V
    tS = c (tQ K^T + Q tK^T)      H = P o tS      r = rowsum(H)      tO = H V - r o O + P tV

A row that may attend to nothing gives zeros. Memory is quadratic in the sequence length, unlike the kernels'.
"""

import torch
from torch import Tensor

__all__ = ["attention", "attention_jvp"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """O = softmax(c Q K^T + mask) V for query [..., Nq, D], key [..., Nk, D], value [..., Nk, Dv]."""
    if enable_gqa:
        key, value = _share_heads(query, key), _share_heads(query, value)
    P = _probabilities(query, key, attn_mask, is_causal, _scale(query, scale))
    return P @ value


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """(O, tO): attention and its derivative along (query_t, key_t, value_t); None is a zero tangent."""
    Q, K, V = query, key, value
    tQ = torch.zeros_like(Q) if query_t is None else query_t
    tK = torch.zeros_like(K) if key_t is None else key_t
    tV = torch.zeros_like(V) if value_t is None else value_t
    if enable_gqa:
        K, V, tK, tV = (_share_heads(Q, x) for x in (K, V, tK, tV))
    c = _scale(Q, scale)

    P = _probabilities(Q, K, attn_mask, is_causal, c)
    O = P @ V  # noqa: E741, the paper's name
    tS = c * (tQ @ K.mT + Q @ tK.mT)
    H = P * tS
    r = H.sum(-1, keepdim=True)
    tO = H @ V - r * O + P @ tV
    return O, tO


def _probabilities(Q: Tensor, K: Tensor, mask: Tensor | None, is_causal: bool, c: float) -> Tensor:
    S = c * (Q @ K.mT)
    if mask is not None:
        S = S.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else S + mask.to(S.dtype)
    if is_causal:  # aligned at the top left, as in F.scaled_dot_product_attention
        future = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu(1)
        S = S.masked_fill(future, -torch.inf)
    # Filled before and after, so that neither the softmax nor its derivatives ever see a row of -inf.
    nothing = (S == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(S.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)


def _share_heads(query: Tensor, x: Tensor) -> Tensor:
    """Repeat each of the Hk heads of x for the H // Hk query heads that share it."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale
