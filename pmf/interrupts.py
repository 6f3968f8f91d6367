"""Stopping between two steps of work, not in the middle of one.

A KeyboardInterrupt can be raised anywhere, also where Python drops it (in a destructor, in a callback of a
weak reference), and then the program runs on. An event that is set is never lost.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["catch_stop_signals"]


@contextlib.contextmanager
def catch_stop_signals(twice: bool = True) -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that the step can end; a second Ctrl-C interrupts at once.

    twice is False where torchrun started this process: it passes on the Ctrl-C that the process has had.
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
