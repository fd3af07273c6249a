"""Backbones by their registered names: those that the files of this package, or of one's own, register with timm."""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import timm
import torch
from timm.models import model_entrypoint
from torch import nn

import mambapeft_vision.backbones as package
from mambapeft_vision.backbones.weights import LICENSE_ACCEPTED, load_official, load_weights
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import shown
from mambapeft_vision.utils.typed import check_arguments

# Far beyond any model; an adapter's config is untrusted, and its sizes must not cost hours or all memory.
LARGEST, DEEPEST = 16_384, 256
MAX_PARAMETERS = 1_000_000_000


def create_backbone(
    name: str,
    weights: str = "official",
    seed: int = 0,
    weights_sha256: str | None = None,
    weights_license: str | None = None,
    **architecture: Any,
) -> Any:
    """A backbone (see `contract.Backbone`) with its weights.

    Args:
        name: as registered with timm, e.g. "vim_small_patch16_224".
        weights: "official" (fetched from the hub or its cache), "random" (drawn from `seed`), or a file.
        seed: seed of random weights.
        weights_sha256: hash of the file with the weights (as `sha256sum` prints it); another file is refused.
        weights_license: "accepted" lets official weights be fetched for which no licence was found.
        architecture: other sizes than the variant's, e.g. img_size, drop_path_rate.
    Returns: the model without a head, in training mode: normalised images [B, 3, H, W] → features.
    Raises: UserError for an unknown name, sizes out of range, and weights that are missing or do not fit.

    Example:
        >>> backbone = create_backbone("vim_nano_patch8_64")  # its weights come with the package
        >>> backbone(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 192])
    """
    check_registered(name)
    if not 0 <= seed < 2**63:
        raise UserError(f"backbone.seed={seed}; expected 0 to 2^63 - 1")
    kind = _kind_of(name)
    if weights_license not in (None, LICENSE_ACCEPTED):
        raise UserError(f"backbone.weights_license={weights_license!r}; expected {LICENSE_ACCEPTED!r}, or leave it out")
    check_sizes(kind, architecture)
    check_parameters(name, architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # `architecture` holds sizes alone by now: timm has arguments that read files and fetch weights.
        model: Any = timm.create_model(name, num_classes=0, **architecture)
    if weights == "official":
        load_official(model, weights_sha256, weights_license)
    elif weights != "random":
        load_weights(model, weights, weights_sha256)
    elif weights_sha256 is not None:
        raise UserError(
            "backbone.weights=random has no file to compare with; leave backbone.weights_sha256 out, or give a file"
        )
    return model


def check_parameters(name: str, architecture: Mapping[str, Any]) -> None:
    """Raises UserError for sizes that each are in range, but together take the memory of a machine."""
    if not architecture:
        return
    count = _count_parameters(name, json.dumps(dict(architecture), sort_keys=True))
    if count > MAX_PARAMETERS:
        raise UserError(
            f"backbone {name} with {shown(dict(architecture))} would have {count:,} parameters; expected at most "
            f"{MAX_PARAMETERS:,}"
        )


@lru_cache(256)  # models of one process are often of one size
def _count_parameters(name: str, architecture: str) -> int:
    """The number of parameters of a backbone with these sizes (`architecture`: a JSON object, for the cache)."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, num_classes=0, **json.loads(architecture)).parameters())


def add_backbones_folder(folder: str | Path) -> None:
    """Makes the backbones known that the Python files of `folder` register with timm, whose code is run.

    For backbones that live outside the package (`paths.backbones` in the config). A file `x.py` becomes the module
    `mambapeft_vision.backbones.x`. Files and names of the package win.
    Raises: UserError when there is no such folder.
    """
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UserError(
            f"paths.backbones={str(folder)!r} is no folder; give the folder that holds your backbone's file"
        )
    if str(path) not in package.__path__:
        package.__path__.append(str(path))
        registered.cache_clear()


@cache
def registered() -> list[str]:
    """Names of the backbones that the files of this package, and of the folders added to it, register with timm.

    Raises: UserError for a file of one's own that cannot be imported, or registers a name of the package.
    """
    of_package = _registered_by_package()
    own = [name for file in sorted(_files(package.__path__[1:])) for name in _registered_by_own(file)]
    for name, file in of_package.items():
        taken_by = model_entrypoint(name).__module__
        if taken_by.rpartition(".")[2] != file:
            raise UserError(f"{taken_by} registers {name}, which the package has; choose another name")
    return sorted([*of_package, *own])


@cache
def _registered_by_package() -> dict[str, str]:
    """Name → the file that registers it. Found before files of one's own are imported, which could take a name."""
    return {name: file for file in _files(package.__path__[:1]) for name in _registered_by(file)}


def _files(folders: Sequence[str]) -> set[str]:
    return {module.name for module in pkgutil.iter_modules(folders)}


def _registered_by(file: str) -> list[str]:
    module = importlib.import_module(f"{package.__name__}.{file}").__name__
    return [name for name in timm.list_models(module=file) if model_entrypoint(name).__module__ == module]


def _registered_by_own(file: str) -> list[str]:
    if file in _files(package.__path__[:1]):
        return []  # the package's file wins
    try:
        return _registered_by(file)
    except Exception as error:
        raise UserError(
            f"{file}.py of paths.backbones cannot be imported: {type(error).__name__}: {error}. Mend or move it"
        ) from error


def check_registered(name: str) -> None:
    """Raises UserError for a name that no backbone has."""
    if name not in registered():
        raise UserError(
            f"backbone.name={shown(name)} is unknown; known: {', '.join(registered())}. If a file of your own defines "
            f"it, name its folder: paths.backbones=DIR, --backbones DIR, or add_backbones_folder(DIR) in Python"
        )


def _kind_of(name: str) -> type[nn.Module]:
    """The class of a registered backbone. Raises UserError where its file does not say it."""
    entry = model_entrypoint(name)
    kind = get_type_hints(entry).get("return")
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(
            f"{entry.__module__}.{name} does not say what it returns; annotate it with the class of the model: "
            f"def {name}(pretrained: bool = False, **kwargs: Any) -> MyBackbone"
        )
    return kind


def one_block(name: str) -> dict[str, Any]:
    """Sizes with which a registered backbone has one block, or one in each of two stages."""
    kind = _kind_of(name)
    return {"depths": (1, 1)} if "depths" in inspect.signature(kind).parameters else {"depth": 1}


def check_sizes(kind: type[nn.Module], sizes: Mapping[str, Any]) -> None:
    """Raises UserError unless `sizes` are arguments of the class `kind` of the right type and in range."""
    if "num_classes" in sizes:
        raise UserError("backbone.num_classes cannot be given, because the task decides it; set dataset.num_classes")
    check_arguments(kind, sizes, "backbone")
    for key, value in sizes.items():
        if key == "img_size" and isinstance(value, (list, tuple)) and len(value) != 2:
            raise UserError(f"backbone.img_size={value}; expected [height, width], or one number for both")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            _check_range(key, number)


def _check_range(key: str, number: Any) -> None:
    if number is None or isinstance(number, (bool, str)):
        return
    if key in ("drop_path_rate", "drop_rate"):
        if not 0 <= number < 1:
            raise UserError(f"backbone.{key}={number}; expected 0 <= {key} < 1")
    elif key == "mlp_ratio":
        if not 0 <= number <= LARGEST:
            raise UserError(f"backbone.mlp_ratio={number}; expected a number from 0 to {LARGEST:,}")
    elif key == "norm_eps":
        if not number > 0:
            raise UserError(f"backbone.{key}={number}; expected a number > 0")
    else:
        largest = DEEPEST if key in ("depth", "depths") else LARGEST
        if not 1 <= number <= largest:
            raise UserError(f"backbone.{key}={number}; expected a whole number from 1 to {largest:,}")
