"""The time of a Muon step's products, launch by launch, and of torch.optim.Muon's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import products
from .library import demangled
from .machine import Rates
from .products import Product
from .sass import Kernel

Code = Callable[[str], Kernel]
"""The machine code of a kernel, by mangled name."""


class Row(NamedTuple):
    """A product of all matrices of a bucket, in one launch."""

    kernel: str
    product: Product
    seconds: float


class Multiplier:
    """Predicts the products of planned calls."""

    def __init__(self, hosts: dict[int, str], code: Code, rates: Rates):
        self.hosts, self.code, self.rates = hosts, code, rates
        self._known: dict[Any, tuple[float, float]] = {}

    def rows(self, plan: dict[str, Any]) -> list[Row]:
        rows = []
        for launch, own in products.waves(plan):
            mangled = self.hosts[launch["kernel"]]
            kernel = demangled(mangled).split("<")[0].removeprefix("ns::")
            if products.takes(kernel):
                each = products.predict(self.code(mangled), kernel, own, self.rates, self._known)
            else:
                size = products.UPDATE_BYTES / self.rates["memory_bytes"] if "update" in kernel else 0
                each = [
                    bound(product, self.rates) + size * product.m * product.n * product.matrices
                    for product in own
                ]
            rows += [Row(kernel, *row) for row in zip(own, each, strict=True)]
        return rows

    def seconds(self, plan: dict[str, Any]) -> float:
        return sum(row.seconds for row in self.rows(plan))


def bound(product: Product, rates: Rates) -> float:
    """The least seconds of the mma.sync kernels, which the model does not simulate: those of their tensor
    cores, or of what their tiles of 128 x 128 take from the L2 cache.
    """
    flops_a_cycle = 2 * 16 * 8 * 16 / rates["hmma_cycles"] * 4 * rates["processors"]
    tensor = product.flops() / flops_a_cycle / rates["clock_hz"]
    return max(tensor, product.flops() / 64 / rates["l2_bytes"])


def of_torch(shapes: list[tuple[int, ...]], rates: Rates) -> float:
    """Seconds of torch.optim.Muon's step, on float32 parameters with momentum: each operator takes the larger
    of its operations' time, at the rate of linear layers, and its bytes' time. Launches take none.
    """
    from .step import Recorder, seconds_of

    with torch.device("meta"):
        parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = torch.optim.Muon(parameters, nesterov=True)
    optimizer.step()  # makes the momentum
    with Recorder() as recorder:
        optimizer.step()
    return sum(n * seconds_of(call, rates, lambda problem: 0) for call, n in recorder.calls.items())
