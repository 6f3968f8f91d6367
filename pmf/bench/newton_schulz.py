"""newton_schulz on pMF-B's and L's matrices, beside the same iteration written in PyTorch.

At equal compute dtype: for bfloat16 torch.optim.Muon's own function, for float32 its lines without the cast.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from pmf import reference
from pmf.bench.harness import Case, relative_error
from pmf.ops import newton_schulz

QUINTIC = (3.4445, -4.7750, 2.0315)
MATRICES = {(768, 768): 2, (768, 2048): 2, (256, 768): 4, (1024, 2730): 2}
"""B/16's shapes (of which the model has 102, 72 and 4) and L/16's commonest, in numbers that time quickly."""
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


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
    """torch.optim.Muon's own."""
    return _zeropower_via_newtonschulz(g, QUINTIC, 5, 1e-7)


def flops(m: int, n: int) -> float:
    """Of the cheaper form with every symmetric product half computed: direct, or Gram with one restart."""
    return min(15 * m * m * n + 5 * m**3, 6 * m * m * n + 14 * m**3)


def cases() -> Iterator[Case]:
    peers: list[tuple[torch.dtype, str, Callable[[Tensor], Tensor]]] = [
        (torch.float32, "torch, the same iteration", plain_float32),
        (torch.bfloat16, "torch.optim.Muon's", torch_bfloat16),
    ]
    for dtype, name, peer in peers:
        for (m, n), count in MATRICES.items():
            yield _case(dtype, name, peer, [torch.randn(m, n) for _ in range(count)])


def _case(dtype: torch.dtype, name: str, peer: Callable[[Tensor], Tensor], matrices: list[Tensor]) -> Case:
    exact = reference.newton_schulz(matrices[0].double())
    m, n = matrices[0].shape
    return Case(
        label=f"{len(matrices)} of {m}x{n} {str(dtype).removeprefix('torch.')}",
        contestants={
            "pmf": lambda: newton_schulz(matrices, compute_dtype=dtype),
            name: lambda: [peer(g) for g in matrices],
        },
        errors={
            "pmf": relative_error(newton_schulz(matrices, compute_dtype=dtype)[0], exact),
            name: relative_error(peer(matrices[0]), exact),
        },
        limit=LIMITS[dtype],
        flops=len(matrices) * flops(m, n),
    )
