"""Uploads finished runs that were made without W&B.

Each run folder becomes the W&B run that logger=wandb would have made: same name, group, tags, config, history and
summary. Runs that have one already (wandb_id.txt) are left alone, so the command can be repeated. --sweeps
also makes, or brings up to date, the W&B run of each sweep that runs here are part of, with its tables and plots.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.engine.callbacks import METRICS_FILE
from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.integrations.wandb_logger import WANDB_ID_FILE, WandbLogger
from mambapeft_vision.integrations.wandb_summary import publish
from mambapeft_vision.results.pictures import draw_from_files, pictures_of, run_title
from mambapeft_vision.results.record import RESULT_FILE, RunRecord, read_record
from mambapeft_vision.results.tables import read_standard
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.paths import configs_folder


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft sync", __doc__)
    parser.add_argument("places", nargs="*", type=Path, default=[Path("outputs")], help="folders with runs")
    parser.add_argument("--project", default="mambapeft-vision")
    parser.add_argument("--entity")
    parser.add_argument("--tags", default="", help="separated by commas")
    parser.add_argument("--offline", action="store_true", help="write files for `wandb sync` into the run folders")
    parser.add_argument("--sweeps", action="store_true", help="also the runs of whole sweeps, with tables and plots")
    options = parser.parse_args(arguments)
    finished = [file.parent for place in options.places for file in sorted(place.rglob(RESULT_FILE))]
    if not finished:
        raise UserError(f"no finished run below {', '.join(map(str, options.places))}; expected folders with runs")
    new = [folder for folder in finished if not (folder / WANDB_ID_FILE).exists() and ".replaced-" not in folder.name]
    for folder in new:
        upload(folder, make_logger(options))
        print(f"uploaded {folder}", flush=True)
    print(f"{len(new)} runs uploaded, {len(finished) - len(new)} left alone")
    if options.sweeps:
        publish_sweeps([folder for folder in finished if ".replaced-" not in folder.name], options)


def publish_sweeps(folders: list[Path], options: argparse.Namespace) -> None:
    sweeps: dict[str, dict[Path, RunRecord]] = {}
    for folder in folders:
        record = read_record(folder)
        if record.config.get("sweep"):
            sweeps.setdefault(record.config["sweep"], {})[folder] = record
    for sweep, records in sweeps.items():
        publish(make_logger(options), sweep, records, read_standard(configs_folder()), options.places[0])
        print(f"uploaded {sweep}: {len(records)} runs", flush=True)


def make_logger(options: argparse.Namespace) -> WandbLogger:
    return WandbLogger(
        project=options.project,
        entity=options.entity,
        mode="offline" if options.offline else "online",
        tags=[tag for tag in options.tags.split(",") if tag],
        pictures=True,
    )


def upload(folder: Path, logger: WandbLogger) -> None:
    """Repeats to the logger what the run would have told it."""
    record = read_record(folder)
    plan = RunPlan(record.config, TrainerConfig(**record.config["trainer"]), record.fingerprint, folder)
    try:
        logger.start(plan)
        for row in _metrics(folder / METRICS_FILE):
            logger.log_epoch(row)
        draw_from_files(folder, title=run_title(record), num_classes=record.config["dataset"]["num_classes"])
        logger.finish(record, pictures_of(folder))
    except BaseException:
        (folder / WANDB_ID_FILE).unlink(missing_ok=True)  # an upload that broke off is made anew
        raise


def _metrics(file: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv; none for a record that is kept alone, as in results/."""
    if not file.is_file():
        return []
    with open(file, newline="", encoding="utf-8") as stream:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
