"""The exception for errors that the user can fix."""


class UserError(Exception):
    """An error that the user can fix: one sentence that names the problem and the remedy.

    The command line prints it as ``error: <sentence>`` and exits with status 2.
    """
