"""Search with Optuna: a trial is a set of ordinary runs, and its value their mean accuracy in percent.

Workers share a study through its storage: start the same command again, on any machine that sees the storage.
"""

import hashlib
import json
import os
import random
import re
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from omegaconf import OmegaConf
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from mambapeft_vision.integrations.wandb_logger import RunLogger, WandbLogger
from mambapeft_vision.results.plots import drawn, save_png
from mambapeft_vision.run.build import build_logger
from mambapeft_vision.run.exit import summary
from mambapeft_vision.run.inputs import Inputs
from mambapeft_vision.run.run import train
from mambapeft_vision.search.plots import history, importances
from mambapeft_vision.search.space import Point, Space
from mambapeft_vision.sweep.jobs import Job, plan_jobs
from mambapeft_vision.sweep.worker_cache import Kept
from mambapeft_vision.utils.atomic import errors_name, write_text
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import command, plain
from mambapeft_vision.utils.untrusted import read_bytes, refuse_links

PROTOCOLS = {
    "validation": ("dataset.train_split=train800", "dataset.test_split=val200"),
    "reference": ("dataset.train_split=train800val200", "dataset.test_split=test"),
}
WARNINGS = {
    "validation": "trained on train800, scored on val200; the test images were not used",
    "reference": "SCORED ON THE TEST IMAGES, as the published search was: no fair estimate of anything it chose",
}
HOPELESS = 5  # failed trials, and none that succeeded, after which a search gives up
JOURNAL = "study.journal"
_MOST_BYTES = 200_000_000  # largest journal; a trial takes some 5 kB


@dataclass(frozen=True)
class Search:
    """A search's settings. storage: URL of a database, or None for a journal file in `folder`."""

    name: str
    space: Space
    protocol: str
    trials: int
    folder: Path
    storage: str | None
    overrides: tuple[str, ...]

    @property
    def identity(self) -> str:
        """A hash of the settings that make the values of two trials comparable. Paths may differ between machines."""
        deciding = sorted(text for text in self.overrides if not text.startswith(("paths.", "logger")))
        described = [repr(self.space), self.protocol, deciding]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def search(settings: Search, configs: Path) -> Path:
    """Works on the study until it has its trials; writes the winner and the plots.

    Returns: the winner's method yaml.
    Raises: UserError for settings that do not fit the study, or when the first trials all fail.
    """
    jobs = plan_jobs(_overrides(settings), configs)
    study = open_study(settings)
    check_inputs(study, jobs)
    release_dead_trials(study, settings.space)
    say(f"{settings.name}: {WARNINGS[settings.protocol]}; {len(jobs)} runs a trial")
    kept = Kept(tasks=len(jobs))
    stop = optuna.study.MaxTrialsCallback(settings.trials, states=(TrialState.COMPLETE, TrialState.FAIL))
    if _ended(study) < settings.trials:
        try:
            study.optimize(_objective(settings, jobs, kept), catch=(Exception,), callbacks=[announce, _give_up, stop])
        except Exception as error:  # Optuna's own, of a kind that tells nothing
            if settings.storage is None and not settings.folder.is_dir():
                raise UserError(
                    f"{settings.folder} was deleted while the search ran; the same command begins it anew"
                ) from error
            raise
    winner = export(settings, study)
    try:
        publish(settings, build_logger(jobs[0].plan), study)
    except (UserError, OSError) as error:  # the winner is written
        say(f"warning: the search {settings.name} is not published: {plain(error)}")
    return winner


def open_study(settings: Search) -> optuna.Study:
    """Opens the study, or makes it. Raises UserError if the existing study belongs to another search."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings.folder.mkdir(parents=True, exist_ok=True)
    if settings.storage is None:
        journal = settings.folder.absolute() / JOURNAL  # Optuna's lock is a link to it
        refuse_links(journal, journal.parent)
        _refuse_endless_lock(journal.with_name(f"{JOURNAL}.lock"))
        drop_incomplete_line(journal)
    try:
        study = optuna.create_study(
            storage=JournalStorage(Journal(str(journal))) if settings.storage is None else _database(settings.storage),
            sampler=optuna.samplers.TPESampler(multivariate=True),
            study_name=settings.name,
            direction="maximize",
            load_if_exists=True,
        )
        study.get_trials(deepcopy=False)
    except (UserError, OSError):
        raise
    except Exception as error:  # whatever Optuna's readers raise on a damaged journal or database
        reason = f"{type(error).__name__}: {_reason(error, settings.storage or JOURNAL)}"
        raise UserError(
            f"the study {settings.name} cannot be read ({reason}); expected one that a search has made. Move it away, "
            "and the search begins anew"
        ) from None
    known = study.user_attrs.get("identity")
    if known is None:
        study.set_user_attr("identity", settings.identity)
        study.set_user_attr("protocol", settings.protocol)
    elif known != settings.identity:
        raise UserError(
            f"the study {settings.name} was begun with another space, protocol or other overrides, so its trials "
            f"cannot be compared with new ones; give this one another name with name=..."
        )
    return study


class Journal(JournalFileBackend):
    """Optuna's journal. Errors name its file, and leave no part of a line, which the next line would continue."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        file = Path(self._file_path)
        try:
            with errors_name(file):
                super().append_logs(logs)
        except OSError:
            with suppress(OSError, UserError):
                drop_incomplete_line(file)
            raise


