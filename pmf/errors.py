"""The exception for errors that the user can fix, and how their sentences list names."""

from collections.abc import Sequence


class UserError(Exception):
    """An error that the user can fix: one sentence that names the problem and the remedy.

    The command line prints it as ``error: <sentence>`` and exits with status 2.
    """


def first_few(names: Sequence[str], count: int) -> str:
    """The first names, and the number of those beyond them: "cat, dog and 7 more"."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
