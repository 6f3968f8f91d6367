"""Floating-point operations that each side executes, counted op by op on meta tensors.

Counted like torch.utils.flop_counter: matrix products only, a multiplication and an addition as two. Our
count depends on the draws (how many samples need guidance), so it is averaged over many; the port does
everything for every sample.
"""

from typing import Any

import torch
from plain_port import Sizes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from pmf.flow import Draws, Objective
from pmf.flow.plan import make_plan
from pmf.nn import Block

from .sides import CAREFUL, OURS, Batch, Port, Side, make_model, make_side

EXPLANATION = """by hand 98 / 168 = 0.583: depth 16 with heads of 8, in units
  port  48 training pass with tangents + 48 backward + 72 three guidance passes               = 168
  ours  24 training pass + 8 tangents of half the batch, u path + 48 backward + 18 guidance   =  98
The count has more: embeddings and final layers, attention's tangents at twice their primal, its recomputed
scores. And forward mode in PyTorch multiplies each Linear's input once more, by the weight's tangent, which
is zero; "port, without products with zero tangents" leaves that out."""
"""The relation between the count and the derivation by hand."""

WEIGHT_OPS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)

# The port's guidance passes run torch's CPU flash attention, which torch's counter does not know.
CUSTOM = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}


def counted(run: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=CUSTOM) as counter:
        run()
    return counter.get_total_flops()


def count(sizes: Sizes, batch_size: int, draws: int) -> dict[str, Any]:
    """FLOPs of objective and backward, ours averaged over `draws` draws."""
    shape = (batch_size, sizes.channels, sizes.image_size, sizes.image_size)
    images, labels = torch.empty(shape, device="meta"), torch.zeros(batch_size, dtype=torch.int64)
    model = make_model(sizes).to("meta")
    ours, careful = (make_side(name, model, sizes, "fp32") for name in (OURS, CAREFUL))
    port = Port(model, sizes, "fp32")
    generator = torch.Generator().manual_seed(0)

    # Draws with equal row counts cost the same.
    seen: dict[tuple[int, ...], int] = {}
    total = 0
    objective = Objective()
    for _ in range(draws):
        drawn = objective.draw(torch.empty(batch_size, 1, 1, 1), labels, generator)
        plan = make_plan(drawn, objective.guidance, torch.float32)
        rows = plan.num_meanflow, len(plan.conditional), len(plan.guided)
        if rows not in seen:
            batch = Batch(images, labels.to("meta"), drawn._replace(noise=torch.empty_like(images)))
            seen[rows] = backward_flops(ours, batch)
        total += seen[rows]
    batch = Batch(images, labels.to("meta"), on_meta(drawn, images))
    whole = backward_flops(port, batch)
    counts = {
        "ours": total / draws,
        "port": whole,
        "port, without products with zero tangents": whole - weight_products(port, batch),
        CAREFUL: backward_flops(careful, batch),
    }
    unit = block_flops(sizes, batch_size)
    return {
        "depth": sizes.depth,
        "batch_size": batch_size,
        "draws": draws,
        "flops": counts,
        "units": {name: value / unit for name, value in counts.items()},
        "ratio": counts["ours"] / counts["port"],
    }


def backward_flops(side: Side, batch: Batch) -> int:
    return counted(lambda: side.backward(batch))


def weight_products(port: Port, batch: Batch) -> int:
    """The products of one forward pass that torch.func.jvp repeats with the weights' tangents, all zero."""
    t, labels = batch.draws.t, batch.labels
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CUSTOM) as counter:
        port.network(batch.images, t, t, t, t, labels)
    by_op = counter.get_flop_counts()["Global"]
    return sum(by_op.get(op, 0) for op in WEIGHT_OPS)


def on_meta(draws: Draws, images: torch.Tensor) -> Draws:
    """The port computes with the draws themselves; pmf reads them on the host."""
    moved = (None if x is None else x.to("meta") for x in draws)
    return Draws._make(moved)._replace(noise=torch.empty_like(images))


def block_flops(sizes: Sizes, batch_size: int) -> int:
    """One block's forward over the batch: the unit."""
    block = Block(sizes.hidden_size, sizes.num_heads, sizes.mlp_width).to("meta")
    tokens = sum(sizes.condition_tokens) + (sizes.image_size // sizes.patch_size) ** 2
    x = torch.empty(batch_size, tokens, sizes.hidden_size, device="meta")
    table = torch.empty(
        (sizes.image_size // sizes.patch_size) ** 2,
        sizes.hidden_size // sizes.num_heads // 2,
        device="meta",
    )
    return counted(lambda: block(x, table, table))
