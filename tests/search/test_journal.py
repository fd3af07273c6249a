"""The journal of a search whose process was killed while it wrote."""

import os

import optuna

from mambapeft_vision.search.search import JOURNAL, drop_incomplete_line


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
