"""Weights of backbones: official Vim checkpoints in, official layout out. Never unpickles code."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambapeft_vision.backbones.layout import TokenLayout
from mambapeft_vision.backbones.ports import taken_ports
from mambapeft_vision.utils.atomic import atomic_path
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_file
from mambapeft_vision.utils.state_dict_checks import check_finite, check_state

EMBEDDED_WEIGHTS = Path(__file__).parent / "weights"  # of our own, shipped with the package


def load_official(model: Any, sha256: str | None = None) -> None:
    """Loads the official weights of `model`'s variant: from the package, or from the hub (or its cache).

    sha256: of the file. Raises: UserError when the variant has no published weights or the hub cannot be reached.
    """
    cfg = model.default_cfg
    if "embedded" in cfg:
        load_weights(model, EMBEDDED_WEIGHTS / cfg["embedded"], sha256)
        return
    repository, file = cfg.get("hf_hub_id"), cfg.get("hf_hub_filename")
    name = cfg.get("name", type(model).__name__)
    if repository is None:
        raise UserError(f"{name} has no published weights; give backbone.weights=PATH or backbone.weights=random")
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repository, file)
    except Exception as error:  # the hub's client raises many kinds when offline
        raise UserError(
            f"the weights {file} of {name} could not be fetched from the Hugging Face repository {repository} "
            f"({type(error).__name__}). Download the file elsewhere and give backbone.weights=PATH"
        ) from error
    load_weights(model, path, sha256)


def load_weights(model: Any, path: str | Path, sha256: str | None = None) -> None:
    """Loads a Vim checkpoint (official .pth, or safetensors) into `model`, strictly, except for the head.

    The position embedding is resized when the image size differs. Nothing is loaded when anything does not fit.
    sha256: of the file, checked before anything is read from it.
    Raises: UserError listing missing, unknown and mis-shaped keys, or naming both hashes.
    """
    if sha256 is not None:
        _check_sha256(Path(path), sha256)
    state = read_state_dict(path)
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    given = {k: v for k, v in state.items() if not k.startswith("head.")}
    position = given.get("pos_embed")
    if position is not None and position.ndim == 3 and position.shape[1] != expected["pos_embed"].shape[1]:
        given["pos_embed"] = resize_pos_embed(position, model.layout_of, model.layout.grid)
    check_state(expected, given, str(path))
    check_finite(given, str(path))
    model.load_state_dict(given, strict=False)


def read_state_dict(path: str | Path, key: str = "model") -> dict[str, Tensor]:
    """The tensors of a checkpoint file, under their names there; from `content[key]` where there is such a key.

    Pickled files are read with PyTorch's restricted unpickler; besides tensors only `argparse.Namespace`
    (a leftover of training in the official files) is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"backbone weights {str(path)!r} do not exist; give a .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the restricted unpickler raises anything on bytes that are no pickle
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as a checkpoint: {reason}. Expected safetensors, or a PyTorch file that holds "
            f"tensors only; download it again"
        ) from error
    state = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict of tensors (under {key!r} or at top level)")
    return state


def _check_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        return  # for the reader to say
    digest = sha256_file(path)
    if digest != expected.lower():
        raise UserError(
            f"{path} has sha256 {digest}; expected {expected.lower()} (backbone.weights_sha256). Get the "
            f"file again, or correct the key"
        )


def resize_pos_embed(
    position: Tensor, layout_of: Callable[[tuple[int, int]], TokenLayout], grid: tuple[int, int]
) -> Tensor:
    """A position embedding [1, L, D] of a square grid → that of `grid`, bicubic. Special tokens keep their rows.

    layout_of: the backbone's layout for a grid of patches.
    """
    new, special = layout_of(grid), len(layout_of(grid).special)
    side = math.isqrt(max(0, position.shape[1] - special))
    old = layout_of((side, side))
    if old.length != position.shape[1] or not side:
        raise UserError(
            f"pos_embed has {position.shape[1] - special} patch positions, which form no square grid; cannot resize it"
        )
    spatial = position[:, list(old.patches)].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    spatial = F.interpolate(spatial, size=grid, mode="bicubic", align_corners=False)
    resized = position.new_empty(1, new.length, position.shape[2])
    resized[:, list(new.patches)] = spatial.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)
    resized[:, list(new.special)] = position[:, list(old.special)]
    return resized


def export_official(model: Any, path: str | Path) -> None:
    """Writes a plain (merged) backbone in the official key layout: .safetensors, or .pth with key `model`.

    Raises: UserError when methods are still attached to it.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    attached = taken_ports(model)
    if attached:
        raise UserError(f"the backbone still has methods attached ({attached[0]}, …); call merge() first")
    path = Path(path)
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary)
        else:
            torch.save({"model": state}, temporary)
