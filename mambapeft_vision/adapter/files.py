"""An adapter on disk: a folder with adapter.safetensors and adapter_config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from mambapeft_vision.utils.atomic import atomic_path, write_json
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.state_dict_checks import check_finite

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from a folder. `adapter.load.apply_adapter` attaches it to a backbone."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, Tensor] = field(repr=False)


def write_adapter(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes both files into `folder`, each atomically. config: JSON-safe."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    with atomic_path(folder / ADAPTER_FILE) as temporary:
        temporary.write_bytes(serialize(tensors))  # unlike save_file, this says what a disk has against it
    write_json(folder / CONFIG_FILE, dict(config))


def read_adapter(folder: str | Path) -> Adapter:
    """Reads adapter_config.json and adapter.safetensors; nothing in them is executed.

    Raises: UserError naming the file and what is wrong with it.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; expected at most {_MAX_CONFIG_BYTES:,}")
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; expected the folder of a finished run or adapter") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected the folder of a finished run") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no valid JSON: {error}; copy it again from where it was made") from error
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        version = config.get("format_version") if isinstance(config, dict) else None
        raise UserError(
            f"{path}: format_version {version!r}; this release reads {FORMAT_VERSION}. Update mambapeft_vision"
        )
    _check_adapter_config(config, path)
    tensors = folder / ADAPTER_FILE
    try:
        with safe_open(tensors, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{tensors} cannot be read: {error}; copy it again from where it was made") from error
    check_finite(state, str(tensors))
    return Adapter(folder, config, state)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_adapter_config(config: Mapping[str, Any], path: Path) -> None:
    backbone, classes = config.get("backbone"), config.get("num_classes")
    fits = {
        "backbone.name (text)": isinstance(backbone, dict) and isinstance(backbone.get("name"), str),
        "backbone.sha256 (text)": isinstance(backbone, dict) and isinstance(backbone.get("sha256"), str),
        "backbone.architecture (an object)": isinstance(backbone, dict)
        and isinstance(backbone.get("architecture"), dict),
        "methods (an object)": isinstance(config.get("methods"), dict),
        "num_classes (a whole number >= 1)": type(classes) is int and classes >= 1,
    }
    wrong = [key for key, fit in fits.items() if not fit]
    if wrong:
        raise UserError(
            f"{path}: missing or of the wrong type: {', '.join(wrong)}; copy it again from where it was made"
        )
