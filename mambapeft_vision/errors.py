"""What ends a command in an orderly way: mistakes that a user can repair, and being told to stop."""


class UserError(ValueError):
    """A mistake in a config, a file or a command.

    The message says what was given, what was expected and what to do. `train.py` and the scripts print
    it without a traceback and leave with exit code 2; from Python it is an ordinary `ValueError`.
    """


class NotFiniteError(UserError):
    """NaN or infinity where no such number may be.

    Args:
        ends_sweep: whether a sweep ends with it too, instead of going on with its other runs.
    """

    def __init__(self, message: str, ends_sweep: bool = True) -> None:
        super().__init__(message)
        self.ends_sweep = ends_sweep


class SweepEnded(BaseException):
    """A run ended in a way that its sweep is to end with. No `except Exception` of a launcher stops it."""


class Preempted(BaseException):
    """The process was told to end (SIGTERM) and has saved its state. No `except Exception` stops it."""
