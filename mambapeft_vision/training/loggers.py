"""Where a run reports to, beside its own folder: the targets of configs/logger/*.yaml."""

import uuid
from pathlib import Path
from typing import Any, Protocol

from mambapeft_vision.atomic import write_text
from mambapeft_vision.errors import UserError
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.training.plan import RunPlan

WANDB_ID_FILE = "wandb_id.txt"


class RunLogger(Protocol):
    def start(self, plan: RunPlan) -> None:
        """Called once, before training."""

    def log_epoch(self, row: dict[str, float]) -> None:
        """Called with each row of metrics.csv."""

    def finish(self, record: RunRecord | None) -> None:
        """Called at the end, with None when the run did not finish."""


class NoLogger:
    """Reports nowhere."""

    def start(self, plan: RunPlan) -> None:
        """Nothing to start."""

    def log_epoch(self, row: dict[str, float]) -> None:
        """The row is in metrics.csv already."""

    def finish(self, record: RunRecord | None) -> None:
        """The record is in result.json already."""


class WandbLogger:
    """Weights & Biases; one run there for one run folder, also when it was interrupted.

    Args:
        project, entity, tags: as wandb.init takes them.
        mode: "online", or "offline": files in the run's folder for a later `wandb sync`.
    """

    def __init__(self, *, project: str, entity: str | None, mode: str, tags: list[str]) -> None:
        if mode not in ("online", "offline"):
            raise UserError(f"logger.mode={mode!r}; expected online or offline (logger=none reports nowhere)")
        self._settings = {"project": project, "entity": entity, "mode": mode}
        self._tags = tags
        self._run: Any = None

    def start(self, plan: RunPlan) -> None:
        import wandb  # slow to import, and needed with this logger alone

        try:
            self._run = wandb.init(
                **self._settings,
                id=_run_id(plan.folder),
                resume="allow",
                name=f"{plan.task} {plan.method_names} seed {plan.seed}",
                group=plan.task,
                tags=[*self._tags, *plan.methods],
                config=plan.config,
                dir=plan.folder,
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            raise UserError(f"logger=wandb: {error}; log in with `wandb login`, or set logger.mode=offline") from error
        self._run.define_metric("epoch")
        self._run.define_metric("train/*", step_metric="epoch")

    def log_epoch(self, row: dict[str, float]) -> None:
        metrics = {f"train/{name}": value for name, value in row.items() if name != "epoch"}
        self._run.log({"epoch": row["epoch"], **metrics})

    def finish(self, record: RunRecord | None) -> None:
        if record is not None:
            numbers = {k: v for k, v in vars(record).items() if isinstance(v, (int, float, str))}
            self._run.summary.update(numbers)
        self._run.finish(exit_code=0 if record is not None else 1)


def _run_id(folder: Path) -> str:
    """The W&B id of the run in `folder`, made when first asked for."""
    file = folder / WANDB_ID_FILE
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:8])
    return file.read_text(encoding="utf-8")
