"""`scripts/prepare_vtab1k.py` from end to end, with a table of two small tasks."""

import dataclasses
import hashlib
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from helpers.hub import hub_with

from mambapeft_vision.data.manifest import read_entry
from mambapeft_vision.data.prepare import vtab1k as prepare
from mambapeft_vision.data.prepare.download import HUB_DATASET
from mambapeft_vision.data.prepare.vtab1k import BAD, GOOD, main
from mambapeft_vision.run.exit import code_of
from mambapeft_vision.utils.errors import INTERRUPTED

SCRIPT = Path(__file__).parents[3] / "scripts" / "prepare_vtab1k.py"


@pytest.fixture
def table(toy):
    return {"toy": toy, "other": dataclasses.replace(toy, folder="other", num_classes=4, num_test=9)}


@pytest.fixture
def archive(tmp_path, table, lay_out, zip_folder):
    file = tmp_path / "data.zip"
    for task in table.values():
        zip_folder(lay_out(tmp_path / "source", task), file, "vtab-1k/")
    return file


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data" / "vtab-1k"


@pytest.fixture
def run(table, root):
    return lambda *arguments: code_of(
        lambda: main(["--root", str(root), "--workers", "1", *map(str, arguments)], table)
    )


def tasks_in(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_from_a_zip_to_a_manifest(run, root, archive, capsys):
    assert run("--zip", archive) == GOOD
    assert tasks_in(root) == ["other", "toy"]
    assert read_entry(root, "toy").decoded and read_entry(root, "other").images == 5 + 2 + 7 + 9
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert f'"sha256": "{sha256}"' in (root / "manifest.json").read_text()
    output = capsys.readouterr().out
    assert f"{archive.stat().st_size:,} bytes, sha256 {sha256}" in output and "All good." in output


def test_worker_processes_find_the_same(run, root, archive, table):
    assert run("--zip", archive) == GOOD
    record = read_entry(root, "toy")
    assert main(["--root", str(root), "--workers", "2", "--verify-only"], table) == GOOD
    assert read_entry(root, "toy") == record


def test_from_a_folder(run, root, archive, tmp_path):
    assert run("--folder", tmp_path / "source") == GOOD
    assert tasks_in(root) == ["other", "toy"]


def test_a_choice_of_tasks_and_the_rest_later(run, root, archive):
    assert run("--zip", archive, "--tasks", "other") == GOOD
    assert tasks_in(root) == ["other"]
    assert run("--zip", archive) == GOOD
    assert tasks_in(root) == ["other", "toy"]


def test_a_second_run_does_nothing_again(run, archive, monkeypatch, capsys):
    assert run("--zip", archive) == GOOD
    monkeypatch.setattr(prepare, "verify_task", None)
    monkeypatch.setattr(prepare, "extract_tasks", None)
    assert run() == GOOD
    assert "toy: verified before" in capsys.readouterr().out


def test_verify_only_checks_again_and_forgets_what_does_not_pass(run, root, archive, capsys):
    assert run("--zip", archive) == GOOD
    (root / "toy/images/test/000001.jpg").write_bytes(b"broken")
    assert run() == BAD  # noticed by the file's time of change
    assert run("--verify-only") == BAD
    assert read_entry(root, "toy") is None and read_entry(root, "other") is not None
    report = capsys.readouterr().err
    assert f"{root / 'toy/test.txt'}:2: {root / 'toy/images/test/000001.jpg'}: cannot decode" in report
    assert f"delete what there is of {root / 'toy'}\n" in report
    assert "mambapeft prepare vtab1k --root" in report
    assert (root / "problems.txt").read_text().startswith(f"{root / 'toy/test.txt'}:2: ")


def test_a_damaged_task_deleted_as_told_comes_back(run, root, archive, table):
    assert run("--zip", archive) == GOOD
    (root / "toy/images/test/000001.jpg").write_bytes(b"broken")
    assert run("--verify-only") == BAD
    shutil.rmtree(root / "toy")
    assert run("--zip", archive) == GOOD
    assert not (root / "problems.txt").exists()


def test_a_task_laid_out_anew_is_verified_anew(run, root, archive, capsys):
    assert run("--zip", archive) == GOOD
    shutil.rmtree(root / "toy")
    capsys.readouterr()
    assert run("--zip", archive) == GOOD
    output = capsys.readouterr().out
    assert "toy: good" in output and "other: verified before" in output


def test_headers_only_is_not_taken_for_the_full_check(run, root, archive):
    assert run("--zip", archive, "--fast") == GOOD
    assert not read_entry(root, "toy").decoded
    assert run() == GOOD
    assert read_entry(root, "toy").decoded


def test_many_problems_are_cut_on_the_console_and_complete_in_the_file(run, root, archive, monkeypatch, capsys):
    assert run("--zip", archive) == GOOD
    (root / "toy/test.txt").write_text("".join(f"missing/{number}.jpg 0\n" for number in range(50)))
    assert run("--verify-only") == BAD
    report = capsys.readouterr().err
    assert "… and 31 more" in report  # 50 images and the count
    assert len((root / "problems.txt").read_text().splitlines()) == 51


def test_verifying_nothing_reports_every_task(run, root, capsys):
    assert run("--verify-only") == BAD
    report = capsys.readouterr().err
    assert f"{root / 'toy'}: the task's folder is missing" in report
    assert f"{root / 'other'}: the task's folder is missing" in report


def test_a_pinned_checksum_is_enforced_before_extraction(run, root, archive, capsys):
    assert run("--zip", archive, "--sha256", "0" * 64) == BAD
    assert "expected 0000" in capsys.readouterr().err and not root.exists()
    assert run("--zip", archive, "--sha256", hashlib.sha256(archive.read_bytes()).hexdigest().upper()) == GOOD


def test_the_size_cap_can_be_set(run, archive, capsys):
    assert run("--zip", archive, "--max-gb", "0.000001") == BAD
    assert "expected at most 1,000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--zip", "nowhere.zip"], "nowhere.zip is missing"),
        (["--folder", "nowhere"], "nowhere has no task folder toy"),
        (["--tasks", "toys"], "Unknown tasks ['toys']: expected a comma-separated choice of toy, other"),
        (["--tasks", ","], "Unknown tasks []"),
        (["--folder", "nowhere", "--sha256", "0"], "--sha256 is of an archive"),
    ],
)
def test_mistakes_in_the_arguments_are_named(run, capsys, arguments, reason):
    assert run(*arguments) == BAD
    assert reason in capsys.readouterr().err


