"""One Muon step against torch.optim.Muon with torch.optim.AdamW; on the CPU, for a twentieth of pMF-B/16.

torch.optim.Muon computes in bfloat16, so pmf runs both in bfloat16, for a fair comparison, and with its
default (float32 on the CPU, float16 on a GPU). Steps are checked on one matrix of each shape.

Also fused QKV weights, split by part and by head, against the same matrices as separate parameters.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pmf.bench.device import Run
from pmf.bench.harness import Case, Planned, Setting
from pmf.check.tolerance import relative_error
from pmf.models import create_model
from pmf.optim import Muon

Shapes = dict[tuple[int, ...], int]
_TWENTIETH: tuple[Shapes, Shapes] = (
    {(768, 768): 5, (768, 2048): 2, (2048, 768): 1, (768, 256): 1},
    {(768,): 15, (276, 768): 1, (1001, 768): 1, (1, 128, 16, 16, 3): 1},
)
_TINY: tuple[Shapes, Shapes] = {(16, 16): 2, (16, 24): 1}, {(16,): 2}
MODELS = {"quick": ("pmf-b/16",), "full": ("pmf-b/16", "pmf-l/16", "pmf-h/16")}
FUSED = {"tiny": (1, 24, 2), "cpu": (2, 768, 12), "quick": (16, 768, 12), "full": (16, 768, 12)}
"""Layers with a fused QKV weight, its width, and its heads."""
STEP_LIMIT = 3e-2  # bfloat16's error in the direction of a step


def shapes_of(model: str) -> tuple[Shapes, Shapes]:
    """The parameters that Muon and Adam update in a preset: shapes with their counts."""
    with torch.device("meta"):
        network = create_model(model)
    matrices = set(Muon(network).routing()["muon"])
    counts: tuple[Counter[tuple[int, ...]], ...] = (Counter(), Counter())
    for name, p in network.named_parameters():
        counts[name not in matrices][tuple(p.shape)] += 1
    return dict(counts[0]), dict(counts[1])


class Contestant:
    """Parameters with their optimizers; the same values for every contestant."""

    def __init__(
        self,
        setting: Setting,
        shapes: tuple[Shapes, Shapes],
        compute_dtype: torch.dtype | None,
        optimizer: str = "pmf",
    ) -> None:
        """compute_dtype None: our default. optimizer: "pmf" or "torch"."""
        self.matrices, self.others = (self._parameters(setting, s) for s in shapes)
        self.firsts = list({tuple(p.shape): p for p in reversed(self.matrices)}.values())
        self.start = [p.detach().clone() for p in self.firsts]
        self.optimizers: list[torch.optim.Optimizer]
        if optimizer == "torch":
            muon = torch.optim.Muon(self.matrices, weight_decay=0.1)
            adam = torch.optim.AdamW(self.others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
            self.optimizers = [muon, adam]
        else:
            groups = [
                {"params": self.matrices, "algorithm": "muon"},
                {"params": self.others, "algorithm": "adam"},
            ]
            given = {} if compute_dtype is None else {"compute_dtype": compute_dtype}
            self.optimizers = [Muon(groups, lr=1e-3, adam_nesterov=False, **SAME, **given)]  # type: ignore[arg-type]

    @staticmethod
    def _parameters(setting: Setting, shapes: Shapes) -> list[nn.Parameter]:
        made = []
        for seed, (shape, count) in enumerate(shapes.items()):
            values = setting.normal(*[shape] * (2 * count), seed=seed)
            for value, grad in zip(values[::2], values[1::2], strict=True):
                made.append(nn.Parameter(value))
                made[-1].grad = grad
        return made

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def moved(self) -> tuple[Tensor, ...]:
        """The displacement of the first matrix of each shape from its start."""
        return tuple(p.detach() - p0 for p, p0 in zip(self.firsts, self.start, strict=True))


SAME = {"bias_correction": False, "weight_decay": 0.1}
"""torch.optim.Muon's settings, except for the dtype."""


