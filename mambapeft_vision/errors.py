"""The one exception type for mistakes a user can repair."""


class UserError(ValueError):
    """A mistake in a config, a file or a command.

    The message says what was given, what was expected and what to do. `train.py` and the scripts print
    it without a traceback and leave with exit code 2; from Python it is an ordinary `ValueError`.
    """
