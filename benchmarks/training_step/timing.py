"""Times of whole steps, with the sides interleaved."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .sides import Batch, Side


class StepTimes(NamedTuple):
    """Seconds: medians over the rounds."""

    step: float
    """Objective, backward and optimizer."""
    backward: float
    """Objective and backward only."""
    update: float


def interleaved(sides: Mapping[str, Side], batches: Sequence[Batch]) -> dict[str, StepTimes]:
    """One round per batch, in which every side runs one step; the starting side rotates.

    Every side must have run a step before, so that no first compilation or allocation is timed.
    """
    names = list(sides)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number, batch in enumerate(batches):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            sides[name].backward(batch)
            middle = time.perf_counter()
            sides[name].update()
            times[name].append((middle - start, time.perf_counter() - middle))
    return {
        name: StepTimes(
            statistics.median(backward + update for backward, update in found),
            statistics.median(backward for backward, _ in found),
            statistics.median(update for _, update in found),
        )
        for name, found in times.items()
    }
