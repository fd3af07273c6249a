"""What ends a command in an orderly way: mistakes that a user can repair, and being told to stop."""


class UserError(ValueError):
    """A mistake in a config, a file or a command.

    The message says what was given, what was expected and what to do. `train.py` and the scripts print
    it without a traceback and leave with exit code 2; from Python it is an ordinary `ValueError`.
    """


class Preempted(BaseException):
    """The process was told to end (SIGTERM) and has saved its state. No `except Exception` stops it."""