def test_offline_fails_with_one_message(run, root, capsys, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network")

    hub_with(monkeypatch, {}, offline)
    assert run() == BAD
    assert "ownload by hand" in capsys.readouterr().err
    assert not root.exists()


def test_a_download_is_laid_out_and_the_manual_next_run_needs_no_network(run, root, archive, monkeypatch):
    def deliver(**arguments):
        (arguments["local_dir"] / arguments["filename"]).write_bytes(archive.read_bytes())

    hub_with(monkeypatch, {HUB_DATASET: {}}, deliver)
    assert run("--tasks", "toy") == GOOD
    hub_with(monkeypatch, {})
    assert run() == GOOD
    assert tasks_in(root) == ["other", "toy"]


def test_an_interrupted_verification_continues_with_the_next_task(run, root, archive, monkeypatch, capsys):
    verify_task = prepare.verify_task
    checked = []

    def verify(task, *arguments, **options):
        if task.folder == "other" and not checked.count("other"):
            checked.append("other")
            raise KeyboardInterrupt
        checked.append(task.folder)
        return verify_task(task, *arguments, **options)

    monkeypatch.setattr(prepare, "verify_task", verify)
    assert run("--zip", archive) == INTERRUPTED
    assert "Run the same command again to continue" in capsys.readouterr().err
    assert run("--zip", archive) == GOOD
    assert checked == ["toy", "other", "other"]


def test_the_script_runs_and_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in ("--root", "--zip", "--folder", "--tasks", "--verify-only", "--fast", "--sha256", "--max-gb"):
        assert option in text
