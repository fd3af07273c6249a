"""Names of the files of a run, and of what stands beside the runs below paths.outputs. Light to import."""

import re
from pathlib import Path

from mambapeft_vision.utils.text import plain

# In the folder of a run.
RESULT_FILE = "result.json"  # written last: a folder that has it is a finished run
RUN_CONFIG_FILE = "config.yaml"  # resolved
OVERRIDES_FILE = "overrides.yaml"
LOG_FILE = "train.log"
METRICS_FILE = "metrics.csv"  # a line for each epoch
PREDICTIONS_FILE = "predictions.npz"
CHECKPOINT_FILE = "checkpoint.ckpt"  # until the run is finished
FAILURE_FILE = "failure.json"  # until an attempt succeeds
EVALUATION_FILE = "evaluation.json"
EVALUATION_PREDICTIONS_FILE = "evaluation.npz"  # as predictions.npz, of the latest evaluation
WANDB_ID_FILE = "wandb_id.txt"
PAGE_FILE, CURVES_FILE, CONFUSION_FILE = "predictions.png", "curves.png", "confusion.png"

# Folders.
SET_ASIDE = ".replaced-"  # in the name of a run's folder that another run has replaced
SWEEP_LOGS = ".sweep"  # below paths.outputs: what workers print, and the files of a sweep's W&B run

# Beside them.
BUNDLE_SUFFIX = ".runs.json"


def file_name(text: object) -> str:
    """A file name made of any text: letters, digits, `_`, `-`, `+` and `.`; no path and no hidden file."""
    return re.sub(r"[^\w.+-]", "-", plain(text, 120)).lstrip(".") or "-"


def pictures_of(folder: Path) -> dict[str, Path]:
    """The pictures that there are in a run's folder, by name."""
    files = {"predictions": PAGE_FILE, "curves": CURVES_FILE, "confusion": CONFUSION_FILE}
    return {
        name: folder / file
        for name, file in files.items()
        if (folder / file).is_file() and not (folder / file).is_symlink()
    }
