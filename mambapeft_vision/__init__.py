"""Parameter-efficient fine-tuning of vision state-space models.

    >>> import mambapeft_vision as mv
    >>> result = mv.train("method=lora_p_x", "dataset=vtab/cifar")      # doctest: +SKIP
    >>> model = mv.load_adapter("outputs/...")                          # doctest: +SKIP
    >>> logits = model(images)                                          # doctest: +SKIP

* `train`: a run from overrides, as `mambapeft train` does it.
* `create_backbone`, `adapt`, `Method`: a backbone, and methods attached to it, without any config.
* `load_adapter`: the model of a finished run; `load_reference`: a model of the published MambaPEFT code.
* `UserError`: what all of them raise for mistakes of their caller.

Names are imported when they are used: `import mambapeft_vision` does not import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mambapeft_vision.utils.startup import drop_unusable_backend

if TYPE_CHECKING:
    from mambapeft_vision.adapter.load import load_adapter
    from mambapeft_vision.adapter.model import adapt
    from mambapeft_vision.backbones import create_backbone
    from mambapeft_vision.integrations.reference import load_reference
    from mambapeft_vision.methods.method import Method
    from mambapeft_vision.run.api import train
    from mambapeft_vision.utils.errors import UserError

__version__ = "0.2.0"
__all__ = [
    "Method",
    "UserError",
    "__version__",
    "adapt",
    "create_backbone",
    "load_adapter",
    "load_reference",
    "train",
]

drop_unusable_backend()  # before anything imports matplotlib, as Lightning does

_MODULES = {
    "Method": "methods.method",
    "UserError": "utils.errors",
    "adapt": "adapter.model",
    "create_backbone": "backbones",
    "load_adapter": "adapter.load",
    "load_reference": "integrations.reference",
    "train": "run.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
