"""Common parts of a block's two fused branches: products of rows, and the gated sum.

A branch is one autograd Function, out = x + gate (W a(RMSNorm(x))), for three reasons.

Memory: backward keeps only the rows that cannot be recomputed without a matrix product (the projections, the
attention output). Norm, rotation and SwiGLU are recomputed, which takes no product.

The gate needs no separate pass: it scales the matrix, x + (diag(gate) W) a, so that the product itself adds
the residual and rounds once. Backward needs neither the branch's output nor a pass over its gradient. With M
= G^T a, where G is the gradient:

    dW = diag(gate) M      dgate = rowsum(W o M)      da = (diag(gate) W)^T G

The residual stream x may be wider than the matrices (float32 with bfloat16): the norm's output is rounded to
the matrices' dtype once, and the sum has x's dtype.
"""

import torch
from torch import Tensor

from pmf.ops._products import add_product, product

__all__ = [
    "add_branch",
    "branch_gradients",
    "cast_for_products",
    "project",
    "project_gradients",
    "scale_rows",
]


def cast_for_products(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """The weights in autocast's dtype if it is enabled (float64 stays)."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return list(weights)
    dtype = torch.get_autocast_dtype(kind)
    return [w.to(dtype) for w in weights]


def project(y: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """W y for several matrices [E, D] and y [B, N, D]: each [B, N, E], in the matrices' dtype."""
    rows = y.to(weights[0].dtype).flatten(0, 1)
    return tuple(product(rows, w.t()).unflatten(0, y.shape[:2]) for w in weights)


def project_gradients(grads: tuple[Tensor, ...], y: Tensor, *weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `project`: of y, in y's dtype, and of each matrix."""
    rows = y.to(weights[0].dtype).flatten(0, 1)
    grad_y: Tensor | None = None
    grad_weights = []
    for grad, weight in zip(grads, weights, strict=True):
        grad = grad.flatten(0, 1)
        grad_y = product(grad, weight) if grad_y is None else add_product(grad_y, grad, weight)
        grad_weights.append(product(grad.t(), rows))
    assert grad_y is not None
    return grad_y.unflatten(0, y.shape[:2]).to(y.dtype), grad_weights


def scale_rows(gate: Tensor | None, weight: Tensor) -> Tensor:
    """diag(gate) W for gate [D] and weight [D, E], in the weight's dtype; W without a gate."""
    if gate is None:
        return weight
    return (gate[:, None] * weight).to(weight.dtype)


def add_branch(x: Tensor, scaled: Tensor, a: Tensor) -> Tensor:
    """x + (diag(gate) W) a: x [B, N, D], scaled [D, E], a [B, N, E]; a value or a tangent."""
    stream, rows = x.flatten(0, 1), a.flatten(0, 1)
    if x.dtype == scaled.dtype:
        return add_product(stream, rows, scaled.t()).unflatten(0, x.shape[:2])
    return (stream + product(rows, scaled.t())).unflatten(0, x.shape[:2])


def branch_gradients(
    grad: Tensor, gate: Tensor | None, weight: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, weight and a in `add_branch(x, scale_rows(gate, weight), a)`; x's is `grad`."""
    rows = grad.to(weight.dtype).flatten(0, 1)
    moment = product(rows.t(), a.flatten(0, 1))
    grad_a = product(rows, scale_rows(gate, weight)).unflatten(0, grad.shape[:2])
    if gate is None:
        return grad.new_empty(0), moment, grad_a
    wide = torch.promote_types(weight.dtype, torch.float32)
    grad_gate = (weight.to(wide) * moment.to(wide)).sum(1).to(gate.dtype)
    return grad_gate, scale_rows(gate, moment), grad_a
