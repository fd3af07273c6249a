"""How the commands end: mistakes as readable messages (exit code 2), a sweep's failures reported at its end.

Light to import, as config.py is.
"""

import difflib
import errno
import functools
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mambapeft_vision.adapter.specs import RENAMED
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import (
    DISK_REMEDIES,
    INTERRUPTED,
    WRITE_ERRORS,
    NotFiniteError,
    Preempted,
    SweepEnded,
    UserError,
)
from mambapeft_vision.utils.paths import configs_folder
from mambapeft_vision.utils.progress import CANNOT_WRITE
from mambapeft_vision.utils.text import command, override, plain
from mambapeft_vision.utils.typed import nearest
from mambapeft_vision.utils.untrusted import files_below, read_json, refuse_links

CRASH = 1
USER_MISTAKE = 2
PREEMPTED = 143  # as shells report SIGTERM: the state is saved, start the same command again
NO_READER = 141  # as shells report SIGPIPE: who read the output (`| head`) has gone


@dataclass(frozen=True)
class Failure:
    """A job of a sweep that did not end well. error: its first line; mistake: whether the user can repair it."""

    overrides: str
    error: str
    mistake: bool


_HYDRAS_NOTE = "multirun.yaml"  # Hydra's note of the latest sweep
launches: list[Path] = []  # folders of the sweeps that this process has launched


class RememberLaunch(Callback):
    """Remembers the folder where a sweep's jobs, which may run in other processes or machines, note their failures."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        try:
            _keep_to_ourselves(folder, "submitit" in str(config.hydra.launcher._target_))
        except UserError as error:  # Hydra ignores an Exception that a callback raises
            say(f"error: {error}", sys.stderr)
            raise SystemExit(USER_MISTAKE) from None
        launches.append(folder / config.hydra.sweep.subdir)


def _keep_to_ourselves(folder: Path, submitit: bool) -> None:
    """Raises UserError for links that others planted where Hydra and Submitit will write.

    Submitit's jobs unpickle the files in `.submitit`, so nobody else may write there.
    """
    refuse_links(folder, folder.parent)
    refuse_links(folder / _HYDRAS_NOTE, folder)
    if submitit:
        jobs = folder / ".submitit"
        refuse_links(jobs, folder)
        jobs.mkdir(parents=True, exist_ok=True, mode=0o700)
        if jobs.stat().st_uid != os.getuid():
            raise UserError(f"{jobs} belongs to another user, whose files our jobs would run; give other paths.outputs")
        jobs.chmod(0o700)
        for file in files_below(jobs):
            refuse_links(file, jobs)


def _take_failures() -> list[Failure]:
    failures = []
    for folder in launches:
        found = [(file.stem.partition("-")[2], file) for file in folder.glob("failure-*.json")]
        files = [file for number, file in sorted(found, key=lambda one: one[0].zfill(10)) if number.isdecimal()]
        failures += [Failure(**read_json(file)) for file in files]
        shutil.rmtree(folder, ignore_errors=True)
    launches.clear()
    return failures


def job(function: Callable[[DictConfig], float | None]) -> Callable[[DictConfig], float | None]:
    """Wraps what Hydra calls for each job: in a sweep, a job that fails is noted and the next one runs.

    A sweeper that searches takes the function's result as the job's score.
    """

    @functools.wraps(function)
    def wrapped(cfg: DictConfig) -> float | None:
        hydra = HydraConfig.get()
        if hydra.mode is not RunMode.MULTIRUN:
            return function(cfg)
        overrides = " ".join(hydra.overrides.task)
        say(f"\n━━ run {hydra.job.num + 1}: {overrides}")
        try:
            return function(cfg)
        except Exception as error:
            failure = Failure(overrides, summary(error), is_mistake(error))
            write_json(Path(hydra.runtime.output_dir) / f"failure-{hydra.job.num}.json", asdict(failure))
            say(ending(error), sys.stderr)
            if isinstance(error, NotFiniteError) and error.ends_sweep and launches:  # jobs elsewhere have begun already
                raise SweepEnded("trainer.on_nonfinite=stop; with skip_run the other runs continue") from error
            return None

    return wrapped


def run_cli(main: Callable[[], int | None]) -> None:
    """Calls a command and exits with its code, or with one of the codes above."""
    # Where other programs want the cores too, PyTorch's spinning threads would make a step 30 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises what happened; it is described here
    logging.raiseExceptions = False  # a log file of a library that cannot be written is worth no traceback
    code = code_of(main)
    _give_up_streams()
    if code:
        sys.exit(code)


def code_of(main: Callable[[], int | None]) -> int | None:
    """Calls a command and returns its exit code; an error is described on stderr."""
    interrupted = _remember_ctrl_c()
    failures: list[Failure] = []
    code = None
    try:
        code = main()
    except KeyboardInterrupt:
        return _interrupted()
    except Preempted as stop:
        say(f"\n{stop}; the same command continues", sys.stderr)
        return PREEMPTED
    except SweepEnded as end:
        say(f"\nthe sweep ends with this run ({end}); the same command continues", sys.stderr)
    except BrokenPipeError as error:
        if error.filename is None:
            return NO_READER
        say(ending(error), sys.stderr)
        return CRASH
    except Exception as error:
        if interrupted:  # while something was imported, which may turn Ctrl-C into an error of its own
            return _interrupted()
        if launches and isinstance(error, OSError) and error.errno in WRITE_ERRORS and error.filename is None:
            error.filename = str(launches[-1])  # Hydra's own files of a sweep
        say(ending(error), sys.stderr)
        return USER_MISTAKE if is_mistake(error) else CRASH
    finally:
        failures += _take_failures()
    if failures:
        lines = [f"  {failure.overrides}: {failure.error}" for failure in failures]
        say(f"\n{len(failures)} of the runs failed:\n" + "\n".join(lines), sys.stderr)
        return USER_MISTAKE if all(failure.mistake for failure in failures) else CRASH
    return code


def _interrupted() -> int:
    say("\ninterrupted; the same command continues from the last checkpoint", sys.stderr)
    return INTERRUPTED


def _remember_ctrl_c() -> list[int]:
    """A list that is no longer empty once Ctrl-C was pressed."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is (
        signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, note)
    return seen


