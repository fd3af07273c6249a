"""A sweep on W&B: one run there for the whole of it, with its tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mambapeft_vision.integrations.wandb_logger import WANDB_ID_FILE, WandbLogger
from mambapeft_vision.results.plots import figures_of, save
from mambapeft_vision.results.record import RunRecord, is_finished
from mambapeft_vision.results.tables import Standard, collect, tables_of
from mambapeft_vision.run.build import build_logger
from mambapeft_vision.sweep.jobs import Job
from mambapeft_vision.sweep.sweep import LOGS, records_of
from mambapeft_vision.utils.errors import UserError


def publish_sweep(jobs: Sequence[Job], standard: Standard) -> None:
    """Brings a sweep's W&B run up to date. Nothing where the runs have another logger, or none is finished."""
    plan = jobs[0].plan
    logger = build_logger(plan)
    done = [job for job in jobs if is_finished(job.folder)]
    finished = {job.folder: record for job, record in zip(done, records_of(done))}
    if isinstance(logger, WandbLogger) and finished:
        outputs = Path(plan.config["paths"]["outputs"]).expanduser()
        publish(logger, plan.config["sweep"], finished, standard, outputs, planned=len(jobs))


def publish(
    logger: WandbLogger,
    sweep: str,
    records: Mapping[Path, RunRecord],
    standard: Standard,
    outputs: Path,
    planned: int | None = None,
) -> None:
    """Tables and plots of the finished runs of a sweep, as its W&B run.

    Args:
        records: by the runs' folders.
        outputs: whose `.sweep` gets the files.
        planned: runs that the sweep has; default: as many as are finished.
    """
    try:
        collections = collect(records.values(), standard)
    except UserError as error:  # runs that cannot be compared are on W&B all the same
        print(f"the tables of {sweep} are not logged to W&B: {error}")
        collections = []
    folder = outputs / LOGS / sweep
    tables = {table.title: (table.header, table.rows) for c in collections for table in tables_of(c)}
    logger.log_parent(
        sweep,
        folder,
        job_type="sweep",
        config={"sweep": sweep, "runs": [id for path in records if (id := _wandb_id(path)) is not None]},
        summary={"planned": planned or len(records), "finished": len(records)},
        pictures={name: _saved(figure, folder / f"{name}.png") for name, figure in figures_of(collections).items()},
        tables=tables,
    )


def _saved(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
    return path


def _wandb_id(folder: Path) -> str | None:
    file = folder / WANDB_ID_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else None
