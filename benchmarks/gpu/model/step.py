"""A training step's time on a GPU, kernel by kernel: attention and Newton-Schulz by the cycle model, linear
layers by their operations, everything else by its bytes.

The step is the objective, its backward, the optimizer and three averages of the weights, in bfloat16 as
`pmf.training` runs them, without perceptual networks. Objective and backward run on meta tensors, and every
operator that PyTorch calls is noted. Launches take no time here: the GPU is never kept waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from training_step.sides import Batch, Ours

import pmf
from pmf.flow import Objective
from pmf.optim.routing import route
from pmf.sizes import height_and_width

from .machine import Rates
from .problems import Problem

Attend = Callable[[Problem], float]
"""The seconds that an attention problem takes."""
Multiply = Callable[[dict[str, Any]], float]
"""The seconds that the products of a planned Muon step take, with updating the parameters."""

PRODUCTS = "linear layers"
OTHERS = "PyTorch's other operators"
AVERAGES = 3


class Call(NamedTuple):
    """An operator's call: what decides its time."""

    kernel: str
    flops: int
    bytes: int
    attention: tuple[tuple[Problem, float], ...] = ()
    """Problems with as many queries as keys, and the fraction of each that the call computes."""


class Recorder(TorchDispatchMode):
    """Counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Views and allocations move nothing.
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not views and "empty" not in func.__name__:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            size = sum(x.numel() * x.element_size() for x in tensors)
            packet = func.overloadpacket
            flops = (
                flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
            )
            name = str(packet).split(".")[-1]
            ours = func.namespace == "pmf"
            kernel = name if ours else PRODUCTS if flops else OTHERS
            attention = problems_of(name, args) if ours and name in FIRST else ()
            self.calls[Call(kernel, flops, size, attention)] += 1
        return out


FIRST = {
    "attention_forward": 0,
    "attention_jvp_forward": 0,
    "attention_backward": 1,
    "attention_jvp_backward": 2,
}
"""The position of the query among the arguments of attention operators; key and value follow."""


def problems_of(name: str, args: Any) -> tuple[tuple[Problem, float], ...]:
    """The problems of a call: samples with and without tangents are separate launches."""
    query, key, _, *others = args[FIRST[name] :]
    samples, heads, queries, width = query.shape
    backward = "backward" in name
    with_tangents = next(x for x in others if x is not None).shape[0] if "jvp" in name else 0
    return tuple(
        (Problem(name, count * heads, key.shape[2], width, tangent, backward), queries / key.shape[2])
        for tangent, count in ((True, with_tangents), (False, samples - with_tangents))
        if count
    )


def calls_of(name: str, batch_size: int) -> tuple[Counter[Call], pmf.PixelMeanFlow]:
    """The calls of objective and backward, and the network on meta tensors."""
    with torch.device("meta"):
        side = Ours(pmf.create_model(name), "bf16")
    config = side.model.config
    size = height_and_width(config.image_size)
    images, labels = (
        torch.empty(batch_size, config.channels, *size),
        torch.zeros(batch_size, dtype=torch.int64),
    )
    draws = Objective().draw(images, labels, torch.Generator().manual_seed(0))
    draws = draws._replace(noise=draws.noise.to("meta"))
    with Recorder() as recorder:
        side.backward(Batch(images.to("meta"), labels.to("meta"), draws))
    return recorder.calls, side.model


def seconds_of(call: Call, rates: Rates, attend: Attend) -> float:
    if call.attention:
        return sum(attend(problem) * part for problem, part in call.attention)
    return max(call.flops / rates["gemm_flops"], call.bytes / rates["memory_bytes"])


MUON_BYTES = 4 * 3 + 2
"""Per element of a parameter in float32: the gradient, momentum, X."""


def optimizer(
    model: pmf.PixelMeanFlow, plans: Any, rates: Rates, multiply: Multiply
) -> Iterator[tuple[str, int, float]]:
    """Muon's products by the model; what else Muon, and Adam and the averages read and write."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for group in route(model):
        parameters = [parameter for _, parameter in group["params"]]
        if group["algorithm"] == "muon":
            shapes = [tuple(parameter.shape) for parameter in parameters]
            plan = plans.newton_schulz_launches(
                shapes=shapes, dtype="float32", compute_dtype="float16", muon=True
            )
            size = MUON_BYTES * sum(parameter.numel() for parameter in parameters)
            yield "muon", len(plan["launches"]), multiply(plan) + size / rates["memory_bytes"]
        else:
            # Read the gradient; read and write the weight and both moments.
            size = 4 * 7 * sum(parameter.numel() for parameter in parameters)
            yield "adam", 1, size / rates["memory_bytes"]
    yield "averages", 1, 4 * (1 + 2 * AVERAGES) * numbers / rates["memory_bytes"]


def step(
    name: str, batch_size: int, plans: Any, rates: Rates, attend: Attend, multiply: Multiply
) -> list[tuple[str, int, float]]:
    """Of each kernel of a step: its name, calls and seconds; the longest first."""
    calls, model = calls_of(name, batch_size)
    found: dict[str, tuple[int, float]] = {}
    for call, count in calls.items():
        before, seconds = found.get(call.kernel, (0, 0.0))
        found[call.kernel] = before + count, seconds + count * seconds_of(call, rates, attend)
    rows = [(kernel, count, seconds) for kernel, (count, seconds) in found.items()]
    return sorted([*rows, *optimizer(model, plans, rates, multiply)], key=lambda row: -row[2])
