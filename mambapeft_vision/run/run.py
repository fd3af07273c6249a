"""One run from its config to its result: plan → assemble → fit → finish."""

import heapq
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from mambapeft_vision.adapter.files import ADAPTER_FILE
from mambapeft_vision.adapter.files import CONFIG_FILE as ADAPTER_CONFIG_FILE
from mambapeft_vision.engine.errors import readable_errors
from mambapeft_vision.results.layout import (
    CHECKPOINT_FILE,
    FAILURE_FILE,
    LOG_FILE,
    METRICS_FILE,
    OVERRIDES_FILE,
    PREDICTIONS_FILE,
    RESULT_FILE,
    RUN_CONFIG_FILE,
    pictures_of,
)
from mambapeft_vision.results.record import RunRecord, is_finished, read_record
from mambapeft_vision.run.assemble import FRESH, Setup, Sources, assemble
from mambapeft_vision.run.build import build_logger
from mambapeft_vision.run.failure_record import failures_noted
from mambapeft_vision.run.finish import draw, finish, finished_before, versions_of
from mambapeft_vision.run.fit import fit
from mambapeft_vision.run.inputs import Fingerprints, Inputs, changed
from mambapeft_vision.run.own_code import OwnCode
from mambapeft_vision.run.report_lines import dry_run_report, starting_lines, summarise
from mambapeft_vision.run.rerun import check_inputs, compare, differences
from mambapeft_vision.run.run_config import RunPlan, fingerprint_of, make_plan, set_aside
from mambapeft_vision.utils.atomic import remove_leftovers, write_text
from mambapeft_vision.utils.console import Console, say
from mambapeft_vision.utils.environment import device_name, git_state
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.lock import locked
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.timeline import begin, mark, reached
from mambapeft_vision.utils.untrusted import refuse_links

_BESIDE = 20  # runs that are looked at for one of fewer epochs
_FILES = (
    *(RESULT_FILE, RUN_CONFIG_FILE, OVERRIDES_FILE, LOG_FILE, METRICS_FILE, PREDICTIONS_FILE, CHECKPOINT_FILE),
    *(FAILURE_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE),
)


@dataclass(frozen=True)
class RunContext:
    """What a run needs besides its plan.

    Args:
        overrides: overrides of the command line, kept in the run's folder.
        sources: sources of task and backbone.
        expected: the result of the run that is repeated: images and weights must be those of this result.
        callbacks: Lightning callbacks, called after the run's own.
    """

    overrides: Sequence[str] = ()
    sources: Sources = FRESH
    expected: RunRecord | None = None
    callbacks: Sequence[Callback] = ()


