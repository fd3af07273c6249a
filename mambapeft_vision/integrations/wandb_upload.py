"""Uploads finished runs to W&B, with the same content as if they had reported while they ran."""

from pathlib import Path

from mambapeft_vision.integrations.wandb_logger import WandbLogger
from mambapeft_vision.results.layout import METRICS_FILE, WANDB_ID_FILE, pictures_of
from mambapeft_vision.results.metrics import read_metrics
from mambapeft_vision.results.pictures import draw_from_files, run_title
from mambapeft_vision.results.record import read_record


def upload(folder: Path, logger: WandbLogger) -> bool:
    """Sends the logger everything that the run in `folder` would have reported.

    The account, the project and the mode are the logger's, whatever the result's own config says.

    Returns: whether W&B has taken all of it; if not, the logger has said why, and the upload can be made anew.
    Raises: UserError where the folder's files are no results, or W&B refuses the run.
    """
    record = read_record(folder)
    rows = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []  # results/ holds records alone
    draw_from_files(folder, title=run_title(record), num_classes=record.config["dataset"].get("num_classes"))
    try:
        logger.start_recorded(folder, record)
        for row in rows:
            logger.log_epoch(row)
        logger.finish(record, pictures_of(folder))
        if logger.has_failed:
            (folder / WANDB_ID_FILE).unlink(missing_ok=True)
    except BaseException:
        (folder / WANDB_ID_FILE).unlink(missing_ok=True)  # an upload that broke off is made anew
        raise
    return not logger.has_failed
