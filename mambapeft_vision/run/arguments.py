"""The one dialect of the commands: `--option VALUE` or `option=VALUE`; every other `key=value` is a Hydra override.

Light to import, as config.py is.
"""

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.typed import nearest


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises UserError, and that leaves Hydra overrides to Hydra.

    Args:
        prog: the command's name in --help, such as `mambapeft sweep`.
        description: text for --help, whose line breaks are kept.
        usage: the command line for --help; argparse writes one if it is None.
        parents, add_help: as argparse takes them.

    Example:
        >>> parser = ArgumentParser("mambapeft sweep", "Many runs.")
        >>> _ = parser.add_argument("--workers", type=int)
        >>> options, overrides = parser.parse_with_overrides(["workers=2", "method=a,d", "seed=0"])
        >>> options.workers, overrides
        (2, ['method=a,d', 'seed=0'])
    """

    def __init__(
        self,
        prog: str | None = None,
        description: str | None = None,
        usage: str | None = None,
        *,
        parents: Sequence[argparse.ArgumentParser] = (),
        add_help: bool = True,
    ) -> None:
        super().__init__(
            prog,
            usage,
            description,
            parents=parents,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=add_help,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError, so that mistakes of all commands end in one place."""
        message = re.sub(r"^argument --(\S+): ", r"\1: ", message)
        raise UserError(f"{message}; {self.prog} --help says more")

    def parse_with_overrides(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Returns the options, and the overrides in their order. Raises UserError for a word that is neither."""
        options, overrides = self.parse_known_args(self._in_one_dialect(arguments))
        for word in overrides:
            if word.startswith("-"):
                self.error(f"{word} is unknown; {nearest(word.partition('=')[0], self._options())}")
            if "=" not in word and not word.startswith("~"):
                self.error(f"{word} is unknown; expected key=value")
        return options, overrides

    def parse_options(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options of a command that takes no overrides."""
        return self.parse_args(self._in_one_dialect(arguments))

    def parse_intermixed_options(self, arguments: Sequence[str]) -> argparse.Namespace:
        """As `parse_options`, where words and options may come in any order."""
        return self.parse_intermixed_args(self._in_one_dialect(arguments))

    def _options(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def _in_one_dialect(self, arguments: Sequence[str]) -> list[str]:
        """`option=VALUE` as `--option=VALUE`."""
        known = self._options()
        return [f"--{word}" if f"--{word.partition('=')[0]}" in known and "=" in word else word for word in arguments]


def positive(text: str) -> int:
    """A whole number of at least 1, as an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return int(text)
