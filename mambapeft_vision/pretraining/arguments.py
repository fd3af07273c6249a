"""`mambapeft pretrain NAME key=value ...`, short for `mambapeft train pretrain=NAME pretrain.key=value ...`."""

import re
from collections.abc import Sequence


def train_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line of `mambapeft train` that `arguments` are short for.

    Flags stay as they are, and so do overrides of Hydra.

    Example:
        >>> train_arguments(["vim_nano", "minutes=5", "+architecture.depth=4"])
        ['pretrain=vim_nano', 'pretrain.minutes=5', '+pretrain.architecture.depth=4']
    """
    found = []
    for word in arguments:
        if word.startswith(("-", "hydra.")):
            found.append(word)
        elif "=" in word or word.startswith("~"):
            found.append(re.sub(r"^([+~]*)", r"\1pretrain.", word, count=1))
        else:
            found.append(f"pretrain={word}")
    return found
