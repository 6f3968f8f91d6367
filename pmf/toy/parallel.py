"""Several toy trainings at a time, one to a core: their products are too small to gain from threads."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import NamedTuple

import torch

from pmf.toy.training import Outcome, Settings, train_and_measure

__all__ = ["Job", "train_all"]

_SECONDS_BETWEEN_REPORTS = 0.5


class Job(NamedTuple):
    """One network to train."""

    seed: int
    dim: int
    prediction: str


class _Shared(NamedTuple):
    """What the processes share."""

    steps: "Synchronized[int]"
    """Steps done, of all networks."""
    stop: Event


_shared: _Shared  # of a worker


def train_all(settings: Settings, jobs: Sequence[Job], on_steps: Callable[[int], object]) -> list[Outcome]:
    """Train the networks in as many processes as torch has threads; outcomes in the order of the jobs.

    on_steps receives the number of steps done by all networks, about twice a second. Every network is trained
    by one thread, so that its numbers do not depend on how many processes there are.
    """
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context.Value("q", 0), context.Event())
    workers = min(torch.get_num_threads(), len(jobs))
    with ProcessPoolExecutor(workers, context, initializer=_enter, initargs=shared) as executor:
        futures = [executor.submit(_train, settings, job) for job in jobs]
        try:
            running = set(futures)
            while running:
                done, running = wait(running, _SECONDS_BETWEEN_REPORTS)
                on_steps(shared.steps.value)
                for future in done:
                    future.result()  # a failure ends the others, too
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C included: the executor would wait for trainings of minutes
            shared.stop.set()
            executor.shutdown(cancel_futures=True)
            raise


def _enter(steps: "Synchronized[int]", stop: Event) -> None:
    global _shared
    _shared = _Shared(steps, stop)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent sets stop


def _train(settings: Settings, job: Job) -> Outcome:
    return train_and_measure(settings, *job, on_step=_count_step)


def _count_step() -> None:
    with _shared.steps.get_lock():
        _shared.steps.value += 1
    if _shared.stop.is_set():
        raise InterruptedError("another training failed, or the parent was interrupted")
