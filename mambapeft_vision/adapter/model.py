"""A backbone and methods become one model: freeze, attach, group, save, load, merge.

The only file that knows both sides.
"""

import copy
import hashlib
import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from mambapeft_vision.methods.method import Method, backbone_parameters, bake_weights
from mambapeft_vision.utils.atomic import atomic_path, write_json
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.state_dict_checks import check_finite, check_state
from mambapeft_vision.utils.typed import check_arguments

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1
_MAX_CONFIG_BYTES = 10_000_000
_METHOD_TARGET = re.compile(r"mambapeft_vision\.methods\.[a-z][a-z0-9_]*\.[A-Z][A-Za-z0-9]*")


class AdaptedModel(nn.Module):
    """A frozen backbone with methods attached and a fresh zero head for the task.

    Args:
        backbone: a `Vim` (or another backbone with the same ports); it is changed in place.
        methods: by name; names are the keys of `method:` in the config. Their order does not matter.
        num_classes: of the task.
        seed: of the methods' initial tensors; each method's draw depends on the seed and its name alone.
    """

    def __init__(self, backbone: nn.Module, methods: Mapping[str, Method], num_classes: int, seed: int = 0) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"num_classes={num_classes!r}; expected a whole number >= 1")
        self.backbone = backbone
        self.backbone_sha256 = backbone_sha256(backbone)
        backbone.requires_grad_(False)
        backbone.reset_classifier(num_classes)
        self.methods = nn.ModuleDict()
        self.merge_report: dict[str, str] | None = None  # after merge(): what stayed attached, and why
        for name in sorted(methods, key=lambda name: (methods[name].attach_order, name)):
            self._attach(name, methods[name], seed)
        backbone.head.requires_grad_(True)

    def _attach(self, name: str, method: Method, seed: int) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(f"method name {name!r}; expected letters, digits and underscores")
        method.name = name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_stable_seed(seed, name))
            method.attach(self.backbone)
        self.methods[name] = method

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised images → [B, num_classes] logits."""
        return self.backbone(images)

    # -- ownership ------------------------------------------------------------------------------------------

    def owned(self) -> dict[str, nn.Parameter]:
        """Every tensor that a method trains, as `<method>.<name>`."""
        return {f"{name}.{key}": p for name, m in self.methods.items() for key, p in m.owned().items()}

    def head_parameters(self) -> dict[str, nn.Parameter]:
        return {f"head.{key}": p for key, p in self.backbone.head.named_parameters()}

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything the optimiser gets: methods' tensors and the head."""
        return {**self.owned(), **self.head_parameters()}

    def counts(self) -> dict[str, Any]:
        """Trained numbers: in total without the head, by method, of the head, and the frozen rest."""
        by_method = {name: sum(p.numel() for p in m.owned().values()) for name, m in self.methods.items()}
        owned = {id(p) for p in self.owned().values()}
        frozen = [p for n, p in backbone_parameters(self.backbone).items() if not n.startswith("head.")]
        return {
            "trainable": sum(by_method.values()),
            "by_method": by_method,
            "head": sum(p.numel() for p in self.head_parameters().values()),
            "frozen": sum(p.numel() for p in frozen if id(p) not in owned),
        }

    def param_groups(
        self, lr: float, weight_decay: float, head_lr_mult: float = 1.0, head_decay_mult: float = 1.0
    ) -> list[dict[str, Any]]:
        """Optimiser groups, one for each pair of multipliers; the head's bias never decays."""
        head = self.backbone.head
        requests = [g for m in self.methods.values() for g in m.param_groups()]
        requests.append({"params": [head.weight], "lr_mult": head_lr_mult, "decay_mult": head_decay_mult})
        requests.append({"params": [head.bias], "lr_mult": head_lr_mult, "decay_mult": 0.0})
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for request in requests:
            groups.setdefault((request["lr_mult"], request["decay_mult"]), []).extend(request["params"])
        self._check_groups(groups)
        return [
            {"params": ps, "lr": lr * lr_mult, "weight_decay": weight_decay * decay_mult}
            for (lr_mult, decay_mult), ps in groups.items()
            if ps
        ]

    def _check_groups(self, groups: Mapping[Any, list[nn.Parameter]]) -> None:
        grouped = [id(p) for ps in groups.values() for p in ps]
        names = {id(p): name for name, p in self.trained().items()}
        if len(grouped) != len(set(grouped)) or set(grouped) != set(names):
            wrong = [n for i, n in names.items() if grouped.count(i) != 1]
            raise UserError(f"param_groups must hold every owned tensor once; wrong: {', '.join(wrong)}")

    def sites(self) -> list[dict[str, Any]]:
        """One row for each trained tensor: method, site, shape, count and multipliers."""
        rows = [{"method": name, **row} for name, m in self.methods.items() for row in m.describe()]
        for name, p in self.head_parameters().items():
            decay = 0.0 if name == "head.bias" else 1.0
            rows.append(
                {"method": "(head)", "site": name, "shape": tuple(p.shape), "lr_mult": 1.0, "decay_mult": decay}
            )
        return rows

    # -- state ------------------------------------------------------------------------------------------------

    def adapter_state(self) -> dict[str, Tensor]:
        """All tensors of the adapter by their saved names: methods' and the head's."""
        state = {f"{name}.{key}": t for name, m in self.methods.items() for key, t in m.saved().items()}
        return {**state, **self.head_parameters()}

    def load_adapter_state(self, state: Mapping[str, Tensor], source: str = "the adapter") -> None:
        """Copies `state` in, strictly both ways; no value is changed when anything does not fit."""
        for name, method in self.methods.items():
            prefix = f"{name}."
            method.enter_phase_of({k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)})
        mine = self.adapter_state()
        check_state(mine, state, source)
        for name, method in self.methods.items():
            _check_indices(name, method.index_limits(), state, source)
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(state[name])

    def save(self, folder: str | Path, metadata: Mapping[str, Any]) -> None:
        """Writes adapter.safetensors and adapter_config.json into `folder`, each atomically.

        Args:
            metadata: recorded as it is: task, git commit, versions, … (JSON-safe).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {n: t.detach().contiguous().cpu() for n, t in self.adapter_state().items()}
        with atomic_path(folder / ADAPTER_FILE) as temporary:
            temporary.write_bytes(serialize(state))  # unlike save_file, this says what a disk has against it
        write_json(folder / CONFIG_FILE, {**self.config(), **metadata})

    def config(self) -> dict[str, Any]:
        """What is needed to build this model again: backbone, methods, classes."""
        cfg = self.backbone.default_cfg
        return {
            "format_version": FORMAT_VERSION,
            "backbone": {
                "name": cfg["name"],
                "architecture": cfg["architecture"],
                "sha256": self.backbone_sha256,
            },
            "methods": {name: m.config() for name, m in self.methods.items()},
            "num_classes": self.backbone.num_classes,
        }

    # -- merge ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> dict[str, str]:
        """Folds everything that is a function of weights into the backbone's weights, in place, for inference.

        Returns: the methods that stay attached, each with its reason ({}: the backbone is a plain one now).
        """
        left: dict[str, str] = {}
        for name, method in list(self.methods.items()):
            if method.merge_obstacle is not None:
                method.fold()
                left[name] = method.merge_obstacle
                continue
            method.to_weight_space(self.backbone)
            del self.methods[name]
        bake_weights(self.backbone)
        self.requires_grad_(False)
        self.merge_report = left
        return left


def adapt(backbone: nn.Module, methods: Mapping[str, Method], num_classes: int, seed: int = 0) -> AdaptedModel:
    """Attaches `methods` to `backbone`, in place. See `AdaptedModel`."""
    return AdaptedModel(backbone, methods, num_classes, seed)


def backbone_sha256(backbone: nn.Module) -> str:
    """sha256 over the names, shapes, dtypes and bytes of the backbone's tensors; the head does not count."""
    digest = hashlib.sha256()
    for name, p in sorted(backbone_parameters(backbone).items()):
        if name.startswith("head."):
            continue
        digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
        if not p.is_meta:  # a model without values, made to count parameters
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stable_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


