"""Attention and its tangent as a short Triton kernel: the baseline where no published kernel is correct.

    S = c Q K^T, P = softmax(S), H = P o tS, tS = c (tQ K^T + Q tK^T)
    O = P V,  tO = H V - r o O + P tV,  r = rowsum(H)

One program for each tile of queries of one head, which walks over the tiles of keys with a running maximum
m; the sums of P and H and both accumulators are rescaled by exp(m_old - m_new). Keys past the end are masked,
widths are padded to a power of two: correct for any length and width. Products take the inputs' dtype and add
in float32.

It follows the mathematics directly: no pivot is subtracted from tS, so a large common tangent costs digits.
"""

import torch

# mypy: disable-error-code=no-untyped-def
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
NARROWEST = 16  # of Triton's matrix products


@triton.jit
def _tile(base, rows, columns, length, width, stride):
    """Rows [rows] of a matrix [length, width], zeros outside it."""
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _forward_jvp(
    query,
    key,
    value,
    query_t,
    key_t,
    value_t,
    out,
    out_t,
    length,
    width,
    scale,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64) * length * width
    columns = tl.arange(0, PADDED)
    q = _tile(query + head, rows, columns, length, width, width)
    q_t = _tile(query_t + head, rows, columns, length, width, width)
    m = tl.full((BLOCK,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    r = tl.zeros((BLOCK,), tl.float32)
    o = tl.zeros((BLOCK, PADDED), tl.float32)
    o_t = tl.zeros((BLOCK, PADDED), tl.float32)  # H V + P tV: one accumulator for both
    for start in range(0, length, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        k = _tile(key + head, keys, columns, length, width, width)
        k_t = _tile(key_t + head, keys, columns, length, width, width)
        v = _tile(value + head, keys, columns, length, width, width)
        v_t = _tile(value_t + head, keys, columns, length, width, width)
        s = scale * tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.where(keys[None, :] < length, s, -float("inf"))
        s_t = tl.dot(q_t, tl.trans(k), input_precision=PRECISION)
        s_t = scale * tl.dot(q, tl.trans(k_t), s_t, input_precision=PRECISION)
        m_new = tl.maximum(m, tl.max(s, 1))
        shrink = tl.exp(m - m_new)
        p = tl.exp(s - m_new[:, None])
        h = p * s_t
        mass = mass * shrink + tl.sum(p, 1)
        r = r * shrink + tl.sum(h, 1)
        p, h = p.to(v.dtype), h.to(v.dtype)
        o = tl.dot(p, v, o * shrink[:, None], input_precision=PRECISION)
        o_t = tl.dot(h, v, o_t * shrink[:, None], input_precision=PRECISION)
        o_t = tl.dot(p, v_t, o_t, input_precision=PRECISION)
        m = m_new
    o = o / mass[:, None]
    o_t = (o_t - r[:, None] * o) / mass[:, None]
    place = head + rows[:, None] * width + columns[None, :]
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    tl.store(out + place, o.to(out.dtype.element_ty), mask=inside)
    tl.store(out_t + place, o_t.to(out_t.dtype.element_ty), mask=inside)


def attention_jvp(
    query: Tensor, key: Tensor, value: Tensor, query_t: Tensor, key_t: Tensor, value_t: Tensor
) -> tuple[Tensor, Tensor]:
    """(O, tO) of contiguous tensors [B, H, N, D] of the same shape and dtype; scale D^-0.5."""
    tensors = [x.contiguous() for x in (query, key, value, query_t, key_t, value_t)]
    if any(x.shape != query.shape for x in tensors):
        raise ValueError("the Triton baseline takes tensors [B, H, N, D] of one shape")
    batch, heads, length, width = query.shape
    outs = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
    exact = query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    _forward_jvp[(triton.cdiv(length, BLOCK), batch * heads)](
        *tensors,
        *outs,
        length,
        width,
        width**-0.5,
        BLOCK=BLOCK,
        PADDED=max(NARROWEST, triton.next_power_of_2(width)),
        PRECISION="ieee" if exact else "tf32",
        num_warps=4,
        num_stages=1 if query.dtype == torch.float32 else 2,  # what fits in shared memory
    )
    return outs
