"""A sweep on W&B: one run there for the whole of it, with its tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mambapeft_vision.integrations.wandb_logger import WandbLogger, known_id
from mambapeft_vision.results.layout import SWEEP_LOGS, file_name
from mambapeft_vision.results.plots import named_apart, pictures_of_collections, save_png
from mambapeft_vision.results.record import RunRecord, is_finished
from mambapeft_vision.results.tables import Standard, collect, tables_of
from mambapeft_vision.run.build import build_logger
from mambapeft_vision.sweep.jobs import Job
from mambapeft_vision.sweep.sweep import records_of
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain
from mambapeft_vision.utils.untrusted import refuse_links


def publish_sweep(jobs: Sequence[Job], standard: Standard) -> None:
    """Brings a sweep's W&B run up to date. Does nothing if the runs have another logger or none is finished."""
    plan = jobs[0].plan
    logger = build_logger(plan)
    if not isinstance(logger, WandbLogger):
        return
    done = [job for job in jobs if is_finished(job.folder)]
    finished = {job.folder: record for job, record in zip(done, records_of(done))}
    if finished:
        outputs = Path(plan.config["paths"]["outputs"]).expanduser()
        try:
            publish(logger, plan.config["sweep"], finished, standard, outputs, planned=len(jobs))
        except (UserError, OSError) as error:  # the runs are done, and a later sync publishes them
            say(f"warning: the sweep {plain(plan.config['sweep'])} is not published: {plain(error)}")


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
        outputs: the outputs folder; its `.sweep` gets the files.
        planned: runs that the sweep has; default: as many as are finished.
    """
    try:
        collections = collect(records.values(), standard)
    except UserError as error:  # runs that cannot be compared are on W&B all the same
        say(f"the tables of {plain(sweep)} are not logged to W&B: {plain(error)}")
        collections = []
    folder = outputs / SWEEP_LOGS / file_name(sweep)
    refuse_links(folder, outputs)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {table.title: (table.header, table.rows) for c in collections for table in tables_of(c)}
    logger.log_parent(
        sweep,
        folder,
        job_type="sweep",
        config={"sweep": sweep, "runs": [name for path in records if (name := known_id(path)) is not None]},
        summary={"planned": planned or len(records), "finished": len(records)},
        pictures={
            name: _saved(content, folder / f"{name}.png")
            for name, content in named_apart(pictures_of_collections(collections)).items()
        },
        tables=tables,
    )


def _saved(content: bytes, path: Path) -> Path:
    save_png(content, path)
    return path
