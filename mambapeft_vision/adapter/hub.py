"""Adapters on the Hugging Face hub, from its cache or downloaded."""

import re
from pathlib import Path

from mambapeft_vision.adapter.files import ADAPTER_FILE, CONFIG_FILE
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_repository(name: str | Path) -> bool:
    """Whether a name can only be `user/name` on the hub: there is no such folder here."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def fetch_adapter(repository: str, revision: str | None = None) -> Path:
    """The folder with an adapter's two files of a repository `user/name`, at a branch, tag or commit.

    Private repositories, the cache and being offline are the hub's client's: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
    Raises: UserError where it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[ADAPTER_FILE, CONFIG_FILE]))
    except Exception as error:  # the hub's client raises many kinds
        at = "" if revision is None else f" at revision {plain(revision)}"
        raise UserError(
            f"{repository}{at} is no folder here, and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}). Check the name; a private one needs HF_TOKEN or `hf auth login`"
        ) from error