def _refuse_endless_lock(lock: Path) -> None:
    """Raises UserError for a dangling lock, for which Optuna would wait for ever."""
    if lock.is_symlink() and not lock.exists():
        raise UserError(f"{lock} is a link to nothing; expected a lock of Optuna's. Delete it if no search is at work")


def drop_incomplete_line(journal: Path) -> None:
    """Cuts off the last line if a killed process left it incomplete: Optuna would read no further."""
    if not os.path.lexists(journal):
        return
    if journal.stat().st_nlink > 1:
        raise UserError(f"{journal} is a file under other names too, which would change; copy it, and delete this one")
    lock = JournalFileSymlinkLock(str(journal))  # another process may be writing now
    lock.acquire()
    try:
        content = read_bytes(journal, max_bytes=_MOST_BYTES)
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(journal, whole)
            say(f"the last line of {journal} was incomplete, and is left out")
    finally:
        lock.release()


def check_inputs(study: optuna.Study, jobs: Sequence[Job]) -> None:
    """Compares the present images and weights with those at the study's beginning.

    Raises: UserError if they have changed: values of trials on other data cannot be compared.
    """
    inputs = Inputs()
    now: dict[str, str | None] = {}
    for job in jobs:
        found = inputs.of(job.plan)
        now |= {f"images of {job.plan.task}": found.images, "weights of the backbone": found.weights}
        now |= {"method files": found.methods, f"content of the images of {job.plan.task}": found.content}
    recorded = study.user_attrs.get("inputs")
    then = recorded if isinstance(recorded, dict) else {}
    changed = [name for name, value in now.items() if None not in (value, then.get(name)) and then[name] != value]
    if changed:
        raise UserError(
            f"the {', the '.join(changed)} are not those that the study {study.study_name} was begun with, so its "
            f"trials cannot be compared with new ones; give this search another name with name=..."
        )
    known = {name: value for name, value in now.items() if value is not None}
    if known.keys() - then.keys():
        study.set_user_attr("inputs", {**known, **then})


def _database(url: str) -> RDBStorage:
    """Opens a database. Workers that start together on a new one all make its tables; all but one fail and retry."""
    if url.startswith("postgresql://"):  # SQLAlchemy takes this scheme for psycopg2, the older driver
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        for wait in (0.1, 0.3, 1.0, 3.0):
            try:
                return RDBStorage(url)
            except (IntegrityError, OperationalError, ProgrammingError):
                time.sleep(wait * (1 + random.random()))
        return RDBStorage(url)
    except ImportError as error:
        raise UserError(f'storage={masked(url)}: {error}; for PostgreSQL pip install -e ".[cluster]"') from None
    except (SQLAlchemyError, ValueError) as error:
        # Not chained: the text of the original error may hold the URL.
        raise UserError(
            f"storage={masked(url)}: {_reason(error, url)}; expected the URL of a database that is there, such as "
            f"sqlite:///study.db or postgresql://USER:PASSWORD@HOST/NAME"
        ) from None


def masked(url: str) -> str:
    """The URL of a database without passwords, also where SQLAlchemy would take them for other parts of the URL."""
    with suppress(ArgumentError, ValueError):
        url = make_url(url).render_as_string(hide_password=True)
    url = re.sub(r"^([^:@/]*://)?([^:@/]*):(?!//).*@", r"\1\2:***@", url, flags=re.DOTALL)  # up to the last @
    return plain(re.sub(r"(password=)[^&]*", r"\1***", url))


def _reason(error: Exception, url: str) -> str:
    if isinstance(error, ArgumentError):
        return "it is no URL of a database"
    text = (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]
    with suppress(ArgumentError, ValueError):
        password = make_url(url).password
        if password:
            text = text.replace(str(password), "***")
    return plain(text.replace(url, masked(url)))


