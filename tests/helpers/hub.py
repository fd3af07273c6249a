"""A Hugging Face hub that knows the sizes of files, without a network."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest


def hub_with(
    monkeypatch: pytest.MonkeyPatch,
    repositories: Mapping[str, Mapping[str, int | None]],
    download: Callable[..., object] | None = None,
) -> None:
    """The hub has these files (their sizes in bytes), at any revision; of other repositories it does not answer.

    Its commits are called "commit of REVISION". download: in the place of hf_hub_download; None: nobody may call it.
    """

    def repo_info(self: Any, repository: str, **asked: Any) -> SimpleNamespace:
        assert asked["files_metadata"] and asked["timeout"]
        if repository not in repositories:
            raise OSError("offline")
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in repositories[repository].items()]
        return SimpleNamespace(sha=f"commit of {asked['revision']}", siblings=files)

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
