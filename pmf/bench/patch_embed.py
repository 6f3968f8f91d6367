"""patch_embed at pMF-B/16: 256 16 x 16 x 3 patches through 128 channels to 768, plus 20 condition tokens."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf import ops, reference
from pmf.bench.attention import gemm
from pmf.bench.device import Run
from pmf.bench.harness import Case, Planned, Setting, against
from pmf.bench.pairs import BATCH, DTYPES
from pmf.check.tolerance import dtype_name, tolerance

PATCH, CHANNELS, WIDTH, PREFIX = 16, 128, 768, 20
SIZE = {"tiny": 32, "cpu": 256, "quick": 256, "full": 256}


def convolutions(
    images: Tensor,
    down: Tensor,
    bias_down: Tensor,
    up: Tensor,
    bias_up: Tensor,
    position: Tensor,
    prefix: Tensor,
) -> Tensor:
    """The usual implementation: two convolutions, a transpose, an addition and a concatenation."""
    hidden = F.conv2d(images, down, bias_down, stride=PATCH)
    tokens = F.conv2d(hidden, up[:, :, None, None], bias_up).flatten(2).mT + position
    return torch.cat((prefix, tokens), 1)


FORMS: dict[str, Callable[..., Tensor]] = {
    "pmf patch_embed": ops.patch_embed,
    "two convolutions": convolutions,
}


def cases(setting: Setting) -> Iterator[Planned]:
    batch, size = BATCH[setting.scale], SIZE[setting.scale]
    tokens = (size // PATCH) ** 2
    flops = 2.0 * batch * tokens * CHANNELS * (3 * PATCH * PATCH + WIDTH)
    shapes: list[tuple[int, ...]] = [
        (batch, 3, size, size),
        (CHANNELS, 3, PATCH, PATCH),
        (CHANNELS,),
        (WIDTH, CHANNELS),
        (WIDTH,),
        (tokens, WIDTH),
        (batch, PREFIX, WIDTH),
    ]
    for dtype in DTYPES[setting.scale]:
        yield gemm(setting, dtype)
        for kind, make in (("forward", _forward), ("backward", _backward)):
            name = dtype_name(dtype)
            facts = {"op": f"patch_embed {kind}", "shape": list(shapes[0]), "dtype": name}
            build = functools.partial(lambda m, d: m(setting.normal(*shapes, dtype=d), flops), make, dtype)
            yield Planned(f"{kind} {list(shapes[0])} {name}", build, facts)


def _bytes(*groups: Sequence[Tensor]) -> float:
    return float(sum(x.numel() * x.element_size() for group in groups for x in group))


def _forward(arguments: list[Tensor], flops: float) -> Case:
    exact = reference.patch_embed(*(x.double() for x in arguments))
    runs: dict[str, Run] = {name: functools.partial(form, *arguments) for name, form in FORMS.items()}
    dtype = arguments[0].dtype
    moved = _bytes(arguments) + exact.numel() * dtype.itemsize
    return Case(runs, against(runs, exact), tolerance("gemm", dtype), flops, moved)


def _backward(arguments: list[Tensor], flops: float) -> Case:
    """Gradients of everything except the image."""
    image, *rest = arguments
    leaves = [x.detach().requires_grad_() for x in rest]
    exact_leaves = [x.detach().double().requires_grad_() for x in rest]
    exact_out = reference.patch_embed(image.double(), *exact_leaves)
    grad = torch.randn_like(exact_out, dtype=image.dtype)
    runs: dict[str, Run] = {}
    for name, form in FORMS.items():
        made = functools.cache(functools.partial(form, image, *leaves))
        runs[name] = lambda out=made: torch.autograd.grad(out(), leaves, grad, retain_graph=True)  # type: ignore[misc]
    exact = torch.autograd.grad(exact_out, exact_leaves, grad.double())
    moved = _bytes(arguments, [grad], leaves)
    return Case(runs, against(runs, exact), tolerance("gemm", image.dtype), 2 * flops, moved)
