"""Weights of backbones: reads published checkpoints, and writes their layout. Never unpickles code."""

import io
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as serialize
from timm.models import adapt_input_conv
from timm.models._builder import _resolve_pretrained_source
from timm.models._hub import download_cached_file
from torch import Tensor

from mambapeft_vision.backbones.layout import TokenLayout, select
from mambapeft_vision.backbones.ports import taken_ports
from mambapeft_vision.backbones.timm_model import TimmModel
from mambapeft_vision.utils.atomic import write_bytes
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_file
from mambapeft_vision.utils.hub import measure
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.state_dict_checks import check_finite, check_state
from mambapeft_vision.utils.tensor_files import MAX_BYTES, metadata_of, read_tensors, tensors_sha256
from mambapeft_vision.utils.text import plain, shown

LICENSE_ACCEPTED = "accepted"

#: Where checkpoints hold their tensors: official files under "model"; those of timm's train.py under the other two, of
#: which timm, too, takes the averaged weights first.
STATE_KEYS = ("model", "state_dict_ema", "state_dict")


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a file with weights.

    state: tensors under their names there.
    made_for: an architecture that the file names itself, e.g. "videomamba_small"; None: it names none.
    """

    state: dict[str, Tensor] = field(repr=False)
    made_for: str | None = None


def load_official(model: TimmModel, sha256: str | None = None, license_accepted: str | None = None) -> None:
    """Loads the published weights of `model`'s variant: from the package, or from the hub (or its cache).

    sha256: sha256 of the file. license_accepted: "accepted" where no licence of the weights was found.
    Raises: UserError when the variant has no published weights, no known licence, or the hub cannot be reached.
    """
    record = model.pretrained_cfg
    if record.get("file"):
        load_weights(model, record["file"], sha256)
        return
    if record.get("url"):
        load_weights(model, _download(record), sha256)
        return
    if record.get("hf_hub_id") is None:
        name, origin = record["architecture"], record.get("origin_url")
        published = f"no weights whose file names are known ({origin})" if origin else "no published weights"
        raise UserError(f"{name} has {published}; give backbone.weights=PATH or backbone.weights=random")
    load_weights(model, _fetch(record, license_accepted), sha256)


def load_pretrained(model: TimmModel, license_accepted: str | None = None) -> None:
    """Loads the weights that a model's timm record names, and the head among them where it has as many classes.

    The record may have been changed by `pretrained_cfg_overlay`. As in timm, the first of state_dict, file, url and
    hf_hub_id that is set decides; and where the record has num_classes -1 (`--pretrained-path` of timm's train.py), the
    head stays new.
    """
    record = model.pretrained_cfg
    with_head = record.get("num_classes") != -1
    source: Any
    kind, source = _resolve_pretrained_source(record)
    if kind == "state_dict":
        load_state(model, Checkpoint(dict(source)), "pretrained_cfg.state_dict", with_head=with_head)
    elif kind == "file":
        load_weights(model, source, with_head=with_head)
    elif kind == "url":
        load_weights(model, _download(record), with_head=with_head)
    elif kind == "local-dir":
        names = ("model.safetensors", "pytorch_model.bin")  # as timm.models.save_for_hf writes them
        paths = [Path(source) / name for name in names]
        load_weights(model, next((path for path in paths if path.is_file()), paths[0]), with_head=with_head)
    elif kind == "hf-hub":
        load_weights(model, _fetch(record, license_accepted), with_head=with_head)
    else:
        load_official(model)  # raises with the reason


def _download(record: Mapping[str, Any]) -> Path:
    """The file at a record's address, from PyTorch's cache or downloaded."""
    try:
        return Path(download_cached_file(record["url"], progress=False))
    except OSError as error:  # urllib's are among them
        raise UserError(
            f"the weights of {record['architecture']} could not be fetched from {record['url']} "
            f"({type(error).__name__}). Download the file elsewhere and give backbone.weights=PATH"
        ) from error


def _fetch(record: Mapping[str, Any], license_accepted: str | None) -> Path:
    """The file on the hub that a record names, from the hub's cache or downloaded. Its licence is printed first.

    The hub is asked for its size first; where it does not answer, its client's cache is used.
    """
    name, repository = record["architecture"], record["hf_hub_id"]
    file = record.get("hf_hub_filename") or "model.safetensors"
    licence = record.get("license")
    if licence is None and license_accepted != LICENSE_ACCEPTED:
        raise UserError(
            f"{name}: no licence was found for the weights {file} in {repository} ({record.get('origin_url')}). If you "
            f"may use them, give backbone.weights_license={LICENSE_ACCEPTED} (in Python: weights_license="
            f"{LICENSE_ACCEPTED!r}), or backbone.weights=PATH"
        )
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(repository, file), str):
        shown_licence = plain(licence or "none found, accepted by weights_license")
        print(f"fetching {plain(file)} of {name} from {plain(repository)}; licence: {shown_licence}", file=sys.stderr)
    commit, reason = measure(repository, {file: MAX_BYTES})
    try:
        # What is fetched is what was measured.
        return Path(hf_hub_download(repository, file, revision=commit, local_files_only=commit is None))
    except Exception as error:  # the hub's client raises many kinds when offline
        raise UserError(
            f"the weights {file} of {name} could not be fetched from the Hugging Face repository {repository} "
            f"({type(reason or error).__name__}). Download the file elsewhere and give backbone.weights=PATH"
        ) from error


def load_weights(model: TimmModel, path: str | Path, sha256: str | None = None, with_head: bool = False) -> None:
    """Loads a checkpoint (official .pth, or safetensors) into `model`, strictly, except for the head.

    Position embeddings are resized if the grid of patches differs. Filters of the patch embedding are summed or
    repeated for another number of channels, as timm does. If any tensor does not fit, nothing is loaded.

    Args:
        path: the file.
        sha256: sha256 of the file, checked before anything is read from it.
        with_head: load the head too, if the file has one of the same shape.
    Raises: UserError naming the architecture that the file is for, or listing missing, unknown and mis-shaped keys.
    """
    if sha256 is not None:
        _check_sha256(user_path(path), sha256)
    load_state(model, read_checkpoint(path), str(path), with_head)


def load_state(model: TimmModel, checkpoint: Checkpoint, source: str, with_head: bool = False) -> None:
    """`load_weights` of a checkpoint that was read from `source`."""
    check_family(model, checkpoint, source)
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    converted, added = model.convert_checkpoint(checkpoint.state)
    head = {k: v for k, v in converted.items() if k.startswith("head.")}
    given = {k: v for k, v in converted.items() if not k.startswith("head.")}
    dtype = next(model.parameters()).dtype
    in_file = tensors_sha256({k: checkpoint.state.get(k, v).to(dtype) for k, v in given.items() if k not in added})
    first = f"{model.pretrained_cfg.get('first_conv', 'patch_embed.proj')}.weight"
    position, filters = given.get("pos_embed"), given.get(first)
    if position is not None and position.ndim == 3 and position.shape[1] != model.pos_embed.shape[1]:
        special_rows = model.pos_embed.shape[1] == model.layout.length
        position = resize_pos_embed(position, model.layout_of, model.layout.grid, special_rows)
        given = {**given, "pos_embed": position}
    if filters is not None and filters.ndim == 4 and filters.shape[1] == 3 != model.in_chans:
        adapted = adapt_input_conv(model.in_chans, filters.to(dtype))
        given = {**given, first: adapted}
    check_state(expected, given, source)
    check_finite(given, source)
    mine = dict(model.head.named_parameters(prefix="head"))
    if with_head and head.keys() == mine.keys() and all(head[k].shape == mine[k].shape for k in mine):
        check_finite(head, source)
        given = {**given, **head}
    model.load_state_dict(given, strict=False)
    model.not_in_file = added
    model.loaded = Loaded.of(model, in_file)


def read_checkpoint(path: str | Path, keys: Sequence[str] = STATE_KEYS) -> Checkpoint:
    """The tensors of a checkpoint file, under their names there; from the first of `keys` that it has, if any.

    Nothing in the file is executed (`read_tensors`). Raises UserError.
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"backbone weights {shown(str(path))} do not exist; give a .pth or .safetensors file")
    try:
        content = read_tensors(path)
    except OSError as error:
        raise UserError(
            f"backbone weights {shown(str(path))} cannot be read ({error.strerror}); give a .pth or .safetensors file"
        ) from error
    state = next((content[key] for key in keys if key in content), content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(
            f"{shown(str(path))} holds no state dict of tensors (under {' or '.join(keys)}, or at top level)"
        )
    return Checkpoint(state, _made_for({**content, **metadata_of(path)}, path.stem))


def read_state_dict(path: str | Path, keys: Sequence[str] = STATE_KEYS) -> dict[str, Tensor]:
    """The tensors of `read_checkpoint`."""
    return read_checkpoint(path, keys).state


# ------------------------------------------------------------------------------------------------------------
# The architecture that a file is for

# Family → how it is called, and what names of its models start with in its own code and files.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "vim": ("Vim", ("vim_",)),
    "mambareg": ("Mamba-Reg", ("mambar_", "mambareg_")),
    "videomamba": ("VideoMamba", ("videomamba_",)),
    "arm": ("ARM", ("arm_",)),
    "vit": ("ViT", ("deit_", "vit_", "ported_")),
    "vmamba": ("VMamba", ("vmamba_", "vssm_")),
}


