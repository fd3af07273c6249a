"""Lists the cache of decoded images, and shrinks it.

mambapeft cache data/cache                   list
mambapeft cache data/cache --keep-gib 20     delete the least recently used tasks, down to 20 GiB
"""

import time
from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.data.cache import clean, entries
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.progress import format_duration


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft cache", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the cache: paths.cache of the runs")
    parser.add_argument("--keep-gib", type=float, help="size to keep; 0 empties the cache")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is no folder; expected paths.cache of the runs (data/cache)")
    if options.keep_gib is not None:
        if not options.keep_gib >= 0:
            raise UserError(f"--keep-gib {options.keep_gib}: expected at least 0")
        deleted = clean(options.folder, int(options.keep_gib * 2**30))
        say(f"deleted {len(deleted)} files, {sum(size for _, size in deleted) / 2**30:.2f} GiB")
    left = entries(options.folder)
    for file, size, used in left:
        say(f"{size / 2**20:10,.0f} MiB  used {format_duration(time.time() - used)} ago  {file.name}")
    say(f"{len(left)} files, {sum(size for _, size, _ in left) / 2**30:.2f} GiB in {options.folder}")