def release_dead_trials(study: optuna.Study, space: Space) -> None:
    """Fails trials whose worker on this machine has died, and enqueues their settings again.

    Their runs continue where they stopped. Settings outside the space are not tried again.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        match trial.user_attrs.get("worker"):
            case [str(host), int(pid)] if host == socket.gethostname() and not _is_alive(pid):
                study.tell(trial.number, state=TrialState.FAIL)
                with suppress(UserError):
                    space.point_of(trial.params)
                    study.enqueue_trial(trial.params)


def export(settings: Search, study: optuna.Study) -> Path:
    """Writes the best trial as a preset, and the plots. Raises UserError if no trial succeeded."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        raise UserError(f"no trial of {settings.name} has succeeded; the errors are in its trials' run folders")
    best = study.best_trial
    name = f"{settings.name}_best"
    path = settings.folder / "method" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    point = settings.space.point_of(best.params)  # a study may come from elsewhere: its notes are not written out
    trainable = best.user_attrs.get("trainable")
    header = [
        "@package _global_",
        f"Winner of the search {settings.name}: trial {best.number} of {len(complete)} that succeeded.",
        f"mean accuracy {study.best_value:.2f}; {WARNINGS[settings.protocol]}",
        f"count: {trainable if isinstance(trainable, int) else 0:,}",
        "paper: not in any",
        f"run: {command('mambapeft', 'train', '--config-dir', settings.folder, f'method={name}')}",
    ]
    body = OmegaConf.to_yaml(OmegaConf.create({"method": point.methods, "trainer": point.trainer}))
    write_text(path, "\n".join(f"# {line}" for line in header) + f"\n{body}")
    draw_plots(settings, study)
    return path


def draw_plots(settings: Search, study: optuna.Study) -> None:
    """Draws history.png and importances.png. A failure to draw or write does not fail the search."""
    label = f"{settings.name} ({'on the TEST images' if settings.protocol == 'reference' else 'on val200'})"
    for file, draw in (("history.png", history), ("importances.png", importances)):
        content = drawn(file, partial(draw, study, label))
        if content is not None:
            try:
                save_png(content, settings.folder / file)
            except OSError as error:
                say(f"warning: {settings.folder / file} is not written ({error.strerror})")


def publish(settings: Search, logger: RunLogger, study: optuna.Study) -> None:
    """The search as a W&B run, which its trials' runs name as `sweep`."""
    if not isinstance(logger, WandbLogger):
        return
    trials = study.get_trials(deepcopy=False)
    files = {name: settings.folder / f"{name}.png" for name in ("history", "importances")}
    rows = [
        [str(t.number), t.state.name.lower(), "" if t.value is None else f"{t.value:.2f}", json.dumps(t.params)]
        for t in trials
    ]
    logger.log_parent(
        settings.name,
        settings.folder,
        job_type="search",
        config={"sweep": settings.name, "protocol": settings.protocol, "overrides": list(settings.overrides)},
        summary={
            **Counter(t.state.name.lower() for t in trials),
            "best": study.best_value,
            "best_trial": study.best_trial.number,
        },
        pictures={name: file for name, file in files.items() if file.is_file()},
        tables={"trials": (["trial", "state", "value", "settings"], rows)},
    )


def _overrides(settings: Search) -> list[str]:
    """The overrides of a trial's runs: one run for each task (and seed)."""
    given = {override.partition("=")[0] for override in settings.overrides}
    tasks = [] if "dataset" in given else [f"dataset={','.join(settings.space.tasks)}"]
    outputs = [] if "paths.outputs" in given else [f"paths.outputs={settings.folder / 'runs'}"]
    return [*tasks, *PROTOCOLS[settings.protocol], *outputs, *settings.overrides]


def _objective(settings: Search, jobs: Sequence[Job], kept: Kept) -> Callable[[optuna.Trial], float]:
    def value(trial: optuna.Trial) -> float:
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid()])
        point = settings.space.suggest(trial)
        trial.set_user_attr("point", {"methods": point.methods, "trainer": point.trainer})
        try:
            ran = [train(_config(job, point, settings.name), job.overrides, kept.sources) for job in jobs]
            records = [record for record in ran if record is not None]  # only a dry run has none
        except Exception as error:
            trial.set_user_attr("error", summary(error))
            raise
        trial.set_user_attr("trainable", records[0].trainable)
        trial.set_user_attr("accuracies", {f"{r.task} seed {r.seed}": r.accuracy for r in records})
        return 100 * statistics.fmean(record.accuracy for record in records)

    return value


def _config(job: Job, point: Point, study: str) -> Any:
    cfg = job.config()
    cfg.method, cfg.sweep = point.methods, study
    for key, value in point.trainer.items():
        cfg.trainer[key] = value
    return cfg


def announce(study: optuna.Study, trial: FrozenTrial) -> None:
    """Prints how a trial ended; Optuna calls it after each."""
    if trial.state is TrialState.COMPLETE:
        text = f"{trial.value:.2f} (best {study.best_value:.2f})"
    else:
        text = f"failed: {plain(trial.user_attrs.get('error', 'no error noted'))}"
    say(f"━━ trial {trial.number}: {text}")


def _give_up(study: optuna.Study, trial: FrozenTrial) -> None:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
    errors = [ended.user_attrs["error"] for ended in trials if "error" in ended.user_attrs]
    if len(errors) >= HOPELESS and not any(ended.state is TrialState.COMPLETE for ended in trials):
        raise UserError(f"the first {len(errors)} trials all failed, the last with: {plain(errors[-1])}")


def _ended(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