def _made_for(content: Mapping[str, Any], stem: str) -> str | None:
    """The architecture that a file's content or, failing that, its own name states."""
    if isinstance(content.get("architecture"), str):
        return content["architecture"]
    stated = getattr(content.get("args"), "model", None)  # the training command's, in official files
    return stated if isinstance(stated, str) else stem


def check_family(model: TimmModel, checkpoint: Checkpoint, source: str) -> None:
    """Raises UserError where a checkpoint is for another family of backbones, whether or not its keys would fit.

    Vim and VideoMamba have the same keys and shapes; only what the file states of itself tells them apart.
    """
    families = _families_of_keys(checkpoint.state)
    by_name = [f for f, (_, starts) in FAMILIES.items() if (checkpoint.made_for or "").startswith(starts)]
    if by_name and (not families or by_name[0] in families):
        families = by_name
    if not families or model.family in families:
        return
    mine, theirs = FAMILIES[model.family][0], " or ".join(FAMILIES[f][0] for f in families)
    stated = f" (it says {shown(checkpoint.made_for)})" if families == by_name else ""
    raise UserError(
        f"{source} holds weights of {theirs}{stated}, but this backbone is {mine}, where even the same keys mean "
        f"something else. Choose a backbone of {theirs}, or weights of {mine}"
    )


