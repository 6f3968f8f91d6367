"""Print the library's log warnings while a command runs."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["notes_on_stderr"]


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Print warnings from pmf's loggers as ``note: <line>`` on stderr, on rank 0 only."""
    logger, handler = logging.getLogger("pmf"), _Notes(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {record.getMessage()}", file=sys.stderr)
