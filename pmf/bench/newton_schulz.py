"""newton_schulz on the matrices of pMF-B, L and H, against the same iteration written in PyTorch.

At equal compute dtype: for 16 bits torch.optim.Muon's own function, which computes in bfloat16; for float32
the same code without the cast. Beside bfloat16 also with our default: float32 on the CPU, float16 on a GPU.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from pmf import reference
from pmf.bench.attention import gemm
from pmf.bench.device import Run
from pmf.bench.harness import Case, Planned, Setting, against
from pmf.check.tolerance import NEWTON_SCHULZ, dtype_name
from pmf.ops import newton_schulz

QUINTIC = (3.4445, -4.7750, 2.0315)
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
Matrices = dict[tuple[int, int], int]
_FEW: Matrices = {(768, 768): 2, (768, 2048): 2, (256, 768): 4, (1024, 2730): 2}
_B16: Matrices = {(768, 768): 102, (768, 2048): 72}
MATRICES: dict[str, list[tuple[torch.dtype, Matrices]]] = {
    "tiny": [(_F32, {(24, 32): 2}), (_BF16, {(16, 40): 2})],
    "cpu": [(_F32, _FEW), (_BF16, _FEW)],
    "quick": [(_F16, _B16)],
    "full": [
        (_F16, {**_B16, (256, 768): 4, (1024, 2730): 120, (1280, 3416): 168}),
        (_BF16, _B16),
        (_F32, {(768, 2048): 8}),
    ],
}
"""On the CPU a few matrices of the most common shapes of B/16 and L/16; on a GPU all of them."""

Peer = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def plain_float32(g: Tensor) -> Tensor:
    """torch.optim.Muon's iteration, step by step, in float32."""
    a, b, c = QUINTIC
    x = g.T if g.size(0) > g.size(1) else g
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if g.size(0) > g.size(1) else x


def torch_bfloat16(g: Tensor) -> Tensor:
    """torch.optim.Muon's own function."""
    return _zeropower_via_newtonschulz(g, QUINTIC, 5, 1e-7)


def flops(m: int, n: int) -> float:
    """For the cheaper form with half of every symmetric product: direct, or Gram with one restart."""
    return min(15 * m * m * n + 5 * m**3, 6 * m * m * n + 14 * m**3)


def cases(setting: Setting, peers: Mapping[str, Peer] | None = None) -> Iterator[Planned]:
    """peers: additional contestants, functions of the list of matrices."""
    for dtype, matrices in MATRICES[setting.scale]:
        yield gemm(setting, dtype)
        for shape, count in matrices.items():
            name = dtype_name(dtype)
            facts = {"op": "newton_schulz", "shape": [count, *shape], "dtype": name}
            build = functools.partial(_case, setting, dtype, shape, count, peers or {})
            yield Planned(f"{count} of {shape[0]}x{shape[1]} {name}", build, facts)


def _case(
    setting: Setting, dtype: torch.dtype, shape: tuple[int, int], count: int, peers: Mapping[str, Peer]
) -> Case:
    matrices = setting.normal(*[shape] * count)
    plain, name = (
        (plain_float32, "torch, the same iteration")
        if dtype == torch.float32
        else (torch_bfloat16, "torch.optim.Muon's")
    )
    runs: dict[str, Run] = {
        "pmf": lambda: newton_schulz(matrices, compute_dtype=dtype),
        name: lambda: [plain(g) for g in matrices],
    }
    if dtype not in (torch.float32, torch.float16):
        runs["pmf, at its default"] = lambda: newton_schulz(matrices)
    runs |= {key: functools.partial(peer, matrices) for key, peer in peers.items()}
    exact = [reference.newton_schulz(matrices[i].double()) for i in (0, -1)]
    error = against(runs, exact, lambda result: (result[0], result[-1]))
    return Case(runs, error, NEWTON_SCHULZ[dtype], flops=count * flops(*shape))
