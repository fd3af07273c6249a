"""Reading tests/golden."""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGURATIONS = sorted(p.stem for p in GOLDEN.glob("*.npz") if p.stem != "shared")


def load_golden(name: str) -> dict:
    """One configuration: config (dict), params and grads (name → float64 array), input, labels, logits, loss."""
    with np.load(GOLDEN / "shared.npz") as shared, np.load(GOLDEN / f"{name}.npz") as own:
        arrays = {**{k: shared[k] for k in shared}, **{k: own[k] for k in own}}
    config = json.loads(str(arrays["config_json"]))
    params = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    if config["peft_kwargs"] is None:  # the plain backbone shares nothing
        params = {k: v for k, v in params.items() if not k.startswith("module.")}
    return {
        "config": config,
        "params": {k: v.astype(np.float64) for k, v in params.items()},
        "grads": {k.removeprefix("grad/"): v for k, v in arrays.items() if k.startswith("grad/")},
        **{k: arrays[k] for k in ("input", "labels", "logits", "loss", "feature")},
    }
