"""The network under torch.compile, and its failures in a user's words."""

import contextlib
from collections.abc import Iterator

import torch

from pmf.errors import UserError
from pmf.models import PixelMeanFlow

# One for each mode of use (guidance, training with tangents and without) and kind of size (1, all samples,
# any other). torch.compile counts those of every run in the process, and gives up after 8.
_MOST_GRAPHS = 64


def compiled(network: PixelMeanFlow) -> PixelMeanFlow:
    """The network under ``torch.compile(fullgraph=True)``, same weights; UserError where nothing compiles."""
    with compiling():  # a missing C++ compiler should be told before a run has begun
        torch.compile(torch.sin)(torch.zeros(2, device=network.position.device))
    return torch.compile(network, fullgraph=True)  # type: ignore[return-value]


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Where graphs may be compiled: with room for all of them, and one sentence if that fails."""
    import torch._dynamo  # costs seconds

    try:
        with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--compile: torch.compile failed ({reason}): train without --compile") from error
