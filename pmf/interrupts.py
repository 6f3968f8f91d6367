"""Stop between two steps of work rather than in the middle of one.

A KeyboardInterrupt can be raised anywhere, including where Python discards it (in a destructor or a weakref
callback), and the program would keep running. An event, once set, is never lost.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["catch_stop_signals"]


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
