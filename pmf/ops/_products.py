"""The layers' matrix products, in the dtype and by the library that are fast on this processor.

On the CPU, 16-bit matrices are multiplied in float32 and rounded once where that is faster than their own
products. For float32, the BLAS in PyTorch's x86 builds (MKL) uses only 256-bit vectors on non-Intel
processors; oneDNN, which PyTorch also includes, has no such limit. csrc/ops/products.h describes both choices
and their measured gains.

`product` and `add_product` are not differentiable: they are for use inside autograd Functions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf import _library, kernels

from ._dispatch import register_fake

__all__ = ["add_product", "linear", "product"]


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [M, K] right [K, N], with any strides. Returns the result, which may be in `out`."""
    if not _is_ours(left) or (out is not None and _library.multiplies(left.dtype)):
        return torch.mm(left, right, out=out)
    return torch.ops.pmf.product(left, right)


def add_product(add: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """add [M, N] + left [M, K] right [K, N], rounded once."""
    if _is_ours(left):
        return torch.ops.pmf.add_product(add, left, right)
    return torch.addmm(add, left, right)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, differentiable, in autocast's dtype if it is enabled."""
    dtype = weight.dtype
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    if dtype.itemsize != 2 or x.device.type != "cpu" or _library.multiplies(dtype):
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        wide = None if bias is None else bias.to(dtype).float()
        return F.linear(x.to(dtype).float(), weight.to(dtype).float(), wide).to(dtype)


def _is_ours(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and not _library.takes_cuda_kernel(x)
    ours = on_cpu and x.dtype != torch.float64 and not _library.missing()
    return ours and not kernels.uses_reference("product")


register_fake("product", lambda left, right: left.new_empty(left.shape[0], right.shape[1]))
register_fake(
    "add_product", lambda add, left, right: torch.empty_like(add, memory_format=torch.contiguous_format)
)
