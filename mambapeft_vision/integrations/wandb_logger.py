"""Where a run reports to, beside its own folder: the targets of configs/logger/*.yaml."""

import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import UserError

if TYPE_CHECKING:
    from mambapeft_vision.run.run_config import RunPlan

WANDB_ID_FILE = "wandb_id.txt"


class RunLogger(Protocol):
    pictures: bool  # whether it wants the run's pictures

    def start(self, plan: "RunPlan") -> None:
        """Called once, before training."""

    def log_epoch(self, row: dict[str, float]) -> None:
        """Called with each row of metrics.csv."""

    def finish(self, record: RunRecord | None, pictures: Mapping[str, Path]) -> None:
        """Called at the end, with None when the run did not finish. pictures: files that were drawn, by name."""


class NoLogger:
    """Reports nowhere."""

    pictures = False

    def start(self, plan: "RunPlan") -> None:
        """Nothing to start."""

    def log_epoch(self, row: dict[str, float]) -> None:
        """The row is in metrics.csv already."""

    def finish(self, record: RunRecord | None, pictures: Mapping[str, Path]) -> None:
        """The record is in result.json already."""


class WandbLogger:
    """Weights & Biases; one run there for one run folder, also when it was interrupted.

    Args:
        project, entity, tags: as wandb.init takes them.
        mode: "online", or "offline": files in the run's folder for a later `wandb sync`.
        pictures: draw the run's pictures and log them.
    """

    def __init__(self, *, project: str, entity: str | None, mode: str, tags: list[str], pictures: bool) -> None:
        if mode not in ("online", "offline"):
            raise UserError(f"logger.mode={mode!r}; expected online or offline (logger=none reports nowhere)")
        self._settings = {"project": project, "entity": entity, "mode": mode}
        self._tags = tags
        self.pictures = pictures
        self._run: Any = None

    def start(self, plan: "RunPlan") -> None:
        self._run = self._begin(
            id=run_id(plan.folder),
            name=f"{plan.task} {plan.method_names} seed {plan.seed}",
            group=plan.task,
            job_type="run",
            tags=[*self._tags, *plan.methods],
            # What dashboards group by, beside `seed` and `sweep`; the sections of the config follow.
            config={"task": plan.task, "methods": plan.method_names, **plan.config},
            dir=str(plan.folder),
        )
        self._run.define_metric("epoch")
        self._run.define_metric("train/*", step_metric="epoch")

    def log_epoch(self, row: dict[str, float]) -> None:
        metrics = {f"train/{name}": value for name, value in row.items() if name != "epoch"}
        self._run.log({"epoch": row["epoch"], **metrics})

    def finish(self, record: RunRecord | None, pictures: Mapping[str, Path]) -> None:
        if record is not None:
            self._log_pictures(pictures)
            # All of result.json; its config is the run's config.
            self._run.summary.update({name: value for name, value in vars(record).items() if name != "config"})
        self._run.finish(exit_code=0 if record is not None else 1)

    def log_parent(
        self,
        name: str,
        folder: Path,
        *,
        job_type: str,
        config: Mapping[str, Any],
        summary: Mapping[str, Any],
        pictures: Mapping[str, Path],
        tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    ) -> None:
        """The W&B run of a whole sweep or search, whose id is its name: runs that are part of it have it as `sweep`.

        Args:
            folder: for W&B's files.
            tables: header and rows, by name.
        """
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        run = self._begin(
            id=parent_id(name), name=name, job_type=job_type, tags=self._tags, config=dict(config), dir=str(folder)
        )
        run.log({f"pictures/{key}": wandb.Image(str(file)) for key, file in pictures.items()})
        run.log(
            {f"tables/{key}": wandb.Table(list(header), [*map(list, rows)]) for key, (header, rows) in tables.items()}
        )
        run.summary.update(dict(summary))
        run.finish()

    def _log_pictures(self, pictures: Mapping[str, Path]) -> None:
        import wandb

        if self.pictures and pictures:
            self._run.log({f"pictures/{name}": wandb.Image(str(file)) for name, file in pictures.items()})

    def _begin(self, **settings: Any) -> Any:
        import wandb  # slow to import, and needed with this logger alone

        try:
            return wandb.init(**self._settings, **settings, resume="allow", settings=wandb.Settings(silent=True))
        except wandb.Error as error:
            raise UserError(f"logger=wandb: {error}; log in with `wandb login`, or set logger.mode=offline") from error


def run_id(folder: Path) -> str:
    """The W&B id of the run in `folder`, made when first asked for."""
    file = folder / WANDB_ID_FILE
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:8])
    return file.read_text(encoding="utf-8")


def parent_id(name: str) -> str:
    """The W&B id of a sweep or search."""
    return re.sub(r"[^\w-]", "-", name)
