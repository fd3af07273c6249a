"""Python files of one's own. Their code is run, so only a command or a caller names their folders, never a record.

Light to import: the options of commands do not wait for PyTorch.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class OwnCode:
    """Folders with method files and with backbone files, or None."""

    methods: str | None = None
    backbones: str | None = None

    def add(self) -> None:
        """Makes the files importable. Raises UserError where a folder is missing."""
        if self.methods is not None:
            from mambapeft_vision.methods import add_methods_folder

            add_methods_folder(self.methods)
        if self.backbones is not None:
            from mambapeft_vision.backbones import add_backbones_folder

            add_backbones_folder(self.backbones)


NO_OWN_CODE = OwnCode()


def add_own_code_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that uses a run: `OwnCode(options.methods, options.backbones)`."""
    for name in ("method", "backbone"):
        text = f"{name} files of your own, if the run used some; runs their code"
        parser.add_argument(f"--{name}s", metavar="DIR", help=text)
