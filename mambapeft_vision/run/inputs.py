"""Fingerprints of what a result is made from: images, weights and the user's own Python files.

Code that continues from something older (a finished run, a checkpoint, a search, an evaluation) asks `changed` whether
its inputs are still the same.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mambapeft_vision.backbones.weights import backbone_sha256
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.run.build import build_backbone_offline, build_backbone_without_weights, build_dataset
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.names import user_path

# Among a result's versions.
OWN_METHODS, OWN_BACKBONES, CONTENT = "method files", "backbone files", "image content"
_METHODS, _BACKBONES = "mambapeft_vision.methods.", "mambapeft_vision.backbones."


@dataclass(frozen=True)
class Fingerprints:
    """What something was made from. A field is None if its input is unknown or not there.

    Args:
        images: the hash of the task (`TaskDataModule.manifest_hash`).
        content: the hash of the images of a task that is not verified (`TaskDataModule.content_hash`).
        weights: sha256 of the backbone's tensors.
        methods: sha256 of the user's own method files; None if the run uses the package's methods only.
        backbones: sha256 of the user's own backbone files; None if the run uses the package's, or if not recorded.
    """

    images: str | None
    weights: str | None
    methods: str | None
    content: str | None = None
    backbones: str | None = None

    @classmethod
    def of_plan(cls, plan: RunPlan, images: str | None, weights: str | None, content: str | None) -> "Fingerprints":
        """Of what a plan's images and backbone were found to be, and of the user's own files that it names."""
        return cls(images, weights, own_methods_sha256(plan), content, own_backbone_sha256(plan))

    @classmethod
    def of_record(cls, record: RunRecord) -> "Fingerprints":
        versions = record.versions
        return cls(
            record.data_manifest,
            record.backbone_sha256,
            versions.get(OWN_METHODS),
            content=versions.get(CONTENT),
            backbones=versions.get(OWN_BACKBONES),
        )


def changed(then: Fingerprints, now: Fingerprints) -> str:
    """The inputs that differ, in words ("images and weights"), or "". Unknown inputs are not compared."""
    words = {
        "images": "images",
        "content": "images",
        "weights": "weights of the backbone",
        "methods": OWN_METHODS,
        "backbones": OWN_BACKBONES,
    }
    before, present = asdict(then), asdict(now)
    return " and ".join(
        dict.fromkeys(
            word
            for key, word in words.items()
            if None not in (before[key], present[key]) and before[key] != present[key]
        )
    )


def has_other_content(first: RunRecord, second: RunRecord) -> bool:
    """Whether two results are of images with other content, as far as both know theirs."""
    contents = {record.versions.get(CONTENT) for record in (first, second)}
    return len(contents - {None}) > 1


class Inputs:
    """Fingerprints of the present inputs; each is computed once."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}

    def made(self, record: RunRecord, plan: RunPlan) -> bool:
        """Whether `record` was made from the present inputs. An input that is not there counts as the same."""
        return not changed(Fingerprints.of_record(record), self.of(plan))

    def of(self, plan: RunPlan, *, with_weights: bool = True, with_content: bool = True) -> Fingerprints:
        """The fingerprints of a plan's inputs; what is costly can be left out, and stays unknown then.

        Args:
            with_weights: whether to build the backbone and hash its tensors.
            with_content: whether to read all images of a task that is not verified, or not since its files changed.
        """
        weights = self._weights(plan) if with_weights else None
        content = self.content(plan) if with_content else None
        return Fingerprints.of_plan(plan, self.images(plan, with_content=with_content), weights, content)

    def images(self, plan: RunPlan, *, with_content: bool = True) -> str | None:
        """The hash of the task; None where its lists are not there. Nothing is decoded. See `of`."""
        key = f"images {with_content} {_key(plan.dataset, without='seed')}"
        if key not in self._known:
            self._known[key] = build_dataset(plan).current_fingerprint(read_images=with_content)
        return self._known[key]

    def content(self, plan: RunPlan) -> str | None:
        """The hash of the images of a task that is not verified; None where they are not there."""
        key = f"content {_key(plan.dataset, without='seed')}"
        if key not in self._known:
            self._known[key] = build_dataset(plan).content_hash
        return self._known[key]

    def _weights(self, plan: RunPlan) -> str | None:
        key = _key(plan.backbone)
        if key not in self._known:
            self._known[key] = _weights_hash(plan)
        return self._known[key]


def own_methods_sha256(plan: RunPlan) -> str | None:
    """sha256 of the files in `paths.methods` that define the plan's methods, and of files there that they import."""
    if plan.paths.methods is None:
        return None
    targets = [str(spec.get("_target_", "")) for spec in plan.method_specs.values() if isinstance(spec, dict)]
    return _files_sha256(user_path(plan.paths.methods), _METHODS, _modules_of(targets, _METHODS))


def own_backbone_sha256(plan: RunPlan) -> str | None:
    """sha256 of the file of `paths.backbones` that defines the plan's backbone, and of those that it imports there.

    The file is found by its text: no code is run. If none has a function of the backbone's name, all count.
    """
    if plan.paths.backbones is None or not (folder := user_path(plan.paths.backbones)).is_dir():
        return None
    defines = re.compile(rb"^def " + re.escape(str(plan.backbone.get("name")).encode()) + rb"\b", re.MULTILINE)
    files = sorted(folder.glob("*.py"))
    defining = [file for file in files if file.is_file() and defines.search(file.read_bytes())]
    return _files_sha256(folder, _BACKBONES, [file.stem for file in defining or files])


def _files_sha256(folder: Path, package: str, names: Iterable[str]) -> str | None:
    """sha256 of the modules `names` of a folder and of those that these import there; None where there is none.

    package: under whose name, with a dot, the folder's modules are imported.
    """
    files: dict[str, bytes] = {}
    left = list(names)
    while left:
        name = left.pop()
        file = folder / f"{name}.py"
        if name not in files and file.is_file():
            files[name] = file.read_bytes()
            left += _imported(files[name], package)
    if not files:
        return None
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _imported(source: bytes, package: str) -> list[str]:
    """Names of the modules of `package` that a file imports, absolutely or relatively."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # for Python to say when the file is imported
        return []
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            base = f"{package}{node.module or ''}" if node.level else node.module or ""
            modules += [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
    return _modules_of(modules, package)


def _modules_of(dotted: Iterable[str], package: str) -> list[str]:
    """Names of the modules inside `package` that dotted names begin with."""
    return [name.removeprefix(package).partition(".")[0] for name in dotted if name.startswith(package)]


def _key(section: dict[str, Any], without: str = "") -> str:
    return json.dumps({k: v for k, v in section.items() if k != without}, sort_keys=True)


def _weights_hash(plan: RunPlan) -> str | None:
    """sha256 of the backbone's tensors; None if the file is missing, does not fit, or has not been downloaded."""
    weights = plan.backbone.get("weights")
    if weights not in ("official", "random"):
        file = user_path(str(weights))
        if not file.is_file() or file.stat().st_size < _parameters(plan):  # sizes of a record may be anybody's
            return None
    backbone, what = build_backbone_offline(plan)
    return None if weights == "official" and what != "weights: official" else backbone_sha256(backbone)


def _parameters(plan: RunPlan) -> int:
    """How many parameters the backbone has, counted on shapes alone."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_backbone_without_weights(plan).parameters())
