"""One Muon step on a twentieth of pMF-B/16, beside torch.optim.Muon with torch.optim.AdamW.

torch.optim.Muon computes in bfloat16: pmf runs in bfloat16 for equal terms, and in its default, float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pmf.bench.harness import Case, relative_error
from pmf.optim import Muon

MATRICES: dict[tuple[int, ...], int] = {(768, 768): 5, (768, 2048): 2, (2048, 768): 1, (768, 256): 1}
OTHERS: dict[tuple[int, ...], int] = {(768,): 15, (276, 768): 1, (1001, 768): 1, (1, 128, 16, 16, 3): 1}
STEP_LIMIT = 3e-2  # bfloat16's error in the direction of a step


def parameters(shapes: dict[tuple[int, ...], int]) -> list[nn.Parameter]:
    """The same parameters and gradients at every call."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape, count in shapes.items():
        for _ in range(count):
            p = nn.Parameter(torch.randn(*shape, generator=generator))
            p.grad = torch.randn(*shape, generator=generator)
            made.append(p)
    return made


class Contestant:
    """Parameters with the optimizers that step them."""

    def __init__(self, compute_dtype: torch.dtype | None) -> None:
        """`compute_dtype` None stands for torch's optimizers, which compute in bfloat16."""
        self.matrices, self.others = parameters(MATRICES), parameters(OTHERS)
        self.start = [p.detach().clone() for p in self.matrices]
        self.optimizers: list[torch.optim.Optimizer]
        if compute_dtype is None:
            matrices = torch.optim.Muon(self.matrices, weight_decay=0.1)
            others = torch.optim.AdamW(
                self.others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True
            )
            self.optimizers = [matrices, others]
        else:
            groups = [
                {"params": self.matrices, "algorithm": "muon"},
                {"params": self.others, "algorithm": "adam"},
            ]
            self.optimizers = [Muon(groups, lr=1e-3, preset="torch", compute_dtype=compute_dtype)]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def moved(self) -> tuple[Tensor, ...]:
        return tuple(p.detach() - p0 for p, p0 in zip(self.matrices, self.start, strict=True))


def cases() -> Iterator[Case]:
    contestants = {
        "pmf, bfloat16": Contestant(torch.bfloat16),
        "torch.optim.Muon and AdamW, bfloat16": Contestant(None),
        "pmf, float32": Contestant(torch.float32),
    }
    exact = Contestant(torch.float64)
    for contestant in (*contestants.values(), exact):
        contestant.step()
    truth = tuple(x.double() for x in exact.moved())
    count = sum(p.numel() for p in (*exact.matrices, *exact.others))
    yield Case(
        label=f"one step, {count / 1e6:.1f} M parameters",
        contestants={name: contestant.step for name, contestant in contestants.items()},
        errors={name: relative_error(contestant.moved(), truth) for name, contestant in contestants.items()},
        limit=STEP_LIMIT,
    )
