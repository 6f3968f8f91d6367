"""Muon's step as a CUDA graph: captured once and replayed, against steps launched one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from pmf.bench.harness import Case, Planned, Setting
from pmf.check.tolerance import relative_error
from pmf.optim import Muon

SHAPES = {
    "tiny": {(24, 32): 2, (7,): 1},
    "quick": {(768, 768): 8, (768, 2048): 4, (768,): 20},
    "full": {(768, 768): 102, (768, 2048): 72, (256, 768): 4, (768,): 200},
}
WARM_UP = 3


def cases(setting: Setting) -> Iterator[Planned]:
    """On CUDA only: CPUs have no graphs."""
    if setting.device.device.type == "cuda":
        yield Planned("Muon step, captured", lambda: _case(setting), {"op": "graph capture"})


def _case(setting: Setting) -> Case:
    replayed, launched = _Stepper(setting), _Stepper(setting)
    replay = replayed.captured()
    for _ in range(WARM_UP + 1):  # capturing runs the warm-up steps and records one without running it
        launched.optimizer.step()
    replay()
    exact = [p.detach().double() for p in launched.params]
    error = relative_error([p.detach() for p in replayed.params], exact)
    runs = {"pmf, a graph": replay, "pmf, launched one by one": launched.optimizer.step}
    return Case(runs, lambda name: error, limit=0.0)


class _Stepper:
    """Parameters with fixed gradients, and their optimizer."""

    def __init__(self, setting: Setting) -> None:
        shapes = [shape for shape, count in SHAPES[setting.scale].items() for _ in range(count)]
        self.params = [nn.Parameter(x) for x in setting.normal(*shapes)]
        for p, grad in zip(self.params, setting.normal(*shapes, seed=1), strict=True):
            p.grad = grad
        self.optimizer = Muon(self.params, lr=1e-3)

    def captured(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.optimizer.step()
        return graph.replay
