"""How a task's images are encoded, read from the first bytes of their files, because file names can be wrong.

The releases of VTAB-1K differ in it (JPEG or PNG), and with it accuracy on some tasks.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mambapeft_vision.data.own.files import known_suffix
from mambapeft_vision.data.preprocessing import MAX_IMAGE_BYTES
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.untrusted import open_plain

SAMPLE = 32  # images that are looked at, evenly spread over the lists
UNKNOWN = "other"
_NAMES = {".jpg": "jpeg", ".tif": "tiff"}  # names of encodings whose ending is shorter
_READ = 10  # bytes that tell a format


def encoding_of(files: Sequence[Path]) -> str:
    """The encodings of images, joined by `+` where there are several, such as `jpeg` or `jpeg+png`.

    Of many files only `SAMPLE` are read. A file that cannot be read is skipped; decoding reports it later.
    """
    places = {len(files) * number // SAMPLE for number in range(SAMPLE)} if files else set()
    found = set()
    for place in places:
        with suppress(OSError, UserError):
            with open_plain(files[place], max_bytes=MAX_IMAGE_BYTES, follow_links=True) as file:
                suffix = known_suffix(file.read(_READ))
            found.add(UNKNOWN if suffix is None else _NAMES.get(suffix, suffix[1:]))
    return "+".join(sorted(found)) or UNKNOWN
