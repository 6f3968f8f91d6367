# mypy: disable-error-code="operator, misc, arg-type, return-value"
"""The work of each of two processes in tests/tangents/test_jvp_ranks.py."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.networks import ViT
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from pmf import Jvp


def build(checkpointing: bool = False) -> ViT:
    torch.manual_seed(0)
    network = ViT()
    if checkpointing:
        for block in network.blocks:
            forward = block.forward
            block.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=False)
    return network


def batch(rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank + 10 * step)
    return torch.randn(2, 2, 3, 8, 8, generator=generator).unbind(0)


def loss_of(jvp: nn.Module, rank: int, step: int = 0) -> Tensor:
    x, x_t = batch(rank, step)
    out, out_t = jvp((x,), (x_t,))
    return (out.float() + 0.3 * out_t.float()).square().mean()


def by_layers(network: ViT, **options: Any) -> nn.Module:
    for block in network.blocks:
        fully_shard(block, **options)
    jvp = Jvp(network)
    fully_shard(jvp, **options)
    return jvp


def whole(network: ViT, **options: Any) -> nn.Module:
    jvp = Jvp(network)
    fully_shard(jvp, **options)
    return jvp


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WAYS: dict[str, Callable[[], nn.Module]] = {
    "DDP(Jvp)": lambda: DDP(Jvp(build())),
    "DDP(Jvp), static graph": lambda: DDP(Jvp(build()), static_graph=True),
    "DDP(Jvp), checkpointing": lambda: DDP(Jvp(build(True))),
    "Jvp(DDP)": lambda: Jvp(DDP(build())),
    "FSDP whole": lambda: whole(build()),
    "FSDP layers": lambda: by_layers(build()),
    "FSDP layers, checkpointing": lambda: by_layers(build(True)),
    "FSDP layers, bf16": lambda: by_layers(build(), mp_policy=HALF),
    "FSDP whole, bf16": lambda: whole(build(), mp_policy=HALF),
}


def gradients(module: nn.Module, steps: Callable[[], None]) -> list[Tensor]:
    module.zero_grad()
    steps()
    grads = [p.grad for p in module.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in grads if g is not None]


def main(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    found = {}
    for name, make in WAYS.items():
        module = make()
        for _ in range(2):  # a static graph takes effect from the second step on
            found[name] = gradients(module, lambda m=module: loss_of(m, rank).backward())

    module = DDP(Jvp(build()))

    def accumulate() -> None:
        with module.no_sync():
            loss_of(module, rank, 0).backward()
        loss_of(module, rank, 1).backward()

    found["no_sync"] = gradients(module, accumulate)
    sharded = by_layers(build())

    def accumulate_sharded() -> None:
        for step in range(2):
            sharded.set_requires_gradient_sync(step == 1)
            loss_of(sharded, rank, step).backward()

    found["FSDP, no sync"] = gradients(sharded, accumulate_sharded)
    if rank == 0:
        torch.save(found, out / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def expected(steps: int = 1, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The mean over both ranks, computed by one."""
    network = build()
    jvp = Jvp(network)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        loss = sum(loss_of(jvp, rank, step) for rank in range(2) for step in range(steps)) / 2
    return list(torch.autograd.grad(loss, list(network.parameters())))
