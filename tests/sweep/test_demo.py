"""The demo: shown again without training again; a failed run is no result."""

import pytest
from helpers import runs

from mambapeft_vision.commands import demo
from mambapeft_vision.sweep.jobs import plan_jobs
from mambapeft_vision.sweep.sweep import with_defaults


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> list[str]:
    """The demo's command, on a tiny task and backbone."""
    task = runs.lay_out_task(tmp_path / "tiny")
    methods = [argument for argument in demo.RUNS if argument.startswith("method=")]
    few = [o for o in runs.overrides(task, tmp_path / "out") if not o.startswith("method.")]
    monkeypatch.setattr(demo, "RUNS", [*methods, *few, "trainer.max_epochs=1"])
    return demo.RUNS


def test_finished_runs_are_shown_and_not_repeated(tiny, tmp_path, capsys):
    for job in plan_jobs(tiny, runs.CONFIGS):
        runs.run(job.overrides)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("result.json")}
    assert len(before) == 3
    for _ in range(2):
        capsys.readouterr()
        demo.main([])
        out = capsys.readouterr().out
        assert "3 runs, 3 of them finished before" in out
        assert all(f"| {name} " in out for name in ("linear_probe", "lora_p_x", "full"))
        assert "of the backbone's parameters" in out
        picture = tmp_path / "out" / "demo.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in out
        picture.unlink()
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("result.json")}


def test_a_choice_takes_the_place_of_the_default():
    line = with_defaults(["method=a,b", "seed=0,1", "dataset=c"], ["seeds=2", "method=d"])
    assert line == ["dataset=c", "seeds=2", "method=d"]


def test_a_dry_run_only_lists(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        demo.main(["--dry-run"])
    assert not end.value.code
    assert "3 runs: 3 new" in capsys.readouterr().out and not (tmp_path / "out").exists()
