"""Where the package finds its own files."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def configs_folder() -> Path:
    """The folder with train.yaml: inside an installed package, next to the package in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def weights_in_package(name: str) -> Path | None:
    """The file with the weights of a registered backbone, where this project made them; None for all others."""
    files = (_PACKAGE / "backbones" / "weights").glob("*.safetensors")
    return next((file for file in files if name.startswith(f"{file.stem}_")), None)
