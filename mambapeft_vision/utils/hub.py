"""What the Hugging Face hub says of files before they are downloaded."""

from collections.abc import Mapping
from typing import NamedTuple

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain

_ANSWER_S = 10.0


class Measured(NamedTuple):
    """The commit whose files are within the limits, to be downloaded; or None, and why the hub did not answer."""

    commit: str | None
    reason: Exception | None


def measure(
    repository: str, limits: Mapping[str, int], revision: str | None = None, repo_type: str = "model"
) -> Measured:
    """Asks the hub for the sizes of files before they are asked for.

    Args:
        limits: largest size of each file, in bytes. A file that is not there is left to the download to say.
        revision: a branch, tag or commit; None: the main branch.
        repo_type: "model" or "dataset".

    Raises:
        UserError: for a file that is larger, or whose size the hub does not know.
    """
    from huggingface_hub import HfApi  # slow to import

    try:
        info = HfApi().repo_info(
            repository, revision=revision, repo_type=repo_type, timeout=_ANSWER_S, files_metadata=True
        )
    except Exception as error:  # the hub's client raises many kinds
        return Measured(None, error)
    sizes = {file.rfilename: file.size for file in getattr(info, "siblings", None) or ()}
    for name, limit in limits.items():
        size = sizes.get(name, 0)
        if size is None or size > limit:
            bytes_there = "an unknown number of" if size is None else f"{size:,}"
            raise UserError(
                f"{plain(repository)}: {plain(name)} has {bytes_there} bytes; expected at most {limit:,}. Nothing was "
                "downloaded; check the name"
            )
    return Measured(getattr(info, "sha", None), None)
