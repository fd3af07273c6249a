"""Folders for the Hugging Face hub: an adapter, its model card, and their upload."""

import json
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg

from mambapeft_vision.adapter.files import ADAPTER_FILE, CONFIG_FILE, read_adapter
from mambapeft_vision.data.preprocessing import MAX_CHANNELS, Preprocessing
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.utils.atomic import made_folder, write_bytes, write_text
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.tensor_files import MAX_BYTES
from mambapeft_vision.utils.text import markdown, plain, shown
from mambapeft_vision.utils.untrusted import read_bytes

PLACEHOLDER = "USER/NAME"  # in a card whose repository is not known yet
_COLOURS = {1: "grey", 3: "RGB"}
_NAMED_CLASSES = 20  # a card names at most so many


def to_hub_folder(
    folder: str | Path, out: str | Path, result: RunRecord | None = None, repository: str = PLACEHOLDER
) -> Path:
    """A folder ready for the Hugging Face hub: the adapter's two files and a model card.

    Args:
        result: the run's result.json, for the card's table; None: the card says that none was given.
        repository: where it will be, for the card's snippet.
    """
    adapter, out = read_adapter(folder), Path(out)
    if out.exists() and out.samefile(adapter.folder):
        raise UserError(f"--out {out} is the adapter's own folder; expected another one. Choose a new folder")
    with made_folder(out):
        for name in (ADAPTER_FILE, CONFIG_FILE):
            write_bytes(out / name, read_bytes(adapter.folder / name, max_bytes=MAX_BYTES))
        write_text(out / "README.md", model_card(adapter.config, result, repository))
    return out


def push_to_hub(folder: str | Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads a hub folder; needs a token (HF_TOKEN or `hf auth login`). Returns the commit's address.

    private: whether a new repository is private. revision: a branch to upload to; None: the main one.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(
            "no Hugging Face token found; set HF_TOKEN or run `hf auth login`, or upload the folder by hand"
        )
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=private)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder), revision=revision))
    except (OSError, ValueError) as error:  # the hub's own errors are among them
        raise UserError(
            f"the hub refuses {plain(repository)} or cannot be reached ({type(error).__name__}: {plain(error)}); check "
            f"the name and the token's rights, or upload {folder} by hand"
        ) from error


def model_card(config: dict[str, Any], result: RunRecord | None, repository: str = PLACEHOLDER) -> str:
    """Writes the model card: the adapter, its backbone, its result, the licences, and how to load it."""
    names = [markdown(name) for name in config["methods"]]
    methods = " + ".join(names) or "linear probe"
    task = markdown(config.get("task") or "not recorded" if result is None else result.task)
    base = config["backbone"]
    record: Any = timm.models.get_pretrained_cfg(base["name"]) or PretrainedCfg()
    weights, seed = recorded_weights(result)
    if weights not in ("official", "random"):
        weights = "PATH"  # where a reader of the card has them
    licence = record.license or "none found"
    rows = {
        "task": task,
        "methods": methods,
        "classes": _classes(config),
        "labels": "an image may have several labels" if config.get("multi_label") else "one for each image",
        **_measured(result, "mean average precision" if config.get("multi_label") else "accuracy"),
        "backbone": f"`{markdown(base['name'])}`, weights sha256 `{markdown(base['sha256'])}`",
        "licence of the backbone's weights": markdown(licence if weights == "official" else "of your own weights"),
        "licence of the images": "ask where the images come from; it is not recorded",
    }
    height, width = _sides(base["architecture"].get("img_size") or record.input_size[1:])
    channels = _channels(base["architecture"].get("in_chans", 3))
    preprocessing = Preprocessing.from_timm({**record.to_dict(), "input_size": (channels, height, width)})
    arguments = f'"{plain(repository)}", weights="{weights}"' + (f", seed={seed}" if weights == "random" else "")
    lines = [
        "---",
        "library_name: mambapeft_vision",
        "pipeline_tag: image-classification",
        "tags: [vision-mamba, peft, " + ", ".join(names) + "]",
        "---",
        f"# {methods} on {task}",
        "",
        f"An adapter of mambapeft_vision (format {config['format_version']}). It holds no backbone.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "```python",
        "import torch",
        "",
        "import mambapeft_vision as mv",
        "",
        f"model = mv.load_adapter({arguments})",
        f"images = torch.rand(1, {channels}, {height}, {width})  # {_COLOURS.get(channels, 'channels')} from 0 to 1",
        f"mean = torch.tensor({list(preprocessing.mean)}).view(-1, 1, 1)",
        f"std = torch.tensor({list(preprocessing.std)}).view(-1, 1, 1)",
        "logits = model((images - mean) / std)",
        "```",
        "",
        "Methods:",
        "```json",
        json.dumps(config["methods"], indent=2).replace("`", "\\u0060"),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _classes(config: dict[str, Any]) -> str:
    """The number of classes, and the first ones by name."""
    names = config.get("class_names")
    if not names:
        return str(config["num_classes"])
    listed = ", ".join(markdown(name) for name in names[:_NAMED_CLASSES])
    return f"{config['num_classes']}: {listed}" + (", …" if len(names) > _NAMED_CLASSES else "")


def _measured(result: RunRecord | None, measure: str) -> dict[str, str]:
    if result is None:
        names = (f"test {measure}", "test images", "trained parameters", "head", "seed")
        return dict.fromkeys(names, "not recorded")
    return {
        f"test {measure}": f"{100 * result.accuracy:.2f} %",
        "test images": f"{result.num_test:,}",
        "trained parameters": f"{result.trainable:,}",
        "head": f"{result.head:,}",
        "seed": str(result.seed),
    }


def _channels(in_chans: Any) -> int:
    """Raises UserError for what is no number of channels."""
    if type(in_chans) is not int or not 1 <= in_chans <= MAX_CHANNELS:
        raise UserError(
            f"{CONFIG_FILE}: in_chans is {shown(in_chans)}; expected a whole number from 1 to {MAX_CHANNELS}"
        )
    return in_chans


def _sides(img_size: Any) -> tuple[int, int]:
    """Height and width from a config. Raises UserError."""
    given = list(img_size) if isinstance(img_size, (list, tuple)) else [img_size] * 2
    if len(given) != 2 or any(type(side) is not int for side in given):
        raise UserError(f"{CONFIG_FILE}: img_size is {shown(img_size)}; expected one or two whole numbers")
    height, width = given
    return height, width


def recorded_weights(result: RunRecord | None) -> tuple[str, int]:
    """The weights of a run's backbone, and the seed that random ones are drawn from. Raises UserError."""
    recorded = {} if result is None else result.config.get("backbone", {})
    weights, seed = recorded.get("weights", "official"), recorded.get("seed") or 0
    if type(seed) is not int:
        raise UserError(f"result.json: backbone.seed is {shown(seed)}; expected a whole number. Copy it again")
    return str(weights), seed
