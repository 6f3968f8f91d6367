"""The one exception that speaks to the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: one sentence that names the thing and says what to do.

    The command line prints it as ``error: <sentence>`` and exits with status 2.
    """
