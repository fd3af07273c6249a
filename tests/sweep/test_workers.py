"""Tests of the settings of a sweep's workers."""

from collections import Counter

import pytest

from mambapeft_vision.sweep.pool import Pool


@pytest.mark.parametrize(("gpus", "chosen"), [(["2", "5"], ["2", "5", "2"]), ([], [None] * 3)])
def test_workers_get_this_process_s_environment_and_the_gpus_in_turn(monkeypatch, tmp_path, gpus, chosen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OF_THIS_PROCESS", "1")  # which the fork server, started before, does not have
    pool = Pool(3, gpus, tmp_path)
    settings = [pool.settings_of(number) for number in range(pool.size)]
    assert [one.environment.get("CUDA_VISIBLE_DEVICES") for one in settings] == chosen
    assert all(one.environment["OF_THIS_PROCESS"] == "1" and one.gpu is bool(gpus) for one in settings)
    assert Counter(one.log for one in settings).most_common(1)[0][1] == 1
