"""What the cache of decoded images holds, and cleaning it.

python scripts/decoded_cache.py data/cache                   # list
python scripts/decoded_cache.py data/cache --keep-gib 20     # delete what was not used for longest, down to 20 GiB
"""

import argparse
import time
from pathlib import Path

from mambapeft_vision.data.cache import clean, entries
from mambapeft_vision.utils.progress import format_duration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="paths.cache of the runs")
    parser.add_argument("--keep-gib", type=float, help="how much to leave; 0 empties the cache")
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.exit(2, f"error: {options.folder} is no folder; expected paths.cache of the runs (data/cache)\n")
    if options.keep_gib is not None:
        if options.keep_gib < 0:
            parser.exit(2, f"error: --keep-gib {options.keep_gib}: expected at least 0\n")
        deleted = clean(options.folder, int(options.keep_gib * 2**30))
        print(f"deleted {len(deleted)} files, {sum(size for _, size in deleted) / 2**30:.2f} GiB")
    left = entries(options.folder)
    for file, size, used in left:
        print(f"{size / 2**20:10,.0f} MiB  used {format_duration(time.time() - used)} ago  {file.name}")
    print(f"{len(left)} files, {sum(size for _, size, _ in left) / 2**30:.2f} GiB in {options.folder}")


if __name__ == "__main__":
    main()
