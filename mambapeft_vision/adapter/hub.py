"""Adapters on the Hugging Face hub, from its cache or downloaded."""

import re
from pathlib import Path

from mambapeft_vision.adapter.files import MAX_BYTES
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hub import measure
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
    from huggingface_hub import snapshot_download

    commit, reason = measure(repository, MAX_BYTES, revision)
    try:
        # What is fetched is what was measured.
        return Path(
            snapshot_download(
                repository,
                revision=commit or revision,
                allow_patterns=[*MAX_BYTES],
                local_files_only=commit is None,
            )
        )
    except Exception as error:  # the hub's client raises many kinds
        at = "" if revision is None else f" at revision {plain(revision)}"
        raise UserError(
            f"{repository}{at} is no folder here, and could not be fetched from the Hugging Face hub "
            f"({type(reason or error).__name__}). Check the name; a private one needs HF_TOKEN or `hf auth login`"
        ) from error
