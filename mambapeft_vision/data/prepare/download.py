"""Fetches the VTAB-1K archive from the Hugging Face hub."""

from pathlib import Path

from mambapeft_vision.utils.atomic import errors_name
from mambapeft_vision.utils.errors import WRITE_ERRORS, UserError
from mambapeft_vision.utils.hub import measure
from mambapeft_vision.utils.text import plain

ARCHIVE_NAME = "vtab-1k.zip"
HUB_DATASET = "XiN0919/VTAB-1k"
HUB_PAGE = f"https://huggingface.co/datasets/{HUB_DATASET}/resolve/main/{ARCHIVE_NAME}"
_MAX_BYTES = 20_000_000_000
DRIVE_PAGE = "https://drive.google.com/file/d/1yZKwiKdsBzTfBgnStRveYMokc7GMMd5p"


def fetch_archive(folder: Path) -> Path:
    """Downloads the archive (4.66 GB) into `folder`; returns its path.

    A complete archive is not downloaded again. huggingface_hub continues a partial one and shows its own progress.

    Raises:
        UserError: with the reason and the ways to download by hand; for an archive of more than 20 GB.
    """
    archive = folder / ARCHIVE_NAME
    if archive.is_file():
        print(f"Using the archive downloaded before: {archive}")
        return archive
    from huggingface_hub import hf_hub_download  # slow to import, and only downloads need it

    folder.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {ARCHIVE_NAME} from {HUB_PAGE} …")
    commit, reason = measure(HUB_DATASET, {ARCHIVE_NAME: _MAX_BYTES}, repo_type="dataset")
    try:
        if reason is not None:
            raise reason
        with errors_name(archive):
            hf_hub_download(
                repo_id=HUB_DATASET, filename=ARCHIVE_NAME, repo_type="dataset", revision=commit, local_dir=folder
            )
    except Exception as error:  # the hub client's own, its HTTP library's and the system's errors, by version
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
            raise
        raise UserError(
            f"VTAB-1K could not be downloaded ({type(error).__name__}: {plain(error)}).\n"
            "Check the network and run the same command again: it continues where it stopped.\n"
            "Or download by hand, on any machine, from one of\n"
            f"  {HUB_PAGE}\n"
            f"  {DRIVE_PAGE}\n"
            f"and run `mambapeft prepare vtab1k --zip PATH/TO/{ARCHIVE_NAME}`."
        ) from error
    return archive
