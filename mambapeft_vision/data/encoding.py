"""How a task's images are encoded, by what their files begin with: names say what they like.

The releases of VTAB-1K differ in it (JPEG or PNG), and with it accuracy on some tasks.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SAMPLE = 32  # images that are looked at, evenly spread over the lists
UNKNOWN = "other"
_SIGNATURES = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"GIF8": "gif",
}
_LONGEST = max(map(len, _SIGNATURES))


def encoding_of(files: Sequence[Path]) -> str:
    """The encodings of images, joined by `+` where there are several, such as `jpeg` or `jpeg+png`.

    Of many files `SAMPLE` are looked at. One that cannot be read is left to who decodes it.
    """
    places = {len(files) * number // SAMPLE for number in range(SAMPLE)} if files else set()
    found = set()
    for place in places:
        with suppress(OSError), open(files[place], "rb") as file:
            start = file.read(_LONGEST)
            found.add(next((name for sign, name in _SIGNATURES.items() if start.startswith(sign)), UNKNOWN))
    return "+".join(sorted(found)) or UNKNOWN
