"""Conversions into our formats: adapters of the reference and of peft."""

import ast
from pathlib import Path
from types import NoneType
from typing import Any

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.weights import read_state_dict
from mambapeft_vision.integrations.from_peft import MAX_CONFIG_BYTES, from_peft
from mambapeft_vision.integrations.reference import load_reference
from mambapeft_vision.utils.atomic import made_folder
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import parse_json, read_text

# -- the reference's adapters ---------------------------------------------------------------------------------


def from_reference(config: str | Path, checkpoint: str | Path, weights: str | Path, out: str | Path) -> AdaptedModel:
    """Converts a trained adapter of the published code into an adapter folder.

    Args:
        config: its config: the .py file (read as data, never run) or JSON with peft_kwargs and module_kwargs.
        checkpoint: the .pth its trainer saved.
        weights: the backbone's official checkpoint.
        out: folder for adapter.safetensors and adapter_config.json.
    """
    peft_kwargs, module_kwargs = read_reference_config(config)
    state = read_state_dict(checkpoint, keys=["state_dict"])
    head = next((v for k, v in state.items() if k.endswith(("head.weight", "head.layers.head.weight"))), None)
    if head is None:
        raise UserError(f"{checkpoint} holds no head.weight; expected a checkpoint of the reference's trainer")
    model, _ = load_reference(peft_kwargs, module_kwargs, state, head.shape[0], backbone_state=read_state_dict(weights))
    model.save(out, {"origin": f"converted from {Path(checkpoint).name} of the published MambaPEFT code"})
    return model


def read_reference_config(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Reads (peft_kwargs, module_kwargs) from a config of the published code.

    A .py file is parsed, not run: only literals and `dict(...)` calls are understood.
    """
    path = Path(path)
    expected = "expected `model = dict(backbone=dict(...))`, or JSON with peft_kwargs and module_kwargs"
    try:
        text = read_text(path, max_bytes=MAX_CONFIG_BYTES)
    except OSError as error:
        raise UserError(f"config {shown(str(path))} does not exist or cannot be read ({error.strerror})") from error
    if path.suffix == ".json":
        content = parse_json(text, str(path))
        parts = [content.get(key) if isinstance(content, dict) else None for key in ("peft_kwargs", "module_kwargs")]
        if not (isinstance(parts[0], (dict, NoneType)) and isinstance(parts[1], dict)):
            raise UserError(f"{plain(path)} is no config of the reference; {expected}")
        return parts[0], parts[1]
    try:
        model = _assigned_literal(ast.parse(text), "model", path)
    except (KeyError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"{type(error).__name__}: {plain(error)}"
        raise UserError(f"{plain(path)} is no config of the reference ({reason}); {expected}") from None
    backbone = model.get("backbone") if isinstance(model, dict) else None
    if not isinstance(backbone, dict):
        raise UserError(f"{plain(path)} is no config of the reference; {expected}")
    kind = backbone.pop("type", None)
    if kind == "VisionMamba":
        return None, backbone
    if kind != "VimPEFTModel" or "module" not in backbone:
        raise UserError(
            f"{plain(path)}: backbone type {shown(kind)}; expected VimPEFTModel with a module, or VisionMamba"
        )
    module = backbone.pop("module")
    if not isinstance(module, dict):
        raise UserError(f"{plain(path)}: module={shown(module)}; {expected}")
    return backbone, module


def _assigned_literal(tree: ast.Module, name: str, path: Path) -> Any:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return _literal(node.value, path)
    raise KeyError(name)


def _literal(node: ast.expr, path: Path) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {k.arg: _literal(k.value, path) for k in node.keywords if k.arg is not None}
    if isinstance(node, ast.Dict):
        return {_literal(k, path): _literal(v, path) for k, v in zip(node.keys, node.values) if k is not None}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(e, path) for e in node.elts]
    if isinstance(node, ast.Name):
        return f"<{node.id}>"  # a variable, such as a checkpoint's path; none of the model's sizes is one
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise UserError(f"{path}:{node.lineno}: only literals and dict(...) are understood here") from error


# -- peft's adapters --------------------------------------------------------------------------------------------


def convert_from_peft(folder: str | Path, backbone: str, weights: str, out: str | Path, **sizes: Any) -> AdaptedModel:
    """Converts an adapter of Hugging Face peft into an adapter folder.

    Args:
        folder: the folder that peft saved.
        backbone: registered name of the backbone that it was trained on; `sizes` are those that differ from it.
        weights: weights of the backbone: "official", "random" or a file.
        out: folder for adapter.safetensors and adapter_config.json.
    """
    with made_folder(Path(out)):
        model = from_peft(folder, create_backbone(backbone, weights, **sizes))
        model.save(out, {"origin": "converted from Hugging Face peft"})
    return model
