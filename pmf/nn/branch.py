"""What the two fused branches of a block share: products of rows, and the gated sum at the end.

A branch is one autograd Function, out = x + gate (W a(RMSNorm(x))), for three reasons.

Memory: backward keeps only rows that it could not remake by a pass over memory (the projections, attention's
output). The norm, the rotation and the SwiGLU are computed again, which costs no product.

The gate costs no pass: it scales the matrix, x + (diag(gate) W) a, so that the product itself adds the
residual and rounds once. Backward needs neither the branch's output nor a pass over its gradient. With M =
G^T a, of the gradient G:

    dW = diag(gate) M      dgate = rowsum(W o M)      da = (diag(gate) W)^T G

The stream x may be wider than the matrices (float32 beside bfloat16): the norm's output is rounded to the
matrices' dtype once, and the sum has x's.
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
    """The weights in the dtype in which autocast multiplies, if it is on (float64 stays)."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return list(weights)
    dtype = torch.get_autocast_dtype(kind)
    return [w.to(dtype) for w in weights]


def project(y: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """W y of several matrices [E, D] on y [B, N, D]: each [B, N, E], in the matrices' dtype."""
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
    """diag(gate) W of gate [D] and weight [D, E], in the weight's dtype; without a gate, W."""
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
    """Gradients for gate, weight and a of `add_branch(x, scale_rows(gate, weight), a)`; x's is `grad`."""
    rows = grad.to(weight.dtype).flatten(0, 1)
    moment = product(rows.t(), a.flatten(0, 1))
    grad_a = product(rows, scale_rows(gate, weight)).unflatten(0, grad.shape[:2])
    if gate is None:
        return grad.new_empty(0), moment, grad_a
    wide = torch.promote_types(weight.dtype, torch.float32)
    grad_gate = (weight.to(wide) * moment.to(wide)).sum(1).to(gate.dtype)
    return grad_gate, scale_rows(gate, moment), grad_a
