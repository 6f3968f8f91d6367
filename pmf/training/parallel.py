"""How a batch and a model are split over ranks."""

import warnings

import torch
from torch import Tensor

from pmf import flow, models
from pmf.errors import UserError
from pmf.training.config import TrainConfig


def check_parts(config: TrainConfig, ranks: int) -> None:
    """Raise UserError if the batch does not split into equal parts, or the options conflict."""
    batch, parts = config.data.batch_size, config.data.accumulate
    if batch % (ranks * parts):
        raise UserError(
            f"--batch-size {batch} does not split into {ranks} ranks x {parts} parts of equal size: use a "
            f"multiple of {ranks * parts}"
        )
    if ranks > 1 and config.run.parallel == "fsdp" and config.run.compile:
        raise UserError("--compile does not work with --parallel fsdp: leave one of them out")


def slice_draws(draws: flow.Draws, rows: slice) -> flow.Draws:
    """The draws of some samples; a stride gives each part its share of both kinds of samples."""
    return flow.Draws._make(None if x is None else x[rows] for x in draws)


def shard_model(model: models.PixelMeanFlow, precision: str) -> None:
    """FSDP2: shard the parameters by rows over all ranks; each block's are gathered while it runs.

    bf16: gather and compute in bfloat16; gradients are averaged, and weights kept, in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Nothing here writes to a module's output, so it may be a view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(model.position.device.type, (torch.distributed.get_world_size(),))
    low = torch.bfloat16 if precision == "bf16" else None
    # Times and scales must stay float32, so the inputs are not cast: the network casts where needed.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, models.Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors on every rank (a collective call); others are returned unchanged."""
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in tensors.items()}
