"""Numbers of products, eager and in compiled graphs."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def products(counter: FlopCounterMode) -> int:
    """Attention's tangent shares the scores, and so costs less than another value."""
    kinds = counter.get_flop_counts()["Global"].items()
    return sum(n for kind, n in kinds if "attention" not in str(kind))


class Counted:
    """A backend that counts the products of the graphs' forward passes as they run."""

    def __init__(self) -> None:
        self.counter, self.graphs = FlopCounterMode(display=False), 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_func

        def forward(graph: Any, _: Any) -> Any:
            def run(*x: Any) -> Any:
                with self.counter:
                    return torch.fx.Interpreter(graph).run(*x)  # without the hooks of modules

            self.graphs += 1
            return make_boxed_func(run)

        return aot_autograd(fw_compiler=forward, bw_compiler=lambda graph, _: make_boxed_func(graph))(
            graph, inputs
        )
