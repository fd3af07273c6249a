"""Where a run reports to, beside its own folder: the targets of configs/logger/*.yaml."""

import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mambapeft_vision.results.claims import computed
from mambapeft_vision.results.files import read_text
from mambapeft_vision.results.layout import WANDB_ID_FILE
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.utils.atomic import temporary_path, write_text
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import refuse_links

if TYPE_CHECKING:
    from mambapeft_vision.run.run_config import RunPlan

LONGEST_TAG = 64  # characters, by W&B's rule; so are the names
_FOLDERS = ("wandb", ".wandb")  # W&B's names of its own, the second where there is one
_LEAST_FREE = 1 << 20  # bytes that are to be free once W&B has written its files
_PROJECT = re.compile(r"[^/\\#?%:\x00-\x1f]{1,128}")
_ENTITY = re.compile(r"[\w-]{1,128}")


class RunLogger(Protocol):
    """The protocol of loggers: receives the progress and the result of a run."""

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
            raise UserError(f"logger.mode={shown(mode)}; expected online or offline (logger=none reports nowhere)")
        if not _PROJECT.fullmatch(project):
            raise UserError(f"logger.project={shown(project)}; expected 1 to 128 characters, none of / \\ # ? % :")
        if entity is not None and not _ENTITY.fullmatch(entity):
            raise UserError(f"logger.entity={shown(entity)}; expected letters, digits, '_' and '-', or null")
        for tag in tags:
            if not 1 <= len(tag) <= LONGEST_TAG:
                raise UserError(f"logger.tags: {shown(tag)}; expected tags of 1 to {LONGEST_TAG} characters")
        self._settings: dict[str, Any] = {"project": project, "entity": entity, "mode": mode}
        self._tags = tags
        self._folder = Path()
        self.pictures = pictures
        self._run: Any = None
        self.has_failed = False

    def start(self, plan: "RunPlan") -> None:
        self._start(plan.folder, plan.task, plan.methods, plan.seed, plan.config)

    def start_recorded(self, folder: Path, record: RunRecord) -> None:
        """As `start`, for a run that is finished. It uploads only the computed part of the config."""
        self._start(folder, record.task, record.methods, record.seed, computed(record.config))

    def _start(self, folder: Path, task: str, methods: Sequence[str], seed: int, config: Mapping[str, Any]) -> None:
        names = "+".join(methods)
        self._run = self.begin(
            id=run_id(folder),
            name=plain(f"{task} {names} seed {seed}"),
            group=task,
            job_type="run",
            tags=[*self._tags, *(name[:LONGEST_TAG] for name in methods)],
            # Keys by which dashboards group, beside `seed` and `sweep`; the sections of the config follow.
            config={"task": task, "methods": names, **config},
            dir=str(folder),
        )
        with self._never_fatal():
            self._run.define_metric("epoch")
            self._run.define_metric("train/*", step_metric="epoch")

    def log_epoch(self, row: dict[str, float]) -> None:
        metrics = {f"train/{name}": value for name, value in row.items() if name != "epoch"}
        with self._never_fatal():
            self._run.log({"epoch": row["epoch"], **metrics})

    def finish(self, record: RunRecord | None, pictures: Mapping[str, Path]) -> None:
        with self._never_fatal():
            if record is not None:
                self._log_pictures(pictures)
                # All of result.json; its config is the run's config.
                self._run.summary.update({name: value for name, value in vars(record).items() if name != "config"})
            self._run.finish(exit_code=0 if record is not None else 1)
            self._check_disk()

    @contextmanager
    def _never_fatal(self) -> Iterator[None]:
        """Turns errors of W&B into a line on stderr once a run is under way: a report must not fail a result."""
        try:
            yield
        except Exception as error:
            if not self.has_failed:
                print(f"warning: W&B: {_translated(error)}. Nothing else depends on it", file=sys.stderr, flush=True)
            self.has_failed = True

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
        run = self.begin(
            id=parent_id(name), name=name, job_type=job_type, tags=self._tags, config=dict(config), dir=str(folder)
        )
        with self._never_fatal():
            run.log({f"pictures/{key}": wandb.Image(str(file)) for key, file in pictures.items()})
            run.log(
                {f"tables/{key}": wandb.Table(list(head), [*map(list, rows)]) for key, (head, rows) in tables.items()}
            )
            run.summary.update(dict(summary))
            run.finish()
            self._check_disk()

    def _log_pictures(self, pictures: Mapping[str, Path]) -> None:
        import wandb

        if self.pictures and pictures:
            self._run.log({f"pictures/{name}": wandb.Image(str(file)) for name, file in pictures.items()})

    def _check_disk(self) -> None:
        """Raises OSError where W&B's files of this run cannot be whole, as the disk is full. W&B itself is silent."""
        if self._settings["mode"] == "offline":
            probe = temporary_path(self._folder / "probe")
            try:
                probe.write_bytes(bytes(_LEAST_FREE))
            finally:
                probe.unlink(missing_ok=True)

    def begin(self, **settings: Any) -> Any:
        """Starts W&B's run, after checking that nothing in its folder leads elsewhere."""
        import wandb  # slow to import, and needed with this logger alone

        self._folder = Path(settings["dir"])
        for name in _FOLDERS:
            refuse_links(self._folder / name, self._folder)
        _refuse_settings_of_the_folder()
        try:
            return wandb.init(**self._settings, **settings, resume="allow", settings=wandb.Settings(silent=True))
        except Exception as error:
            raise UserError(f"logger=wandb: {_translated(error)}") from error


