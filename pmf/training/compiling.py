"""The network under torch.compile, with its failures reported as UserErrors."""

import contextlib
from collections.abc import Iterator

import torch

from pmf.errors import UserError
from pmf.models import PixelMeanFlow

# One graph per mode (guidance, training with and without tangents) and kind of size (1, all samples, any
# other). torch.compile counts the graphs of every run in the process and gives up after 8.
_MOST_GRAPHS = 64


def compiled(network: PixelMeanFlow) -> PixelMeanFlow:
    """The network under ``torch.compile(fullgraph=True)``, sharing its weights; UserError if it fails."""
    with compiling():  # report a missing C++ compiler before the run begins
        torch.compile(torch.sin)(torch.zeros(2, device=network.position.device))
    return torch.compile(network, fullgraph=True)  # type: ignore[return-value]


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Allow enough graphs to be compiled, and turn a failure to compile into a UserError."""
    import torch._dynamo  # importing it takes seconds

    try:
        with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--compile: torch.compile failed ({reason}): train without --compile") from error