def _give_up_streams() -> None:
    """Discards buffered output that cannot be written. Python would end with code 120 because of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except CANNOT_WRITE:
            with suppress(*CANNOT_WRITE):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_mistake(error: Exception) -> bool:
    """Whether the user can repair the error. A traceback would then only hide the message."""
    if isinstance(error, (UserError, HydraException, OmegaConfBaseException)):  # some of Hydra's are OSErrors too
        return True
    if _is_nowhere(error):
        return True
    if not isinstance(error, OSError) or error.errno not in DISK_REMEDIES:
        return False
    return error.filename is not None or error.errno in WRITE_ERRORS


def _is_nowhere(error: Exception) -> bool:
    """Whether a file was not found because the current folder itself is no more."""
    if isinstance(error, FileNotFoundError):
        try:
            os.getcwd()
        except FileNotFoundError:
            return True
    return False


def summary(error: Exception) -> str:
    """The first line of a mistake, or the type and text of a crash."""
    text = _message(error) if is_mistake(error) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0] if text else type(error).__name__


def ending(error: Exception) -> str:
    """The message of the error that ends a command: `describe_error`, with a crash's traceback left in a file."""
    text = describe_error(error)
    if error.__traceback__ is None or not text.startswith("Traceback"):
        return text
    try:
        descriptor, name = tempfile.mkstemp(prefix="mambapeft-traceback-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")
    except OSError:  # then there is no other place for it
        return text
    return f"error: {plain(summary(error))}; a fault of this program or of the machine. Its traceback: {name}"