def _families_of_keys(names: Collection[str]) -> list[str]:
    if "pos_embed_cls" in names:
        return ["mambareg"]
    if "distill_head.0.weight" in names:
        return ["videomamba"]
    if any(name.endswith("attn.qkv.weight") for name in names):
        return ["vit"]
    if any(".mixer.A_c_log" in name or name.startswith("enc2dec") or ".mlp.w1." in name for name in names):
        return ["arm"]
    if any(".mixer.A_b_log" in name for name in names):
        return ["vim", "videomamba"]
    return ["vmamba"] if any(".op.x_proj_weight" in name for name in names) else []


# ------------------------------------------------------------------------------------------------------------
# Which weights a backbone has


@dataclass(frozen=True)
class Loaded:
    """The file's weights that a backbone was loaded with.

    sha256: hash of the file's own tensors before any was resized, because resizing depends on the machine.
    content: sha256 of the backbone's tensors as loaded. PyTorch's counters of writes would be quicker to compare, but
        writes through `.data` do not raise them.
    """

    sha256: str
    content: str

    @classmethod
    def of(cls, model: TimmModel, sha256: str) -> "Loaded":
        return cls(sha256, tensors_sha256(_from_file(model)))

    def still_in(self, model: TimmModel) -> bool:
        """Whether the backbone holds these weights, in the dtype in which they were loaded."""
        return self.content == tensors_sha256(_from_file(model))


def _from_file(model: TimmModel) -> dict[str, Tensor]:
    own = {name: p for name, p in model.named_parameters() if not name.startswith("head.")}
    return {name: p for name, p in own.items() if name not in model.not_in_file}


def backbone_sha256(backbone: Any) -> str:
    """sha256 of a backbone's weights, head excluded: of the file's own tensors where they came from a file."""
    loaded = getattr(backbone, "loaded", None)
    return loaded.sha256 if loaded is not None and loaded.still_in(backbone) else content_sha256(backbone)


def content_sha256(backbone: Any) -> str:
    """sha256 of a backbone's tensors as they are, head excluded."""
    return tensors_sha256({n: p for n, p in backbone.named_parameters() if not n.startswith("head.")})


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
    position: Tensor,
    layout_of: Callable[[tuple[int, int]], TokenLayout],
    grid: tuple[int, int],
    special_rows: bool = True,
) -> Tensor:
    """A position embedding [1, L, D] of a square grid → that of `grid`, bicubic. Special tokens keep their rows.

    Half-pixel centres, a = -0.75, border values repeated, no antialiasing.

    layout_of: the backbone's layout for a grid of patches.
    special_rows: whether special tokens have rows; Mamba-Reg keeps theirs in a tensor of their own.
    """
    new = layout_of(grid)
    special = len(new.special) if special_rows else 0
    side = math.isqrt(max(0, position.shape[1] - special))
    if side == 0 or side * side + special != position.shape[1]:
        raise UserError(
            f"pos_embed has {position.shape[1] - special} patch positions, which form no square grid; cannot resize it"
        )
    old = layout_of((side, side)) if special else None
    patches = position if old is None else select(position, old.patches)
    patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = patches.to(torch.promote_types(position.dtype, torch.float32))
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    patches = patches.flatten(2).transpose(1, 2).to(position.dtype)
    if old is None:
        return patches
    resized = position.new_empty(1, new.length, position.shape[2])
    resized[:, list(new.patches)] = patches
    resized[:, list(new.special)] = select(position, old.special)
    return resized


def export_official(model: TimmModel, path: str | Path) -> None:
    """Writes a plain (merged) backbone in the official key layout: .safetensors, or .pth with key `model`.

    Raises: UserError when methods are still attached to it.
    """
    state = model.official_state({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
    attached = taken_ports(model)
    if attached:
        raise UserError(f"the backbone still has methods attached ({attached[0]}, …); call merge() first")
    architecture = model.pretrained_cfg["architecture"]
    path = Path(path)
    if path.suffix == ".safetensors":
        content = serialize(state, metadata={"format": "pt", "architecture": architecture})
    else:
        file = io.BytesIO()
        torch.save({"model": state, "architecture": architecture}, file)
        content = file.getvalue()
    write_bytes(path, content)  # unlike those libraries, this says what a disk has against it
