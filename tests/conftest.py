"""Shared by all tests: a known number of threads, no network, and a tiny task with a finished run of it."""

import gc
import os
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")

CPU_BUDGET_S, CPU_BUDGET_OF_A_FILE_S = 5, 15
CPU_TIMES = pytest.StashKey[dict[str, float]]()


@dataclass(frozen=True)
class FinishedRun:
    """An uninterrupted tiny run; not to be changed by tests."""

    command: list[str]
    folder: Path
    record: Any  # a RunRecord


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Path:
    """A task of 40 images; not to be changed by tests."""
    from helpers import runs

    return runs.lay_out_task(tmp_path_factory.mktemp("task") / "tiny")


@pytest.fixture(scope="session")
def finished(task, tmp_path_factory) -> FinishedRun:
    from helpers import runs

    outputs = tmp_path_factory.mktemp("outputs")
    command = runs.overrides(task, outputs, "trainer.picture=true")
    record = runs.run(command)
    return FinishedRun(command, runs.only_run_folder(outputs), record)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Imports the project, too: this is called before other conftest.py are loaded, which may import parts of it."""
    parser.addoption("--exhaustive", action="store_true", help="also run the tests marked exhaustive (CONTRIBUTING.md)")
    options = pluginmanager.get_plugin("pytestconfig").known_args_namespace
    if "PYTEST_XDIST_WORKER" in os.environ or not getattr(options, "numprocesses", None):  # this process runs tests
        import_project()
        gc.disable()  # until all is collected: collections take a fifth of the time of imports


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves exhaustive tests out unless they are asked for; files with slow tests come first.

    So no worker is left with a long file when the others have nothing more to do.
    """
    if not config.getoption("exhaustive"):
        left_out = [item for item in items if "exhaustive" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if "exhaustive" not in item.keywords]
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a file has imported and cached lives to the end, too: runs look through all that is not frozen."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()  # of what is not frozen yet
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Notes the CPU time of a test, its fixtures included, and of the processes that it has waited for."""
    before = cpu_time()
    result = yield
    item.config.stash[CPU_TIMES][item.nodeid] = cpu_time() - before
    return result


def cpu_time() -> float:
    """Of this process, the processes that it has waited for, and the same of its fork server (helpers/crashes.py)."""
    server = forkserver._forkserver._forkserver_pid
    try:
        stat = Path(f"/proc/{server}/stat").read_text()
    except OSError:  # there is none, or no /proc
        return sum(os.times()[:4])
    ticks = map(int, stat.rpartition(")")[2].split()[11:15])
    return sum(os.times()[:4]) + sum(ticks) / os.sysconf("SC_CLK_TCK")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CPU_TIMES] = {}
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(FailuresAtOnce(config))


class FailuresAtOnce:
    """Names a failure when it is there: a run that is cut off writes no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reporter.write(f"\nFAILED {report.nodeid} ({report.when})\n")


def import_project() -> None:
    """As the commands import it, in half the time that `import lightning` takes alone: before any test imports that.

    Without a GPU, Triton is imported for its interpreter, in which tests/kernels checks the kernels.
    """
    from mambapeft_vision.utils.startup import imports_kept

    with imports_kept():
        import torch

        with pytest.MonkeyPatch.context() as patch:
            if not torch.cuda.is_available() and find_spec("triton") is not None:
                patch.setenv("TRITON_INTERPRET", "1")
                import_kernels()
        import mambapeft_vision.run.run  # noqa: F401


def import_kernels() -> None:
    """All modules with Triton kernels: they and Triton's own are for the interpreter, or not, from then on."""
    import mambapeft_kernels

    (folder,) = map(Path, mambapeft_kernels.__path__)
    for file in folder.rglob("*.py"):
        if "@triton.jit" in file.read_text():
            import_module(".".join(file.relative_to(folder.parent).with_suffix("").parts))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its times to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["cpu_times"] = session.config.stash[CPU_TIMES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[CPU_TIMES].update(getattr(node, "workeroutput", {}).get("cpu_times", {}))


def report_cpu_times(terminalreporter: Any) -> None:
    """The whole suite is to take minutes on two cores: whatever takes long is said at the end of each run."""
    times = terminalreporter.config.stash[CPU_TIMES]
    long = sorted(((seconds, test) for test, seconds in times.items() if seconds > CPU_BUDGET_S), reverse=True)
    files: Counter[str] = Counter()
    for test, seconds in times.items():
        files[test.partition("::")[0]] += seconds
    long += [(seconds, file) for file, seconds in files.most_common() if seconds > CPU_BUDGET_OF_A_FILE_S]
    if long:
        budgets = f"tests over {CPU_BUDGET_S} s and files over {CPU_BUDGET_OF_A_FILE_S} s of CPU time"
        terminalreporter.section(f"{budgets} (all tests: {sum(times.values()):.0f} s)")
        for seconds, name in long:
            terminalreporter.write_line(f"{seconds:6.1f} s  {name}")


def pytest_collection_finish() -> None:
    """Modules and tests live to the end: each look through them for garbage takes longer than most tests."""
    gc.collect()
    gc.freeze()
    gc.enable()
    from helpers.quick import skip_what_costs_time

    skip_what_costs_time()


def pytest_terminal_summary(terminalreporter) -> None:
    """Writes how the tests that need a GPU ended to results/gpu-tests.json, wherever one is (docs show the last run).

    MAMBAPEFT_COMMIT names the commit where the checkout has no .git folder.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    report_cpu_times(terminalreporter)
    counts = {
        outcome: sum("gpu" in getattr(report, "keywords", ()) for report in terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if not counts["passed"]:
        return
    import torch

    if not torch.cuda.is_available():
        return
    from mambapeft_vision.utils.atomic import write_json
    from mambapeft_vision.utils.environment import git_state, library_versions

    commit, dirty = git_state()
    write_json(
        Path(__file__).resolve().parents[1] / "results" / "gpu-tests.json",
        {
            "commit": os.environ.get("MAMBAPEFT_COMMIT", commit),
            "dirty": dirty,
            "card": torch.cuda.get_device_name(),
            "versions": library_versions(),
            "date": datetime.now(timezone.utc).date().isoformat(),
            **counts,
        },
    )
