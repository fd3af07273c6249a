"""Adapters on the Hugging Face hub, from its cache or downloaded."""

import re
from collections.abc import Mapping
from pathlib import Path

from mambapeft_vision.adapter.files import MAX_BYTES
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_repository(name: str | Path) -> bool:
    """Whether a name can only be `user/name` on the hub: there is no such folder here."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def fetch_adapter(repository: str, revision: str | None = None) -> Path:
    """Fetches an adapter's two files from a repository of the hub and returns their folder.

    The sizes of the files are checked before the download. If the hub does not answer, the client's cache is used. The
    client reads its usual variables: HF_TOKEN for private repositories, HF_HOME for the cache, HF_HUB_OFFLINE.

    Args:
        repository: `user/name`.
        revision: a branch, tag or commit; None: the main branch.
    Raises: UserError for files that are too large, and if neither the hub nor the cache has them.
    """
    from huggingface_hub import HfApi, snapshot_download

    info, reason = None, None
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # the hub's client raises many kinds
        reason = error
    if info is not None:
        _check_sizes(repository, {file.rfilename: file.size for file in info.siblings or ()})
    commit = revision if info is None else info.sha  # the fetched commit is the one whose sizes were checked
    try:
        return Path(
            snapshot_download(repository, revision=commit, allow_patterns=[*MAX_BYTES], local_files_only=info is None)
        )
    except Exception as error:
        at = "" if revision is None else f" at revision {plain(revision)}"
        raise UserError(
            f"{repository}{at} is no folder here, and could not be fetched from the Hugging Face hub "
            f"({type(reason or error).__name__}). Check the name; a private one needs HF_TOKEN or `hf auth login`"
        ) from error


def _check_sizes(repository: str, sizes: Mapping[str, int | None]) -> None:
    for name, limit in MAX_BYTES.items():
        size = sizes.get(name, 0)
        if size is None or size > limit:
            bytes_there = "an unknown number of" if size is None else f"{size:,}"
            raise UserError(
                f"{repository}: {name} has {bytes_there} bytes; expected at most {limit:,}. Nothing was downloaded; "
                f"check the name"
            )
