"""Attention that skips work: packed sequences against padded ones, windows against all keys.

Forward, forward with tangents, backward and backward through both outputs, each of

    equal lengths      attention_varlen against attention on the same sequences as a batch
    uniform lengths    1 to N: against attention on the batch padded to N with a mask, and a loop of attention
    a window           128 keys around each query: against all keys, and torch's flash kernel with a mask

FLOPs count the products that the mathematics needs: those of each query with the keys that it sees.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pmf import ops, reference
from pmf.bench.attention import SCORES
from pmf.bench.device import Run
from pmf.bench.harness import Case, Planned, Setting, against
from pmf.check.tolerance import dtype_name, tolerance

Shape = tuple[int, int, int, int]
Function = Callable[..., Any]

PASSES = {"forward": 2, "forward + JVP": 6, "backward": 5, "backward through both": 15}
"""The number of tile products of 2 Nq Nk D FLOPs in each pass."""
PACKED: dict[str, Shape] = {
    "tiny": (3, 2, 17, 8),
    "cpu": (8, 6, 512, 64),
    "quick": (256, 12, 276, 64),
    "full": (256, 12, 276, 64),
}
WINDOWED: dict[str, tuple[Shape, int]] = {
    "tiny": ((1, 2, 33, 8), 8),
    "cpu": ((1, 4, 4096, 64), 128),
    "quick": ((2, 12, 4096, 64), 128),
    "full": ((2, 12, 4096, 64), 128),
}


def cases(setting: Setting) -> Iterator[Planned]:
    for dtype in (torch.float32, torch.bfloat16):
        for what in PASSES:
            for lengths in ("equal", "uniform"):
                build = functools.partial(packed, setting, dtype, what, lengths)
                shape = PACKED[setting.scale]
                yield _planned(what, f"{lengths} lengths", shape, dtype, build)
            shape, width = WINDOWED[setting.scale]
            build = functools.partial(windowed, setting, dtype, what)
            yield _planned(what, f"window {width}", shape, dtype, build)


def _planned(what: str, of: str, shape: Shape, dtype: torch.dtype, build: Callable[[], Case]) -> Planned:
    name = dtype_name(dtype)
    facts = {"op": f"attention {what}", "of": of, "shape": list(shape), "dtype": name}
    return Planned(f"{what}, {of} {shape} {name}", build, facts)


def packed(setting: Setting, dtype: torch.dtype, what: str, lengths: str) -> Case:
    batch, heads, longest, width = PACKED[setting.scale]
    sizes = torch.full((batch,), longest)
    if lengths == "uniform":
        sizes = torch.randint(1, longest + 1, (batch,), generator=torch.Generator().manual_seed(0))
    cuts = [0, *sizes.cumsum(0).tolist()]
    device = setting.device.device
    offsets = torch.tensor(cuts, device=device)
    tensors = setting.normal(*[(cuts[-1], heads, width)] * 8, dtype=dtype)
    is_token = torch.arange(longest) < sizes[:, None]
    mask = None if lengths == "equal" else is_token[:, None, None, :].to(device)
    rows = is_token.flatten().nonzero().flatten().to(device)

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(batch * longest, heads, width).index_copy(0, rows, x)
        return padded.unflatten(0, (batch, longest)).transpose(1, 2).contiguous()

    def unpad(y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(0, 1).index_select(0, rows)

    def pieces(x: Tensor) -> list[Tensor]:
        return [x[i:j].transpose(0, 1)[None] for i, j in zip(cuts, cuts[1:], strict=False)]

    def loop(*inputs: Tensor) -> Any:
        parts = zip(*map(pieces, inputs), strict=True)
        found = [_attention(ops, part) for part in parts]
        return tuple(torch.cat([y[i][0].transpose(0, 1) for y in found]) for i in range(len(found[0])))

    def varlen(*inputs: Tensor) -> tuple[Tensor, ...]:
        function: Function = ops.attention_varlen if len(inputs) == 3 else ops.attention_varlen_jvp
        return _as_tuple(function(*inputs, offsets, offsets))

    ours = _pass(what, varlen, tensors)
    theirs = _pass(what, lambda *x: _attention(ops, x, attn_mask=mask), [pad(x) for x in tensors])
    runs = {"pmf.ops.attention_varlen": ours, "pmf.ops.attention, padded": theirs}
    if lengths == "uniform":
        runs["a loop of pmf.ops.attention"] = _pass(what, loop, tensors)

    # The first and the last sequence in float64, each computed alone: no other sequence affects them.
    judged = (0, batch - 1)
    alone = [
        _pass(what, lambda *x: _attention(reference, x), [pieces(x)[i].double() for x in tensors])()
        for i in judged
    ]
    truth = [torch.cat([y[0].transpose(0, 1) for y in both]) for both in zip(*alone, strict=True)]

    def part(name: str) -> Callable[[Any], Any]:
        shown = unpad if name.endswith("padded") else lambda y: y
        return lambda found: [torch.cat([shown(y)[cuts[i] : cuts[i + 1]] for i in judged]) for y in found]

    flops = 2.0 * PASSES[what] * heads * width * float(sizes.square().sum())
    limit = tolerance("attention gradient" if "backward" in what else "attention", dtype)
    return Case(runs, lambda name: against(runs, truth, part(name))(name), limit, flops)


def windowed(setting: Setting, dtype: torch.dtype, what: str) -> Case:
    shape, width = WINDOWED[setting.scale]
    tokens = shape[2]
    window = (width // 2, width - width // 2 - 1)
    tensors = setting.normal(*[shape] * 8, dtype=dtype)
    ours = _pass(what, lambda *x: _attention(ops, x, window=window), tensors)
    full = _pass(what, lambda *x: _attention(ops, x), tensors)
    runs = {"pmf.ops.attention, window": ours, "pmf.ops.attention, all keys": full}
    place = torch.arange(tokens, device=setting.device.device)
    ahead = place - place[:, None]
    seen = (ahead >= -window[0]) & (ahead <= window[1])
    if what in ("forward", "backward") and tensors[0].device.type == "cpu":
        runs["torch flash with a mask"] = _pass(what, functools.partial(_torch_flash, mask=seen), tensors)
    heads = max(1, min(shape[1], SCORES // tokens**2))
    some = [x[:1, :heads].double() for x in tensors]

    @functools.cache
    def truth(mask: Tensor | None) -> Any:
        return _pass(what, lambda *x: _attention(reference, x, attn_mask=mask), some)()

    def error(name: str) -> float:
        """All keys are another function, timed as what a window saves, and judged by its own truth."""
        exact = truth(None if name.endswith("all keys") else seen)
        return against(runs, exact, lambda found: [y[:1, :heads] for y in found])(name)

    flops = 2.0 * PASSES[what] * shape[0] * shape[1] * shape[3] * float(seen.sum())
    limit = tolerance("attention gradient" if "backward" in what else "attention", dtype)
    return Case(runs, error, limit, flops)


def _attention(module: Any, inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    """attention for three inputs, attention_jvp for six."""
    return _as_tuple((module.attention if len(inputs) == 3 else module.attention_jvp)(*inputs, **options))


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _torch_flash(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor) -> tuple[Tensor]:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return (F.scaled_dot_product_attention(query, key, value, attn_mask=mask),)


def _pass(what: str, function: Function, tensors: list[Tensor]) -> Run:
    """One of PASSES of a function of (q, k, v) or (q, k, v, tq, tk, tv); tensors end with two gradients."""
    count = 6 if what in ("forward + JVP", "backward through both") else 3
    if not what.startswith("backward"):
        return lambda: function(*tensors[:count])
    leaves = [x.detach().requires_grad_() for x in tensors[:count]]
    made = functools.cache(lambda: function(*leaves))  # by the first call, outside the clock
    grads = tensors[6 : 6 + count // 3]
    return lambda: torch.autograd.grad(made(), leaves, grads, retain_graph=True)
