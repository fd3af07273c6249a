"""One run from its config to its result: plan → assemble → fit → finish."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from mambapeft_vision.engine.errors import readable_errors
from mambapeft_vision.methods import add_methods_folder
from mambapeft_vision.results.pictures import pictures_of
from mambapeft_vision.results.record import RunRecord, is_finished
from mambapeft_vision.run.assemble import FRESH, Setup, Sources, assemble
from mambapeft_vision.run.build import build_logger
from mambapeft_vision.run.failure_record import failures_noted
from mambapeft_vision.run.finish import finish, finished_before, keep
from mambapeft_vision.run.fit import fit
from mambapeft_vision.run.report_lines import dry_run_report, starting_lines, summarise
from mambapeft_vision.run.rerun import check_inputs, compare, differences
from mambapeft_vision.run.run_config import RunPlan, make_plan, set_aside
from mambapeft_vision.utils.atomic import remove_leftovers, write_text
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.environment import device_name, git_state, library_versions
from mambapeft_vision.utils.lock import locked

CONFIG_FILE, OVERRIDES_FILE, LOG_FILE = "config.yaml", "overrides.yaml", "train.log"


@dataclass(frozen=True)
class RunContext:
    """What a run is done with, beside its plan.

    Args:
        overrides: of the command line, kept in the run's folder.
        sources: of task and backbone.
        expected: the result of the run that is to be done again: its images and weights are asked for.
        callbacks: of Lightning's, called after the run's own.
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
    if cfg.paths.methods is not None:
        add_methods_folder(cfg.paths.methods)
    plan = make_plan(cfg)
    if plan.dry_run:
        print(dry_run_report(plan))
        return None
    if plan.resume and is_finished(plan.folder):
        return finished_before(plan)
    return run_training(plan, RunContext(overrides, sources, expected, callbacks))


def run_training(plan: RunPlan, context: RunContext) -> RunRecord:
    """The (rest of the) run, alone in its folder; result.json is written last. Raises UserError."""
    with ExitStack() as stack:
        stack.enter_context(failures_noted(plan.folder, context.overrides))
        stack.enter_context(_readable_errors_of(plan))
        aside = None if plan.resume else _make_room(plan.folder)
        plan.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(plan.folder))
        if plan.resume and is_finished(plan.folder):  # by another process, since this one looked
            return finished_before(plan)
        remove_leftovers(plan.folder)
        _write_config(plan, context.overrides)
        console = stack.enter_context(Console(plan.folder / LOG_FILE))
        if aside is not None:
            console.say(f"the run that was here is kept in {aside}")

        started = time.monotonic()
        console.say(f"{plan.method_names} on {plan.task}, seed {plan.seed}, in {plan.folder}")
        setup = assemble(plan, console, sources=context.sources)
        if context.expected is not None:
            _compare_inputs(plan, setup, context.expected, console)
        for line in starting_lines(plan, setup.model, setup.task.batch_size):
            console.say(line)
        if setup.device.type == "cuda":  # on a CPU the two would share the cores
            setup.task.prefetch_test()
        logger = build_logger(plan)
        logger.start(plan)
        record = None
        try:
            history = fit(plan, setup, console, logger.log_epoch, context.callbacks)
            pictures = plan.recipe.picture or logger.pictures
            record = finish(plan, setup, history, console, pictures=pictures, started=started)
        finally:
            logger.finish(record, pictures_of(plan.folder))
        keep(plan.folder, record)
        console.say(summarise(record, plan.folder))
        if context.expected is not None:
            console.say(compare(context.expected, record))
        return record


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


def _make_room(folder: Path) -> Path | None:
    """Sets what is in `folder` aside and returns where it is now; raises InUseError where another process works."""
    if not folder.exists():
        return None
    with locked(folder):
        return set_aside(folder)


def _write_config(plan: RunPlan, overrides: Sequence[str]) -> None:
    write_text(plan.folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(plan.config)))
    write_text(plan.folder / OVERRIDES_FILE, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))


def _compare_inputs(plan: RunPlan, setup: Setup, expected: RunRecord, console: Console) -> None:
    """Raises UserError for other images or weights than `expected` had; says what else is not as it was."""
    check_inputs(expected, plan.config, setup.task.manifest_hash, setup.model.backbone_sha256)
    changed = differences(expected, library_versions(), git_state()[0], device_name(setup.device))
    console.say(f"not as recorded: {', '.join(changed)}" if changed else "versions and device are as recorded")