def _refuse_settings_of_the_folder() -> None:
    """Raises UserError for settings of W&B in the current folder, which may be anybody's.

    W&B takes the address of its server from them, where it sends the user's key.
    """
    for file in (Path(name, "settings") for name in _FOLDERS):
        if os.path.lexists(file):
            raise UserError(
                f"logger=wandb: {plain(file.absolute(), 1_000)} would choose the server that gets your key; expected "
                f"none in the current folder. Delete it or start elsewhere; your own settings can be WANDB_* in the "
                f"environment, or in ~/.config/wandb/settings"
            )


def _translated(error: Exception) -> str:
    """An error of W&B in one line, with advice. The only place where its errors are read."""
    from wandb.errors import AuthenticationError, CommError, UsageError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = plain(lines[0] if lines else type(error).__name__)
    if isinstance(error, AuthenticationError) or (
        isinstance(error, UsageError) and re.search("api.key", str(error), re.IGNORECASE)
    ):
        return f"{said}; log in with `wandb login`, or set logger.mode=offline"
    if isinstance(error, CommError):
        return f"{said}; W&B cannot be reached or refuses: try again, or set logger.mode=offline"
    if isinstance(error, OSError):
        return f"{plain(error.filename or 'its files')}: {error.strerror}; free some space or make the folder writable"
    if isinstance(error, UsageError):
        return f"{said}; correct the logger's settings"
    if isinstance(error, ValueError):  # pydantic's: the first line only counts the mistakes
        return f"{plain(' '.join(lines[1:3]) or said)}; correct the logger's settings"
    return f"{type(error).__name__}: {said}; set logger.mode=offline, or logger=none"


def run_id(folder: Path) -> str:
    """The W&B id of the run in `folder`, made when first asked for."""
    file = folder / WANDB_ID_FILE
    known = known_id(folder)
    if known is None:
        write_text(file, uuid.uuid4().hex[:8])
    return known or read_text(file, "the id of a run on W&B")


def known_id(folder: Path) -> str | None:
    """The W&B id of the run in `folder`; None where it has none."""
    file = folder / WANDB_ID_FILE
    if not file.is_file() or file.is_symlink():
        return None
    text = read_text(file, "the id of a run on W&B", most=1000)
    return text if re.fullmatch(r"[\w-]{1,64}", text) else None


def parent_id(name: str) -> str:
    """The W&B id of a sweep or search."""
    return re.sub(r"[^\w-]", "-", name)[:64]
