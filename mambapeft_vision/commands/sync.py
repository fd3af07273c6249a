"""Uploads finished runs that were made without W&B.

Each run folder becomes the W&B run that logger=wandb would have made: same name, group, tags, config, history and
summary. Runs that have one already (wandb_id.txt) are left alone, so the command can be repeated. --sweeps
also makes, or brings up to date, the W&B run of each sweep that runs here are part of, with its tables and plots.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.integrations.wandb_logger import WandbLogger
from mambapeft_vision.integrations.wandb_summary import publish
from mambapeft_vision.integrations.wandb_upload import upload
from mambapeft_vision.results.layout import RESULT_FILE, SET_ASIDE, WANDB_ID_FILE
from mambapeft_vision.results.record import RunRecord, read_record
from mambapeft_vision.results.tables import read_standard
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.paths import configs_folder
from mambapeft_vision.utils.untrusted import files_below


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft sync", __doc__)
    parser.add_argument("places", nargs="*", type=Path, default=[Path("outputs")], help="folders with runs")
    parser.add_argument("--project", default="mambapeft-vision")
    parser.add_argument("--entity")
    parser.add_argument("--tags", default="", help="separated by commas")
    parser.add_argument("--offline", action="store_true", help="write files for `wandb sync` into the run folders")
    parser.add_argument("--sweeps", action="store_true", help="also the runs of whole sweeps, with tables and plots")
    options = parser.parse_args(arguments)
    found = [file for place in options.places for file in files_below(place)]
    finished = [file.parent for file in found if file.name == RESULT_FILE]
    if not finished:
        raise UserError(f"no finished run below {', '.join(map(str, options.places))}; expected folders with runs")
    new = [folder for folder in finished if not (folder / WANDB_ID_FILE).exists() and SET_ASIDE not in folder.name]
    failed = 0
    for folder in new:
        taken = upload(folder, make_logger(options))
        failed += not taken
        say(f"{'uploaded' if taken else 'NOT uploaded'} {folder}")
    print(f"{len(new) - failed} runs uploaded, {len(finished) - len(new)} left alone")
    if options.sweeps:
        failed += publish_sweeps([folder for folder in finished if SET_ASIDE not in folder.name], options)
    if failed:
        raise UserError(f"{failed} uploads failed; the warnings above say why, and the same command tries them again")


def publish_sweeps(folders: list[Path], options: argparse.Namespace) -> int:
    """Returns: how many of the sweeps W&B has not taken."""
    sweeps: dict[str, dict[Path, RunRecord]] = {}
    for folder in folders:
        record = read_record(folder)
        if record.config.get("sweep"):
            sweeps.setdefault(record.config["sweep"], {})[folder] = record
    failed = 0
    for sweep, records in sweeps.items():
        logger = make_logger(options)
        publish(logger, sweep, records, read_standard(configs_folder()), options.places[0])
        failed += logger.has_failed
        say(f"{'NOT uploaded' if logger.has_failed else 'uploaded'} {sweep}: {len(records)} runs")
    return failed


def make_logger(options: argparse.Namespace) -> WandbLogger:
    return WandbLogger(
        project=options.project,
        entity=options.entity,
        mode="offline" if options.offline else "online",
        tags=[tag for tag in options.tags.split(",") if tag],
        pictures=True,
    )
