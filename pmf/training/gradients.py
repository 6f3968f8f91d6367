"""What happens to gradients between the backward pass and the optimizer: their mean, their norm, clipping."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def average_gradients(parameters: Iterable[nn.Parameter], ranks: int) -> None:
    """Give every rank the mean of the ranks' gradients; a gradient of None counts as zero.

    Parameters sharded by `fully_shard` are left out: their gradients are means already.
    """
    plain = [p for p in parameters if p.requires_grad and not hasattr(p, "device_mesh")]
    for p in plain:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in plain if p.grad is not None]
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = flat.div_(ranks).split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float | None) -> Tensor:
    """The Euclidean norm of all gradients together; above `largest` they are scaled down to it.

        g <- g min(1, largest / ||g||)

    Returns the norm before clipping, float32 []. Of sharded parameters it is that of all shards. A norm that
    is not finite makes the gradients so, too.
    """
    owners = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in owners if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if largest is not None:
        clip_grads_with_norm_(owners, largest, norm)
    return norm.float()
