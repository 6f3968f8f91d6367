"""Matrix products for the layers' own derivatives, by PyTorch or a faster library.

For float32, the BLAS in PyTorch's x86 builds (MKL) uses only 256-bit vectors on non-Intel processors; oneDNN,
which PyTorch also includes, has no such limit. csrc/ops/products.h describes the choice and its measured
gain. Neither function is differentiable: they are for use inside autograd Functions.
"""

import torch
from torch import Tensor

from pmf import _library, kernels

from ._dispatch import register_fake

__all__ = ["add_product", "product"]


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [M, K] right [K, N], with any strides. Returns the result, which may be in `out`."""
    if out is not None and not (_is_ours(left) and torch.ops.pmf.products_by_onednn()):
        return torch.mm(left, right, out=out)
    if _is_ours(left):
        return torch.ops.pmf.product(left, right)
    return torch.mm(left, right)


def add_product(add: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """add [M, N] + left [M, K] right [K, N], rounded once."""
    if _is_ours(left):
        return torch.ops.pmf.add_product(add, left, right)
    return torch.addmm(add, left, right)


def _is_ours(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and not _library.takes_cuda_kernel(x)
    ours = on_cpu and x.dtype == torch.float32 and not _library.missing()
    return ours and not kernels.uses_reference("product")


register_fake("product", lambda left, right: left.new_empty(left.shape[0], right.shape[1]))
register_fake(
    "add_product", lambda add, left, right: torch.empty_like(add, memory_format=torch.contiguous_format)
)
