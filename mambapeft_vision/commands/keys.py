"""Lists the keys of a config with type, default and meaning.

mambapeft keys
mambapeft keys trainer
"""

from collections.abc import Sequence

from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.config_reference import SCHEMAS, reference
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.typed import nearest


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft keys", __doc__)
    parser.add_argument("key", nargs="?", default="", help="a section, or one key (default: all)")
    parser.add_argument(
        "--root", choices=SCHEMAS, default="train", help="config whose keys are listed (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    known = reference(options.root)
    keys = [key for key in known if not options.key or f"{key.name}.".startswith(f"{options.key}.")]
    if not keys:
        raise UserError(f"{options.key} is no key; {nearest(options.key, (key.name for key in known))}")
    for key in keys:
        print(f"{key.name} ({key.kind}){f' = {key.default}' if key.default else ''}\n    {key.meaning}")
