"""Gradients between backward and the optimizer: averaging over ranks, global norm, clipping."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def average_gradients(parameters: Iterable[nn.Parameter], ranks: int) -> None:
    """Average the gradients over the ranks in place; a gradient of None counts as zero.

    Skips parameters sharded by `fully_shard`, whose gradients are already averaged.
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
    """The global Euclidean norm of the gradients; if it exceeds `largest`, scale them down in place.

        g <- g min(1, largest / ||g||)

    Returns the norm before clipping, float32 []; for sharded parameters, over all shards. A norm that is not
    finite makes every gradient NaN.
    """
    owners = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in owners if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if largest is not None:
        # Finite gradients divided by an infinite norm would be zeros: a step that does nothing, silently.
        clip_grads_with_norm_(owners, largest, norm.where(norm.isfinite(), torch.nan))
    return norm.float()
