"""Uploads finished runs that were made without W&B.

python scripts/sync_results_wandb.py [outputs ...] [--project NAME] [--entity NAME] [--tags a,b] [--offline] [--sweeps]

Each run folder becomes the W&B run that logger=wandb would have made: same name, group, tags, config, history and
summary. Runs that have one already (wandb_id.txt) are left alone, so the command can be repeated. --sweeps
also makes, or brings up to date, the W&B run of each sweep that runs here are part of, with its tables and plots.
"""

import argparse
from pathlib import Path

from mambapeft_vision.integrations.wandb_logger import WandbLogger
from mambapeft_vision.integrations.wandb_summary import publish
from mambapeft_vision.integrations.wandb_upload import upload
from mambapeft_vision.results.layout import RESULT_FILE, SET_ASIDE, WANDB_ID_FILE
from mambapeft_vision.results.record import RunRecord, read_record
from mambapeft_vision.results.tables import read_standard
from mambapeft_vision.run.exit import run_cli
from mambapeft_vision.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Uploads finished runs that were made without W&B.")
    parser.add_argument("places", nargs="*", type=Path, default=[Path("outputs")], help="folders with runs")
    parser.add_argument("--project", default="mambapeft-vision")
    parser.add_argument("--entity")
    parser.add_argument("--tags", default="", help="separated by commas")
    parser.add_argument("--offline", action="store_true", help="write files for `wandb sync` into the run folders")
    parser.add_argument("--sweeps", action="store_true", help="also the runs of whole sweeps, with tables and plots")
    arguments = parser.parse_args()
    finished = [file.parent for place in arguments.places for file in sorted(place.rglob(RESULT_FILE))]
    if not finished:
        raise UserError(f"no finished run below {', '.join(map(str, arguments.places))}; expected folders with runs")
    new = [folder for folder in finished if not (folder / WANDB_ID_FILE).exists() and SET_ASIDE not in folder.name]
    for folder in new:
        upload(folder, make_logger(arguments))
        print(f"uploaded {folder}", flush=True)
    print(f"{len(new)} runs uploaded, {len(finished) - len(new)} left alone")
    if arguments.sweeps:
        publish_sweeps([folder for folder in finished if SET_ASIDE not in folder.name], arguments)


def publish_sweeps(folders: list[Path], arguments: argparse.Namespace) -> None:
    sweeps: dict[str, dict[Path, RunRecord]] = {}
    for folder in folders:
        record = read_record(folder)
        if record.config.get("sweep"):
            sweeps.setdefault(record.config["sweep"], {})[folder] = record
    for sweep, records in sweeps.items():
        publish(make_logger(arguments), sweep, records, read_standard(CONFIGS), arguments.places[0])
        print(f"uploaded {sweep}: {len(records)} runs", flush=True)


def make_logger(arguments: argparse.Namespace) -> WandbLogger:
    return WandbLogger(
        project=arguments.project,
        entity=arguments.entity,
        mode="offline" if arguments.offline else "online",
        tags=[tag for tag in arguments.tags.split(",") if tag],
        pictures=True,
    )


if __name__ == "__main__":
    run_cli(main)
