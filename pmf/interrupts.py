"""Ctrl-C: stop between two steps of work rather than in the middle of one, and quietly during imports.

A KeyboardInterrupt can be raised anywhere, including where Python discards it (in a destructor or a weakref
callback), and the program would keep running. An event, once set, is never lost.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator

__all__ = ["INTERRUPTED", "catch_stop_signals", "quiet_imports"]

INTERRUPTED = 130
"""The exit status that shells report after Ctrl-C."""


@contextlib.contextmanager
def catch_stop_signals(twice: bool = True) -> Iterator[threading.Event]:
    """Set the event on Ctrl-C or SIGTERM so that the step can finish; a second Ctrl-C interrupts immediately.

    twice is False under torchrun, which forwards the Ctrl-C that the process has already received.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        stop.set()
        if twice:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """While the command ``pmf`` imports its modules, which takes seconds, Ctrl-C ends it without a traceback.

    In any other program an import is interrupted as usual.
    """
    alone = threading.current_thread() is threading.main_thread()
    if not (alone and _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether this process was started as ``pmf`` or ``python -m pmf``."""
    return os.path.basename(sys.argv[0]) == "pmf" or ("-m", "pmf") in itertools.pairwise(sys.orig_argv)