# ------------------------------------------------------------------------------------------------------------
# Adapters on disk


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from a folder."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, Tensor] = field(repr=False)

    def build_methods(self) -> dict[str, Method]:
        """The methods of adapter_config.json; only classes inside `mambapeft_vision.methods` are ever imported."""
        methods = self.config["methods"].items()
        return {name: build_method(name, spec, f"{self.folder / CONFIG_FILE}: methods") for name, spec in methods}

    def apply(self, backbone: nn.Module) -> AdaptedModel:
        """Attaches this adapter to a backbone with the same weights it was trained on.

        Raises: UserError when the backbone's sha256 differs, or the tensors do not fit.
        """
        expected, actual = self.config["backbone"]["sha256"], backbone_sha256(backbone)
        if expected != actual:
            raise UserError(
                f"{self.folder} was trained on {self.config['backbone']['name']} with weights sha256 "
                f"{expected[:12]}…, but this backbone has {actual[:12]}…; load the weights it was trained on "
                f"(backbone.weights=…)"
            )
        self._check_fit(backbone)
        return self._loaded_on(backbone)

    def _check_fit(self, backbone: nn.Module) -> None:
        """Raises UserError where the tensors do not fit the methods; on tensors without values, whatever their size."""
        memo = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in backbone.parameters()}
        memo |= {id(b): b.to("meta") for b in backbone.buffers()}
        with torch.device("meta"):
            try:
                self._loaded_on(copy.deepcopy(backbone, memo))
            except UserError as error:
                if str(self.folder) in str(error):
                    raise
                raise UserError(f"{self.folder / CONFIG_FILE}: {error}") from error
            except RuntimeError as error:  # PyTorch's, for sizes beyond all memory
                raise UserError(f"{self.folder / CONFIG_FILE}: impossible sizes: {error}") from error

    def _loaded_on(self, backbone: nn.Module) -> AdaptedModel:
        model = AdaptedModel(backbone, self.build_methods(), self.config["num_classes"])
        model.load_adapter_state(self.state, str(self.folder / ADAPTER_FILE))
        return model


