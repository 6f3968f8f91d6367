"""Attention and its tangent, written out.

    S = c Q K^T + mask      P = softmax(S)      O = P V
    tS = c (tQ K^T + Q tK^T)      H = P o tS      r = rowsum(H)      tO = H V - r o O + P tV

A row that may attend to nothing gives zeros. Values hidden by a mask have no effect, even if they are NaN.
Unlike the kernels', memory is quadratic in the sequence length.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["attention", "attention_jvp", "attention_varlen", "attention_varlen_jvp"]

Window = tuple[int | None, int | None]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = (None, None),
    return_lse: bool = False,
) -> Any:
    """O = softmax(c Q K^T + mask) V for query [..., Nq, D], key [..., Nk, D], value [..., Nk, Dv].

    window: query i sees keys i - left to i + right; None means no limit. With return_lse (O, log sum exp S).
    """
    if enable_gqa:
        key, value = _share_heads(query, key), _share_heads(query, value)
    seen = _seen(query, key, attn_mask, is_causal, window)
    P, lse = _probabilities(query, key, attn_mask, seen, _scale(query, scale))
    O = _shown(_weigh(P, value, seen), seen)  # noqa: E741
    return (O, lse) if return_lse else O


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
    window: Window = (None, None),
    return_lse: bool = False,
) -> Any:
    """(O, tO): attention and its derivative along (query_t, key_t, value_t); None is a zero tangent.

    With return_lse (O, tO, lse, r), where r is the derivative of lse.
    """
    Q, K, V = query, key, value
    tQ = torch.zeros_like(Q) if query_t is None else query_t
    tK = torch.zeros_like(K) if key_t is None else key_t
    tV = torch.zeros_like(V) if value_t is None else value_t
    if enable_gqa:
        K, V, tK, tV = (_share_heads(Q, x) for x in (K, V, tK, tV))
    c = _scale(Q, scale)
    seen = _seen(Q, K, attn_mask, is_causal, window)

    P, lse = _probabilities(Q, K, attn_mask, seen, c)
    O = _shown(_weigh(P, V, seen), seen)  # noqa: E741, the paper's name
    tS = c * (_scores(tQ, K, seen) + _scores(Q, tK, seen))
    H = P * tS
    r = H.sum(-1, keepdim=True)
    tO = _weigh(H, V, seen) - r * O + _weigh(P, tV, seen)
    tO = _shown(tO, seen)
    return (O, tO, lse, r.squeeze(-1)) if return_lse else (O, tO)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = (None, None),
    return_lse: bool = False,
) -> Any:
    """Attention over packed sequences, query [T, H, D], as one sequence with a mask."""
    mask = same_sequence(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0], is_causal, window)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    out, lse = attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa, return_lse=True)
    return (out.transpose(0, 1), lse) if return_lse else out.transpose(0, 1)


def attention_varlen_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = (None, None),
    return_lse: bool = False,
) -> Any:
    """(O, tO) over packed sequences."""
    mask = same_sequence(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0], is_causal, window)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    q_t, k_t, v_t = (None if x is None else x.transpose(0, 1) for x in (query_t, key_t, value_t))
    out, out_t, *rest = attention_jvp(
        q, k, v, q_t, k_t, v_t, mask, scale=scale, enable_gqa=enable_gqa, return_lse=True
    )
    found = out.transpose(0, 1), out_t.transpose(0, 1)
    return (*found, *rest) if return_lse else found


def same_sequence(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, T: int, S: int, is_causal: bool, window: Window
) -> Tensor:
    """[T, S]: whether query and key belong to the same sequence and the key is in the query's window."""
    sequence_q, place_q = _places(cu_seqlens_q, T)
    sequence_k, place_k = _places(cu_seqlens_k, S)
    return (sequence_q[:, None] == sequence_k) & _in_window(place_q, place_k, is_causal, window)


def _places(cu_seqlens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """For each row, the index of its sequence and its position in it."""
    row = torch.arange(rows, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].to(row.dtype).contiguous(), row, right=True)
    return sequence, row - cu_seqlens[sequence]


def _seen(Q: Tensor, K: Tensor, mask: Tensor | None, is_causal: bool, window: Window) -> Tensor | None:
    """[..., Nq, Nk]: whether a query may attend to a key; None if all may attend to all."""
    if mask is None and not is_causal and window == (None, None):
        return None
    places_q, places_k = (torch.arange(x.shape[-2], device=Q.device) for x in (Q, K))
    seen = _in_window(places_q, places_k, is_causal, window)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -torch.inf)
    return seen


def _in_window(query: Tensor, key: Tensor, is_causal: bool, window: Window) -> Tensor:
    """[Nq, Nk], from positions: aligned at the top left, as in F.scaled_dot_product_attention."""
    ahead = key - query[:, None]
    left, right = window
    seen = torch.ones_like(ahead, dtype=torch.bool) if not is_causal else ahead <= 0
    if left is not None:
        seen = seen & (ahead >= -left)
    if right is not None:
        seen = seen & (ahead <= right)
    return seen


def _probabilities(
    Q: Tensor, K: Tensor, mask: Tensor | None, seen: Tensor | None, c: float
) -> tuple[Tensor, Tensor]:
    """P and the log-sum-exp of the rows."""
    S = c * _scores(Q, K, seen)
    if mask is not None and mask.dtype != torch.bool:
        S = S + mask.to(S.dtype)
    if seen is not None:
        S = S.masked_fill(~seen, -torch.inf)
    # Masked before and after, so that neither the softmax nor its derivatives see a row of -inf.
    nothing = (S == -torch.inf).all(-1, keepdim=True)
    S = S.masked_fill(nothing, 0.0)
    P = torch.softmax(S, -1).masked_fill(nothing, 0.0)
    lse = torch.logsumexp(S, -1).masked_fill(nothing.squeeze(-1), -torch.inf)
    return (P if seen is None else P.masked_fill(~seen, 0.0)), lse


def _shown(O: Tensor, seen: Tensor | None) -> Tensor:  # noqa: E741
    """O with 0 for queries that attend to nothing, so that no gradient flows back from them."""
    return O if seen is None else O.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def _scores(Q: Tensor, K: Tensor, seen: Tensor | None) -> Tensor:
    """Q K^T with 0 for hidden keys. NaN and infinity reach only queries that see them."""
    if seen is None:
        return Q @ K.mT
    Q = Q.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    spoiled = ~K.isfinite()
    S = Q @ K.masked_fill(spoiled, 0.0).mT
    return S.masked_fill(spoiled.any(-1).unsqueeze(-2), torch.nan).masked_fill(~seen, 0.0)


def _weigh(P: Tensor, V: Tensor, seen: Tensor | None) -> Tensor:
    """P V. NaN and infinity reach only queries that see them."""
    if seen is None:
        return P @ V
    spoiled = ~V.isfinite()
    reached = seen.to(P.dtype) @ spoiled.to(P.dtype) > 0
    return (P @ V.masked_fill(spoiled, 0.0)).masked_fill(reached, torch.nan)


def _share_heads(query: Tensor, x: Tensor) -> Tensor:
    """Repeat each of the Hk heads of x for the H // Hk query heads that share it."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale
