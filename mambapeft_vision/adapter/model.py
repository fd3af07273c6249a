"""A backbone and methods become one model: freeze, attach, group, save, load, merge.

The only file that knows both sides.
"""

import copy
import hashlib
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mambapeft_vision.adapter.files import FORMAT_VERSION, write_adapter
from mambapeft_vision.backbones.computed import computed_tensors
from mambapeft_vision.backbones.contract import Backbone, bake_weights
from mambapeft_vision.backbones.weights import backbone_sha256
from mambapeft_vision.methods.method import Method
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.state_dict_checks import check_state

if TYPE_CHECKING:
    from mambapeft_vision.adapter.predict import Images, Prediction


class AdaptedModel(nn.Module):
    """A frozen backbone with methods attached and a fresh zero head for the task.

    Args:
        backbone: keeps the contract (`backbones/contract.py`); it is changed in place, and adapted once.
        methods: by name; names are the keys of `method:` in the config. Their order does not matter.
        num_classes: number of classes of the task.
        seed: seed of the methods' initial tensors; each method's draw depends on the seed and its name alone.

    Training code sets `class_names` (by label, if there are any) and `multi_label` (an image has any number of labels).
    Both are saved with the adapter.
    """

    class_names: tuple[str, ...] | None = None
    multi_label: bool = False

    def __init__(self, backbone: Backbone, methods: Mapping[str, Method], num_classes: int, seed: int = 0) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"num_classes={num_classes!r}; expected a whole number >= 1")
        _require_backbone(backbone)
        _refuse_computed(cast(nn.Module, backbone))
        _require_roles(backbone)
        _claim(backbone)
        self.backbone = backbone
        self.backbone_sha256 = backbone_sha256(backbone)
        self._dtypes = {p.dtype for n, p in backbone.named_parameters() if not n.startswith("head.")}
        for parameter in backbone.parameters():
            parameter.requires_grad_(False)
        backbone.reset_classifier(num_classes)
        self.methods = cast(MutableMapping[str, Method], nn.ModuleDict())
        self.merge_report: dict[str, str] | None = None  # after merge(): what stayed attached, and why
        self._folded: list[str] = []  # methods that are part of the backbone's weights since merge()
        for name in sorted(methods, key=lambda name: (methods[name].attach_order, name)):
            self._attach(name, methods[name], seed)
        self._check_owners()
        backbone.head.requires_grad_(True)

    def _attach(self, name: str, method: Method, seed: int) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(f"method name {name!r}; expected letters, digits and underscores")
        method.name = name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_stable_seed(seed, name))
            method.attach(self.backbone)
        self.methods[name] = method

    def _check_owners(self) -> None:
        """Raises UserError where two methods train the same tensor."""
        owners: dict[int, str] = {}
        for name, method in self.methods.items():
            for key, p in method.owned().items():
                other = owners.setdefault(id(p), name)
                if other != name:
                    raise UserError(
                        f"both {other!r} and {name!r} want to train {key}; remove one of them from method=[...]"
                    )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] → logits [B, num_classes]. For files and plain images see `predict`."""
        return self.backbone(images)

    def predict(self, images: "Images", *, top: int = 5, batch_size: int = 64) -> "list[Prediction]":
        """Predicts the classes of images, which are read and prepared as in training.

        Args:
            images: one or many: files, Pillow's images, or uint8 arrays [H, W], [H, W, C] (see adapter/predict.py).
            top: how many classes each prediction names.
            batch_size: images in a pass.
        Returns: one `Prediction` an image, in their order.
        Raises: UserError for a file that cannot be read or is no image.

        Example:
            >>> model = load_adapter("outputs/…")  # doctest: +SKIP
            >>> model.predict("cat.jpg")[0].class_name  # doctest: +SKIP
            'cat'
        """
        from mambapeft_vision.adapter.predict import predict  # it imports this file

        return predict(self, images, top=top, batch_size=batch_size)

    # -- ownership ------------------------------------------------------------------------------------------

    def owned(self) -> dict[str, nn.Parameter]:
        """Every tensor that a method trains, as `<method>.<name>`."""
        return {f"{name}.{key}": p for name, m in self.methods.items() for key, p in m.owned().items()}

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The head's parameters by the names that they are saved under."""
        return {f"head.{key}": p for key, p in self.backbone.head.named_parameters()}

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything the optimiser gets: methods' tensors and the head."""
        return {**self.owned(), **self.head_parameters()}

    def counts(self) -> dict[str, Any]:
        """Numbers of parameters: `trainable` (without the head), by method, of the head, and frozen."""
        by_method = {name: sum(p.numel() for p in m.owned().values()) for name, m in self.methods.items()}
        owned = {id(p) for p in self.owned().values()}
        frozen = [p for n, p in self.backbone.named_parameters() if not n.startswith("head.")]
        return {
            "trainable": sum(by_method.values()),
            "by_method": by_method,
            "head": sum(p.numel() for p in self.head_parameters().values()),
            "frozen": sum(p.numel() for p in frozen if id(p) not in owned),
        }

    def param_groups(
        self, lr: float, weight_decay: float, head_lr_mult: float = 1.0, head_decay_mult: float = 1.0
    ) -> list[dict[str, Any]]:
        """Optimiser groups, one for each pair of multipliers.

        Args:
            lr, weight_decay: those of a group whose multipliers are 1; each method has its own multipliers.
            head_lr_mult, head_decay_mult: the head's multipliers; its biases never decay.
        Returns: dicts with `params`, `lr` and `weight_decay`, as optimisers of PyTorch take them.
        """
        requests = [g for m in self.methods.values() for g in m.param_groups()]
        for p in self.head_parameters().values():
            decay_mult = 0.0 if p.ndim == 1 else head_decay_mult
            requests.append({"params": [p], "lr_mult": head_lr_mult, "decay_mult": decay_mult})
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
            decay = 0.0 if p.ndim == 1 else 1.0
            rows.append(
                {"method": "(head)", "site": name, "shape": tuple(p.shape), "lr_mult": 1.0, "decay_mult": decay}
            )
        return rows

    # -- state ------------------------------------------------------------------------------------------------

    def adapter_state(self) -> dict[str, Tensor]:
        """All tensors of the adapter by their saved names: methods', the head's, and those no weights file holds."""
        state = {f"{name}.{key}": t for name, m in self.methods.items() for key, t in m.saved().items()}
        parameters = dict(self.backbone.named_parameters())
        drawn = {f"backbone.{name}": parameters[name] for name in self.backbone.not_in_file}
        return {**state, **drawn, **self.head_parameters()}

    def load_adapter_state(self, state: Mapping[str, Tensor], source: str = "the adapter") -> None:
        """Copies `state` into the model.

        Raises: UserError for missing, unknown or misshapen tensors, and after merge(); nothing is changed then.
        """
        if self.merge_report is not None:
            raise UserError(
                f"{source} cannot be loaded into a merged model: its weights hold what was merged. Load it into a "
                f"model that is not merged, or adapt the backbone anew"
            )
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
        Raises: UserError for what an adapter cannot hold: methods that a merge folded, tensors of methods that are
            computed from others, weights of the backbone that were trained beside the methods.
        """
        if self._folded:
            raise UserError(
                f"{', '.join(self._folded)} cannot be saved as an adapter: merge() made it a part of the backbone's "
                f"weights. Save before merge(), or write the merged model with export_official(model.backbone, path)"
            )
        _refuse_computed(self)
        self._check_head()
        self._check_frozen()
        write_adapter(folder, self.adapter_state(), {**self.config(), **metadata})

    def _check_head(self) -> None:
        """Raises UserError for a head that `load_adapter` would not build."""
        head = self.backbone.head
        if not isinstance(head, nn.Linear) or head.out_features != self.backbone.num_classes:
            raise UserError(
                f"the head is a {type(head).__name__} of somebody's own; expected the linear one of "
                f"{self.backbone.num_classes} classes, which load_adapter builds. Set another number of classes with "
                f"model.backbone.reset_classifier(...), or save the whole model: torch.save(model.state_dict(), path)"
            )

    def _check_frozen(self) -> None:
        """Raises UserError where weights of the backbone that are not saved are not those that were adapted."""
        owned = {id(p) for p in self.owned().values()}
        parameters = {n: p for n, p in self.backbone.named_parameters() if not n.startswith("head.")}
        if any(id(p) in owned for p in parameters.values()):  # the hash is not that of the others alone
            unowned = (n for n, p in parameters.items() if id(p) not in owned and n not in self.backbone.not_in_file)
            changed = next((name for name in unowned if parameters[name].requires_grad), None)
        elif self._dtypes != {p.dtype for p in parameters.values()} or any(p.is_meta for p in parameters.values()):
            return  # cast, or kept elsewhere: other bits may be the same weights
        else:
            changed = None if backbone_sha256(self.backbone) == self.backbone_sha256 else "the backbone"
        if changed is not None:
            raise UserError(
                f"{changed} was trained or changed after adapt(), and no method owns it: the adapter would be without "
                f"that. Train it through the method Unfreeze(targets=…), or save the whole model: "
                f"torch.save(model.state_dict(), path)"
            )

    def config(self) -> dict[str, Any]:
        """The contents of adapter_config.json: what builds this model again (backbone, methods, classes)."""
        names = {} if self.class_names is None else {"class_names": list(self.class_names)}
        return {
            "format_version": FORMAT_VERSION,
            "backbone": {
                "name": self.backbone.pretrained_cfg["architecture"],
                "architecture": self.backbone.architecture,
                "sha256": self.backbone_sha256,
            },
            "methods": {name: m.config() for name, m in self.methods.items()},
            "num_classes": self.backbone.num_classes,
            **names,
            **({"multi_label": True} if self.multi_label else {}),
        }

    # -- merge ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> dict[str, str]:
        """Folds everything that is a function of weights into the backbone's weights, in place, for inference.

        Afterwards the model is in evaluation mode and can no longer be saved as an adapter.
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
            self._folded.append(name)
        bake_weights(cast(nn.Module, self.backbone))
        self.requires_grad_(False).eval()
        self.merge_report = left
        if not left:
            _release(self.backbone)
        return left


def adapt(backbone: Backbone, methods: Mapping[str, Method], num_classes: int, seed: int = 0) -> AdaptedModel:
    """Freezes `backbone`, attaches `methods` to it, in place, and gives it a zero head for `num_classes`.

    Args:
        backbone: from `create_backbone`, or a model of your own that keeps the contract; it is adapted once.
        methods: by name; their order does not matter.
        num_classes: number of classes of the task.
        seed: seed of the methods' initial tensors.
    Returns: the model: normalised images [B, 3, H, W] → logits [B, num_classes].
    Raises: UserError for a method that does not fit the backbone, and two methods that want the same port or tensor.

    Example:
        >>> from mambapeft_vision.methods.lora import LoRA
        >>> backbone = create_backbone("vim_nano_patch8_64")
        >>> model = adapt(backbone, {"lora": LoRA(targets="in_proj", rank=4)}, num_classes=10)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
        >>> model.counts()["trainable"]
        13824
        >>> model.merge()  # {}: everything is folded into the weights
        {}
    """
    return AdaptedModel(backbone, methods, num_classes, seed)


_ADAPTED = "_is_adapted"  # set on a backbone, so that its copies have it too


def _claim(backbone: Backbone) -> None:
    """Marks a backbone as adapted. Raises UserError if it is already: methods would add up, and the head be replaced.

    It stays marked if attaching fails, because some of its ports are then taken.
    """
    if getattr(backbone, _ADAPTED, False):
        raise UserError(
            "this backbone has methods attached already, or an attempt to attach some failed; expected a new one. "
            "Make another one with create_backbone(...), give all methods at once, or merge() the model first"
        )
    setattr(backbone, _ADAPTED, True)


def _refuse_computed(model: nn.Module) -> None:
    """Raises UserError where a tensor is computed from others: an adapter is of fixed weights, and holds parameters."""
    name = next(computed_tensors(model), None)
    if name is not None:
        raise UserError(
            f"{name} is computed (pruned, normalised or parametrized); expected a parameter. Make it permanent first: "
            f"torch.nn.utils.prune.remove, or torch.nn.utils.parametrize.remove_parametrizations"
        )


def _require_backbone(backbone: Any) -> None:
    """Raises UserError for models that have no ports, such as timm's, and for modules around a backbone."""
    if not isinstance(backbone, nn.Module) or not hasattr(backbone, "roles"):
        raise UserError(
            f"{type(backbone).__name__} is no backbone of this package; expected one from create_backbone(...), or a "
            f"model that keeps the contract of mambapeft_vision/backbones/contract.py. Adapt it before it is wrapped"
        )


def _require_roles(backbone: Backbone) -> None:
    """Raises UserError where a weight is no parameter any more, as in a sharded or quantised model."""
    parameters = {name for name, _ in backbone.named_parameters()}
    name = next((name for names in backbone.roles.values() for name in names if name not in parameters), None)
    if name is not None:
        raise UserError(
            f"{name} is no parameter of this backbone any more; expected a backbone as create_backbone makes it. "
            f"Adapt it first, and compile, shard or quantise the model then"
        )


def _release(backbone: Backbone) -> None:
    """Removes the mark: a backbone is a plain one again after everything was folded into it."""
    setattr(backbone, _ADAPTED, False)


def on_meta(backbone: Backbone) -> Backbone:
    """A copy of a backbone with shapes and no values, to find out what attaching methods would take."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in backbone.parameters()}
    memo |= {id(b): b.to("meta") for module in backbone.modules() for b in module.buffers(recurse=False)}
    return copy.deepcopy(backbone, memo)


def _stable_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def _check_indices(name: str, limits: Mapping[str, int], state: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError for saved indices outside the tensors that they index."""
    for key, limit in limits.items():
        places = state[f"{name}.{key}"]
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < limit:
            raise UserError(
                f"{source}: {name}.{key} runs from {places.min()} to {places.max()}; expected 0 to {limit - 1}. "
                f"Copy the file again from where it was made"
            )