def build_method(name: str, spec: Any, source: str) -> Method:
    """A method from `_target_` and its arguments, as untrusted data: nothing else can be named or called.

    source: where the spec stands, for messages: `<source>.<name>`. Raises: UserError.
    """
    where = f"{source}.{name}"
    if not isinstance(spec, Mapping):
        raise UserError(f"{where}={spec!r}; expected a mapping with _target_ and arguments")
    arguments = {key: value for key, value in spec.items() if key != "_target_"}
    cls = _method_class(spec.get("_target_"), where)
    check_arguments(cls, arguments, where)
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except TypeError as error:
        raise UserError(f"{where}: arguments do not fit {cls.__name__}: {error}") from error


def _method_class(target: Any, where: str) -> type[Method]:
    if not isinstance(target, str) or not _METHOD_TARGET.fullmatch(target):
        raise UserError(f"{where} names {target!r}; only classes in mambapeft_vision.methods are allowed")
    module_name, _, class_name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where} names {target}, which does not exist here: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)) or cls is Method:
        raise UserError(f"{where} names {target}, which is no Method; only subclasses of it are allowed")
    return cls


def _check_indices(name: str, limits: Mapping[str, int], state: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError for saved places outside of what they index."""
    for key, limit in limits.items():
        places = state[f"{name}.{key}"]
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < limit:
            raise UserError(
                f"{source}: {name}.{key} runs from {places.min()} to {places.max()}; expected 0 to {limit - 1}. "
                f"Copy the file again from where it was made"
            )


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