def describe_error(error: Exception) -> str:
    """A mistake, or what the system said of a file, in one line; any other error with its traceback."""
    if is_mistake(error):
        return f"error: {_message(error)}"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        # Errors that no table lists: a file that was deleted meanwhile, an unusual file system.
        return f"error: {plain(error.filename)}: {error.strerror} ({errno.errorcode.get(error.errno, error.errno)})"
    return "".join(traceback.format_exception(error)).rstrip()


def _message(error: Exception) -> str:
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, ConfigCompositionException):
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OmegaConfBaseException):
            file = re.match(r"In '.*?': ", str(error))  # the yaml that was being merged
            return (file[0] if file else "") + _config_error(cause)
        if several := re.match("Ambiguous value for argument '(.*)'\\n", str(error)):
            key, _, value = several[1].partition("=")
            return (
                f"{plain(several[1])} is a choice of values; if the value is text, write "
                f"{plain(command(override(key, value)))}; to run each of them, add -m"
            )
    if isinstance(error, OmegaConfBaseException):
        return _config_error(error)
    if isinstance(error, OverrideParseException):
        return _override_error(error)
    if _is_nowhere(error):
        return "the current folder has been deleted; change to one that is there (cd), and start the command again"
    if isinstance(error, OSError) and error.errno in DISK_REMEDIES:
        place = "the output" if error.filename is None else plain(error.filename)
        return f"{place}: {error.strerror}; {DISK_REMEDIES[error.errno]}"
    return str(error)


def _override_error(error: OverrideParseException) -> str:
    """Replaces Hydra's grammar error by advice on how to quote the value."""
    key, equals, value = str(error.override).partition("=")
    if not equals or not re.fullmatch(r"[+~]{0,2}[\w./@-]+", key):
        return f"{plain(error.override)} is no override; expected key=value"
    quoted = command(override(key, value))
    if not _is_readable(override(key, "text")):
        return (
            f"{plain(error.override)}: {plain(key)} is no key; expected names, split by dots, that begin with letters"
        )
    return f"{plain(error.override)} cannot be read; if the value is text, write {plain(quoted)}"


def _is_readable(text: str) -> bool:
    """Whether Hydra can read an override."""
    try:
        OverridesParser.create().parse_overrides([text])
    except OverrideParseException:
        return False
    return True


def _config_error(error: OmegaConfBaseException) -> str:
    """OmegaConf's message, with the names that were near an unknown key."""
    message = str(error.msg or error).splitlines()[0]
    key = str(error.full_key or error.key or "")
    text = f"{key}: {message}" if key else message
    if isinstance(error, MissingMandatoryValue):
        return f"{text}; give it: {key}=..."
    if isinstance(error, (KeyError, AttributeError)) and isinstance(error.parent_node, DictConfig):
        return f"{text}; {nearest(str(error.key), error.parent_node)}"
    return text


def _missing_option(error: MissingConfigException) -> str:
    """Hydra's first line with the nearest options, which Hydra does not list for a group inside a group."""
    text = str(error).splitlines()[0]
    option = (error.missing_cfg_file or "").rpartition("/")[2]
    if option in RENAMED:
        return f"{text}; it has no file of its own any more: write {RENAMED[option]}"
    options = error.options or []
    longer = [name for name in options if name.startswith(f"{option}_")]  # lora: lora_in_proj and its like
    near = longer or difflib.get_close_matches(option, options, n=3) or _inside_groups(error, option)
    return f"{text}; did you mean {', '.join(near)}?" if near else f"{text}; --help lists what there is"


def _inside_groups(error: MissingConfigException, option: str) -> list[str]:
    """Options of groups inside the option's group, as one writes them, the nearest first: `vtab/cifar` for `cifar`."""
    group = configs_folder() / (error.missing_cfg_file or "").rpartition("/")[0]
    inside = sorted(file.relative_to(group).with_suffix("").as_posix() for file in group.glob("*/**/*.yaml"))
    near = difflib.get_close_matches(option, {name.rpartition("/")[2] for name in inside})
    return [name for leaf in near for name in inside if name.rpartition("/")[2] == leaf][:3]
