"""Attention and its tangent, written out.

    S = c Q K^T + mask      P = softmax(S)      O = P V
    tS = c (tQ K^T + Q tK^T)      H = P o tS      r = rowsum(H)      tO = H V - r o O + P tV

A row that may attend to nothing gives zeros. What a mask hides does not matter, even where it is NaN.
Memory is quadratic in the sequence length, unlike the kernels'.
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
    seen = _seen(query, key, attn_mask, is_causal)
    P = _probabilities(query, key, attn_mask, seen, _scale(query, scale))
    return _shown(_weigh(P, value, seen), seen)


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
    seen = _seen(Q, K, attn_mask, is_causal)

    P = _probabilities(Q, K, attn_mask, seen, c)
    O = _shown(_weigh(P, V, seen), seen)  # noqa: E741, the paper's name
    tS = c * (_scores(tQ, K, seen) + _scores(Q, tK, seen))
    H = P * tS
    r = H.sum(-1, keepdim=True)
    tO = _weigh(H, V, seen) - r * O + _weigh(P, tV, seen)
    return O, _shown(tO, seen)


def _seen(Q: Tensor, K: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """[..., Nq, Nk], whether a query may attend a key; None if every query may attend every key."""
    if mask is None and not is_causal:
        return None
    Nq, Nk = Q.shape[-2], K.shape[-2]
    seen = torch.ones(Nq, Nk, dtype=torch.bool, device=Q.device)
    if is_causal:  # aligned at the top left, as in F.scaled_dot_product_attention
        seen = seen.tril()
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -torch.inf)
    return seen


def _probabilities(Q: Tensor, K: Tensor, mask: Tensor | None, seen: Tensor | None, c: float) -> Tensor:
    S = c * _scores(Q, K, seen)
    if mask is not None and mask.dtype != torch.bool:
        S = S + mask.to(S.dtype)
    if seen is not None:
        S = S.masked_fill(~seen, -torch.inf)
    # Filled before and after, so that neither the softmax nor its derivatives ever see a row of -inf.
    nothing = (S == -torch.inf).all(-1, keepdim=True)
    P = torch.softmax(S.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    return P if seen is None else P.masked_fill(~seen, 0.0)


def _shown(O: Tensor, seen: Tensor | None) -> Tensor:  # noqa: E741
    """O; 0 for the queries that attend nothing, so that no gradient comes back from them."""
    return O if seen is None else O.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def _scores(Q: Tensor, K: Tensor, seen: Tensor | None) -> Tensor:
    """Q K^T; 0 where a key is hidden. NaN and infinity reach those alone that see them."""
    if seen is None:
        return Q @ K.mT
    Q = Q.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    spoiled = ~K.isfinite()
    S = Q @ K.masked_fill(spoiled, 0.0).mT
    return S.masked_fill(spoiled.any(-1).unsqueeze(-2), torch.nan).masked_fill(~seen, 0.0)


def _weigh(P: Tensor, V: Tensor, seen: Tensor | None) -> Tensor:
    """P V. NaN and infinity reach those queries alone that see them."""
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