def cases(setting: Setting) -> Iterator[Planned]:
    scale = setting.scale
    named = {"tiny": [("", _TINY)], "cpu": [("", _TWENTIETH)]}.get(scale) or [
        (f" of {model}", shapes_of(model)) for model in MODELS[scale]
    ]
    for name, shapes in named:
        count = sum(n * torch.Size(shape).numel() for part in shapes for shape, n in part.items())
        facts = {"op": "muon", "model": name.removeprefix(" of ")}
        label = f"one step{name}, {count / 1e6:.1f} M parameters"
        yield Planned(label, lambda shapes=shapes: _case(setting, shapes), facts)  # type: ignore[misc]
    layers, width, heads = FUSED[scale]
    for by_head in (False, True):
        label = f"{layers} fused QKV of {heads} heads x {width}, by {'head' if by_head else 'part'}"
        shape = {"op": "muon", "layers": layers, "width": width, "heads": heads, "by_head": by_head}
        yield Planned(label, lambda by_head=by_head: _fused_case(setting, by_head), shape)  # type: ignore[misc]


def _case(setting: Setting, shapes: tuple[Shapes, Shapes]) -> Case:
    default = "float32" if setting.device.device.type == "cpu" else "float16"
    contestants = {
        "pmf, bfloat16": Contestant(setting, shapes, torch.bfloat16),
        "torch.optim.Muon and AdamW, bfloat16": Contestant(setting, shapes, None, "torch"),
        f"pmf, {default}": Contestant(setting, shapes, None),
    }
    truth = _truth(next(iter(contestants.values())))

    def error(name: str) -> float:
        contestants[name].step()
        return relative_error(contestants[name].moved(), truth)

    runs: dict[str, Run] = {name: contestant.step for name, contestant in contestants.items()}
    return Case(runs, error, STEP_LIMIT)


def _truth(contestant: Contestant) -> list[Tensor]:
    """The first step of `firsts` in float64."""
    exact = [nn.Parameter(p.detach().double()) for p in contestant.firsts]
    for p, given in zip(exact, contestant.firsts, strict=True):
        p.grad = None if given.grad is None else given.grad.double()
    Muon([{"params": exact, "algorithm": "muon"}], lr=1e-3, **SAME).step()  # type: ignore[arg-type]
    return [p.detach() - p0.double() for p, p0 in zip(exact, contestant.start, strict=True)]


def _fused_case(setting: Setting, by_head: bool) -> Case:
    """The same step on the same values: fused weights, and their matrices as separate parameters."""
    layers, width, heads = FUSED[setting.scale]
    rows = width // heads if by_head else width
    weights, grads = (setting.normal(*[(3 * width, width)] * layers, seed=seed) for seed in range(2))

    def parameters(cut: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        made = []
        for weight, grad in zip(weights, grads, strict=True):
            for part, g in zip(weight.split(cut), grad.split(cut), strict=True):
                made.append(nn.Parameter(part.to(dtype, copy=True)))
                made[-1].grad = g.to(dtype, copy=True)
        return made

    heads_of_parts = {"num_heads": heads} if by_head else {}
    settings = {"split_sizes": [width] * 3, **heads_of_parts}
    fused, separate, exact = parameters(3 * width), parameters(rows), parameters(rows, torch.float64)
    groups = {
        "pmf, fused": (fused, Muon([{"params": fused, **settings}], lr=1e-3)),
        "pmf, the same matrices separately": (separate, Muon(separate, lr=1e-3)),
    }
    Muon(exact, lr=1e-3).step()
    truth = torch.cat([p.detach() for p in exact]) - torch.cat(weights).double()

    def error(name: str) -> float:
        params, optimizer = groups[name]
        optimizer.step()
        return relative_error(torch.cat([p.detach() for p in params]) - torch.cat(weights), truth)

    runs: dict[str, Run] = {name: optimizer.step for name, (_, optimizer) in groups.items()}
    return Case(runs, error, STEP_LIMIT)
