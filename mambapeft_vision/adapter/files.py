"""An adapter on disk: a folder with adapter.safetensors and adapter_config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from mambapeft_vision.utils.atomic import write_bytes, write_json
from mambapeft_vision.utils.console import warn
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_json
from mambapeft_vision.utils.names import check_method_names
from mambapeft_vision.utils.state_dict_checks import check_finite
from mambapeft_vision.utils.tensor_files import MAX_HEADER, tensors_sha256
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import read_bytes, read_json, refuse_references

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1
MAX_BYTES = {CONFIG_FILE: 10_000_000, ADAPTER_FILE: 4_000_000_000}
# In the metadata of adapter.safetensors, whose writer puts several entries in random order. Tools that change the
# tensors leave it out.
_CHECKSUM = "tensors_sha256"
_CONFIG_CHECKSUM = "config_sha256"  # in adapter_config.json
_DECIDING = ("backbone", "methods", "num_classes")  # keys of the config on which predictions depend
_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
_AGAIN = "copy it again from where it was made"


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from a folder. `adapter.load.apply_adapter` attaches it to a backbone."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, Tensor] = field(repr=False)
    state_file: str = ADAPTER_FILE


def write_adapter(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes both files into `folder`, each atomically and with a checksum. config: JSON-safe."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    # Unlike safetensors' save_file, write_bytes says what a disk has against it.
    write_bytes(folder / ADAPTER_FILE, serialize(tensors, {_CHECKSUM: tensors_sha256(tensors)}))
    write_json(folder / CONFIG_FILE, {**config, _CONFIG_CHECKSUM: _config_sha256(config)})


def file_of_adapter(folder: Path, name: str) -> Path:
    """Returns the file of this name; follows the links that the hub's cache makes to `blobs` of the same repository.

    Any other link is returned as it is, because the readers of foreign files refuse links.
    """
    file = folder / name
    if file.is_symlink() and folder.absolute().parent.name == "snapshots":
        content = file.resolve()
        if content.parent == folder.resolve().parents[1] / "blobs":
            return content
    return file


def read_adapter(folder: str | Path) -> Adapter:
    """Reads adapter_config.json and adapter.safetensors; nothing in them is executed.

    It warns of a config that is not as it was saved: damaged, or changed by hand.

    Raises: UserError naming the file and what is wrong with it.
    """
    folder = Path(folder)
    path, tensors = file_of_adapter(folder, CONFIG_FILE), file_of_adapter(folder, ADAPTER_FILE)
    try:
        config = read_json(path, max_bytes=MAX_BYTES[CONFIG_FILE])
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; expected the folder of a finished run or adapter") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected the folder of a finished run") from error
    if isinstance(config, dict) and "peft_type" in config and "format_version" not in config:
        raise UserError(
            f"{path} is of an adapter of Hugging Face peft; convert it: mambapeft convert from-peft {plain(folder)} "
            f"--backbone NAME --out FOLDER"
        )
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        version = config.get("format_version") if isinstance(config, dict) else None
        raise UserError(
            f"{path}: format_version {shown(version)}; this release reads {FORMAT_VERSION}. Update mambapeft_vision"
        )
    _check_adapter_config(config, path)
    refuse_references(config, str(path))
    checksum = _config_sha256(config)
    if config.pop(_CONFIG_CHECKSUM, checksum) != checksum:
        warn(
            f"{plain(path)} is not as it was saved ({', '.join(_DECIDING)}): damaged or changed by hand; if you have "
            f"not changed it, {_AGAIN}"
        )
    return Adapter(folder, config, read_state(tensors))


def _config_sha256(config: Mapping[str, Any]) -> str:
    return sha256_json({key: config.get(key) for key in _DECIDING})


def read_state(file: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file, and compares them with the checksum where the file has one.

    Raises: UserError for a file that is missing, damaged or too large, and for tensors with NaN or infinity.
    """
    try:
        content = read_bytes(file, max_bytes=MAX_BYTES[ADAPTER_FILE])
        if int.from_bytes(content[:8], "little") > MAX_HEADER:
            raise UserError(f"{file} cannot be read: it is no safetensors, or lists too many tensors; {_AGAIN}")
        state = deserialize(content)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {plain(error)}; {_AGAIN}") from error
    odd = [name for name, tensor in state.items() if tensor.dtype not in _DTYPES]
    if odd:
        raise UserError(f"{file}: {shown(odd[0])} is of type {state[odd[0]].dtype}; expected numbers. {_AGAIN}")
    recorded = _metadata(content).get(_CHECKSUM)
    if recorded is not None and recorded != tensors_sha256(state):
        raise UserError(f"{file} is damaged: its tensors are not those that were saved (sha256); {_AGAIN}")
    check_finite(state, str(file))
    return state


def _metadata(content: bytes) -> dict[str, Any]:
    """The metadata of a safetensors file that the library has read without an error."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _check_adapter_config(config: Mapping[str, Any], path: Path) -> None:
    backbone, classes = config.get("backbone"), config.get("num_classes")
    names = config.get("class_names")
    fits = {
        "backbone.name (text)": isinstance(backbone, dict) and isinstance(backbone.get("name"), str),
        "backbone.sha256 (text)": isinstance(backbone, dict) and isinstance(backbone.get("sha256"), str),
        "backbone.architecture (an object)": isinstance(backbone, dict)
        and isinstance(backbone.get("architecture"), dict),
        "methods (an object)": isinstance(config.get("methods"), dict),
        "num_classes (a whole number >= 1)": type(classes) is int and classes >= 1,
        "class_names (a text for each class)": names is None
        or (isinstance(names, list) and len(names) == classes and all(isinstance(name, str) for name in names)),
        "multi_label (true or false)": isinstance(config.get("multi_label", False), bool),
    }
    wrong = [key for key, fit in fits.items() if not fit]
    if wrong:
        raise UserError(
            f"{path}: missing or of the wrong type: {', '.join(wrong)}; copy it again from where it was made"
        )
    try:
        check_method_names(config["methods"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
