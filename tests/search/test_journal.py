"""The journal of a search whose process was killed while it wrote."""

import os

import optuna
import pytest
from helpers.file_size import size_limit

from mambapeft_vision.search.search import JOURNAL, Journal, drop_incomplete_line


def study_in(folder):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.create_study(storage=storage, study_name="x", load_if_exists=True)


def test_an_incomplete_last_line_is_dropped(tmp_path):
    study_in(tmp_path).optimize(lambda trial: trial.suggest_float("a", 0, 1), n_trials=3)
    file = tmp_path / JOURNAL
    os.truncate(file, file.stat().st_size - 20)
    drop_incomplete_line(file)
    study_in(tmp_path).optimize(lambda trial: trial.suggest_float("a", 0, 1), n_trials=2)
    states = [trial.state.name for trial in study_in(tmp_path).trials]
    assert states.count("COMPLETE") == 4 and len(states) == 5  # the third trial's end was in the line
    before = file.read_bytes()
    drop_incomplete_line(file)
    drop_incomplete_line(tmp_path / "none")
    assert file.read_bytes() == before and [found.name for found in tmp_path.iterdir()] == [JOURNAL]


def test_a_line_that_the_disk_took_in_part_is_dropped_at_once(tmp_path):
    """The next line would continue it, and no search could read the journal again."""
    file = tmp_path / JOURNAL
    journal = Journal(str(file))
    journal.append_logs([{"number": 1}])
    with size_limit(file.stat().st_size + 5), pytest.raises(OSError, match="File too large") as error:
        journal.append_logs([{"number": 2}])
    assert error.value.filename == str(file)
    journal.append_logs([{"number": 3}])
    assert list(Journal(str(file)).read_logs(0)) == [{"number": 1}, {"number": 3}]
