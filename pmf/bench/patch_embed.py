"""patch_embed at pMF-B/16: 256 patches of 16 x 16 x 3 through 128 channels to 768, behind 20 other tokens."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf import ops, reference
from pmf.bench.harness import Case, relative_error

BATCH, SIZE, PATCH, CHANNELS, WIDTH, PREFIX = 8, 256, 16, 128, 768, 20
DTYPES = (torch.float32, torch.bfloat16)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def convolutions(
    images: Tensor,
    down: Tensor,
    bias_down: Tensor,
    up: Tensor,
    bias_up: Tensor,
    position: Tensor,
    prefix: Tensor,
) -> Tensor:
    """The usual way: two convolutions, a transpose, an addition and a concatenation."""
    hidden = F.conv2d(images, down, bias_down, stride=PATCH)
    tokens = F.conv2d(hidden, up[:, :, None, None], bias_up).flatten(2).mT + position
    return torch.cat((prefix, tokens), 1)


def cases() -> Iterator[Case]:
    tokens = (SIZE // PATCH) ** 2
    flops = 2.0 * BATCH * tokens * CHANNELS * (3 * PATCH * PATCH + WIDTH)
    for dtype in DTYPES:
        shapes: list[tuple[int, ...]] = [
            (BATCH, 3, SIZE, SIZE),
            (CHANNELS, 3, PATCH, PATCH),
            (CHANNELS,),
            (WIDTH, CHANNELS),
            (WIDTH,),
            (tokens, WIDTH),
            (BATCH, PREFIX, WIDTH),
        ]
        arguments = [torch.randn(shape).to(dtype) for shape in shapes]
        exact = reference.patch_embed(*(x.double() for x in arguments))
        leaves = [x.detach().requires_grad_() for x in arguments[1:]]
        grad = torch.randn_like(exact).to(dtype)
        runs: dict[str, Any] = {
            "pmf patch_embed": lambda a=arguments: ops.patch_embed(*a),
            "two convolutions": lambda a=arguments: convolutions(*a),
        }
        errors = {name: relative_error(run(), exact) for name, run in runs.items()}
        name = str(dtype).removeprefix("torch.")
        yield Case(f"forward {name}", runs, errors, LIMITS[dtype], flops)

        outs = {
            "pmf patch_embed": ops.patch_embed(arguments[0], *leaves),
            "two convolutions": convolutions(arguments[0], *leaves),
        }
        runs = {
            key: lambda out=out, g=grad, x=leaves: torch.autograd.grad(out, x, g, retain_graph=True)
            for key, out in outs.items()
        }
        exact_leaves = [x.detach().double().requires_grad_() for x in arguments[1:]]
        exact_out = reference.patch_embed(arguments[0].double(), *exact_leaves)
        truth = torch.autograd.grad(exact_out, exact_leaves, grad.double())
        errors = {key: relative_error(run(), truth) for key, run in runs.items()}
        yield Case(f"backward {name}", runs, errors, LIMITS[dtype], 2 * flops)