def train(
    cfg: DictConfig,
    overrides: Sequence[str] = (),
    sources: Sources = FRESH,
    expected: RunRecord | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunRecord | None:
    """Does what the config asks for: a dry run, a finished run's summary, or the (rest of the) run.

    Args: see `RunContext`.
    Returns: the run's result; None for a dry run.
    Raises: UserError.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("torchrun starts this command many times; start it once, with trainer.devices=N for N GPUs")
    OwnCode(cfg.paths.methods, cfg.paths.backbones).add()
    plan = make_plan(cfg)
    if plan.dry_run:
        say(dry_run_report(plan))
        return None
    outdated = ""
    if plan.resume and is_finished(plan.folder):
        record = read_record(plan.folder)
        outdated = changed(Fingerprints.of_record(record), Inputs().of(plan))
        if not outdated:
            return finished_before(plan, record)
    return run_training(plan, RunContext(overrides, sources, expected, callbacks), outdated)


def run_training(plan: RunPlan, context: RunContext, outdated: str = "") -> RunRecord:
    """The (rest of the) run, alone in its folder; result.json is written last.

    Args:
        outdated: the inputs in which the finished run in this folder differs from the present ones; "" if there are
            none. That run is set aside.

    Raises: UserError.
    """
    with ExitStack() as stack:
        refuse_links(plan.folder, user_path(plan.paths.outputs))
        stack.enter_context(failures_noted(plan.folder, context.overrides))
        stack.enter_context(_readable_errors_of(plan))
        stack.enter_context(_deletion_noticed(plan.folder))
        aside = None if plan.resume and not outdated else _make_room(plan.folder)
        plan.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(plan.folder))
        if plan.resume and is_finished(plan.folder):  # by another process, since this one looked
            return finished_before(plan, read_record(plan.folder))
        _refuse_folders(plan.folder)
        remove_leftovers(plan.folder)
        _write_config(plan, context.overrides)
        console = stack.enter_context(Console(plan.folder / LOG_FILE))
        if aside is not None:
            reason = f" was made from other {outdated} and" if outdated else ""
            console.say(f"the run that was here{reason} is kept in {aside}")

        started = time.monotonic()
        console.say(f"{plan.method_names} on {plan.task}, seed {plan.seed}, in {plan.folder}")
        setup = assemble(plan, console, sources=context.sources)
        if context.expected is not None:
            _compare_inputs(plan, setup, context.expected, console)
        fewer = _finished_with_other_epochs(plan)
        if fewer is not None:
            console.say(
                f"{fewer} holds these settings with another number of epochs; this is a run of its own, "
                f"from its start, because the learning rate follows from that number"
            )
        for line in starting_lines(plan, setup.model, setup.task.batch_size):
            console.say(line)
        if setup.device.type == "cuda":  # on a CPU the two would share the cores
            setup.task.prefetch_test()
        logger = build_logger(plan)
        logger.start(plan)
        mark("logger")
        record = None
        try:
            history = fit(plan, setup, console, logger.log_epoch, context.callbacks)
            mark("last step")
            record = finish(plan, setup, history, console, started=started)
            mark("result")
            if plan.recipe.picture or logger.pictures:  # after the result: no picture is worth it
                draw(plan, setup)
        finally:
            logger.finish(record, pictures_of(plan.folder))
        console.say(summarise(record, plan.folder))
        console.note(f"seconds until: {reached()}")
        begin()
        if context.expected is not None:
            console.say(compare(context.expected, record))
        return record


def _finished_with_other_epochs(plan: RunPlan) -> Path | None:
    """A finished run beside this one, of the newest, that differs in its number of epochs alone."""
    name = plan.folder.name.partition("-")[0]  # the seed
    beside = (
        file for file in plan.folder.parent.glob(f"{name}-*/{RESULT_FILE}") if ".replaced-" not in str(file.parent)
    )
    for file in heapq.nlargest(_BESIDE, beside, key=lambda file: file.stat().st_mtime):
        with suppress(UserError, OSError, KeyError, TypeError):  # of other releases
            config = read_record(file).config
            trainer = {**config["trainer"], "max_epochs": plan.recipe.max_epochs}
            if fingerprint_of({**config, "trainer": trainer}) == plan.fingerprint:
                return file.parent
    return None


@contextmanager
def _deletion_noticed(folder: Path) -> Iterator[None]:
    """Raises UserError where the run's folder was deleted while it ran."""
    try:
        yield
    except FileNotFoundError as error:
        if folder.is_dir():
            raise
        raise UserError(f"{folder} was deleted while the run was at work in it; start it again") from error


def _readable_errors_of(plan: RunPlan) -> AbstractContextManager[None]:
    batch, test_batch = plan.dataset["batch_size"], plan.dataset["test_batch_size"]
    return readable_errors(
        f"{plan.method_names} on {plan.task}",
        place=str(plan.folder),
        other_place="paths.outputs=DIR",
        memory_remedy=f"Lower trainer.micro_batch (now {plan.recipe.micro_batch or batch} images a pass), "
        f"dataset.batch_size (now {batch}) or, if it was testing, dataset.test_batch_size (now {test_batch}); "
        f"trainer.precision=bf16 needs half of what fp32 needs",
    )


def _refuse_folders(folder: Path) -> None:
    """Raises UserError for folders in the places of the run's files: before the training, not after it."""
    for name in _FILES:
        if (folder / name).is_dir():
            raise UserError(f"{folder / name} is a folder; expected a file, or nothing. Move it")


def _make_room(folder: Path) -> Path | None:
    """Sets the run in `folder` aside and returns its new place. Raises InUseError while another process uses it."""
    if not folder.exists():
        return None
    with locked(folder):
        return set_aside(folder)


def _write_config(plan: RunPlan, overrides: Sequence[str]) -> None:
    write_text(plan.folder / RUN_CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(plan.config)))
    write_text(plan.folder / OVERRIDES_FILE, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))


def _compare_inputs(plan: RunPlan, setup: Setup, expected: RunRecord, console: Console) -> None:
    """Raises UserError for other images or weights than those of `expected`; reports all other differences."""
    images = setup.task.fingerprint(check_images=True)  # a manifest that came with the images proves nothing
    check_inputs(expected, plan.config, images, setup.model.backbone_sha256)
    versions = versions_of(plan, setup.task.content_hash)
    others = differences(expected, versions, git_state()[0], device_name(setup.device))
    console.say(f"not as recorded: {', '.join(others)}" if others else "versions and device are as recorded")
