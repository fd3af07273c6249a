"""What W&B refuses is said in a line with its remedy, and nothing it does later costs a run."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from helpers.fake_records import fake_record
from helpers.wandb_files import offline_runs

from mambapeft_vision.commands import sync
from mambapeft_vision.integrations import wandb_logger
from mambapeft_vision.integrations.wandb_logger import WandbLogger, known_id, run_id
from mambapeft_vision.integrations.wandb_upload import upload
from mambapeft_vision.results.record import write_record
from mambapeft_vision.utils.errors import UserError


def logger(**changes) -> WandbLogger:
    given = {"project": "p", "entity": None, "mode": "offline", "tags": [], "pictures": False}
    return WandbLogger(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tags": ["y" * 70]}, "logger.tags: 'yyy.*1 to 64 characters"),
        ({"tags": [""]}, "logger.tags: ''"),
        ({"project": "my/proj"}, "logger.project='my/proj'.*none of /"),
        ({"project": "x" * 200}, "logger.project="),
        ({"entity": "a b"}, "logger.entity='a b'"),
        ({"mode": "disabled"}, "logger.mode='disabled'"),
    ],
)
def test_settings_that_wandb_would_refuse_are_named_first(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        logger(**changes)
    assert "wandb login" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (wandb.errors.AuthenticationError("no key"), "no key; log in with `wandb login`"),
        (wandb.errors.CommError("timed out\nwith details"), "timed out; W&B cannot be reached"),
        (wandb.errors.UsageError("Invalid project name"), "Invalid project name; correct the logger's settings"),
        (ValueError("1 validation error for Settings\nrun_tags\n  Tag is \x1b[1m long"), "run_tags Tag is"),
        (OSError(28, "No space left on device", "wandb"), "wandb: No space left on device; free some space"),
        (TypeError("unexpected"), "TypeError: unexpected; set logger.mode=offline"),
    ],
)
def test_what_wandb_says_is_translated(tmp_path, monkeypatch, error, message):
    def init(**_):
        raise error

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError) as caught:
        logger().start_recorded(tmp_path, fake_record("vtab/cifar", "a", 0, 0.5))
    assert message in str(caught.value) and str(caught.value).isprintable()
    assert ("wandb login" in str(caught.value)) == isinstance(error, wandb.errors.AuthenticationError)


class Broken:
    """A W&B run whose connection is lost."""

    def __getattr__(self, name):
        raise wandb.errors.CommError("connection lost")


def test_a_lost_connection_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    ours, record = logger(), fake_record("vtab/cifar", "a", 0, 0.5)
    ours.start_recorded(tmp_path, record)
    ours.log_epoch({"epoch": 0, "loss": 1.0})
    ours.finish(record, {})
    assert capsys.readouterr().err.count("warning: W&B: connection lost") == 1


class Silent:
    """A W&B run that takes everything, and writes what it can of it."""

    summary = SimpleNamespace(update=lambda _: None)

    def __getattr__(self, name):
        return lambda *_, **__: None


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_full_disk_is_no_upload(tmp_path, monkeypatch, capsys, mode):
    """W&B says nothing where the file for a later `wandb sync` could not be written."""

    def full(*_):
        raise OSError(28, os.strerror(28))

    (tmp_path / "run").mkdir()
    write_record(tmp_path / "run", fake_record("vtab/cifar", "a", 0, 0.5))
    monkeypatch.setattr(wandb, "init", lambda **_: Silent())
    monkeypatch.setattr(wandb_logger, "temporary_path", full)  # of the file that tries the disk out
    options = ["--offline"] if mode == "offline" else []
    if mode == "online":  # the network has taken it
        sync.main([str(tmp_path), *options])
    else:
        with pytest.raises(UserError, match="1 uploads failed; the warnings above say why"):
            sync.main([str(tmp_path), *options])
        assert capsys.readouterr().err.count("warning: W&B: its files: No space left on device") == 1
    assert (known_id(tmp_path / "run") is not None) == (mode == "online")


def test_long_names_of_methods_are_cut_to_tags(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: given.update(settings) or SimpleNamespace())
    method = {"m" * 90: {"_target_": "x"}}
    logger().start_recorded(tmp_path, fake_record("vtab/cifar", "a", 0, 0.5, method=method))
    assert given["tags"] == ["m" * 64]


def test_an_upload_follows_the_command_and_not_the_record(tmp_path):
    """The sender's account, paths and file names are not used, and the config that is told has none of them."""
    record = fake_record("vtab/cifar", "a", 0, 0.5)
    record.config.update(
        logger={"_target_": "x", "entity": "attacker", "project": "attackers"},
        paths={"outputs": "/home/sender"},
        sweep="/tmp/elsewhere",
    )
    write_record(tmp_path, record)
    upload(tmp_path, logger(project="mine"))
    (run,) = offline_runs(tmp_path)
    assert run.config["sweep"] == "/tmp/elsewhere" and run.config["method"] == record.config["method"]
    assert not {"logger", "paths"} & run.config.keys()
    assert "attacker" not in str(run) and "/home/sender" not in str(run.config)


@pytest.mark.parametrize("content", ["../x", "a/b", "", "x" * 100, "a\nb"])
def test_ids_that_are_no_ids_are_replaced(tmp_path, content):
    (tmp_path / "wandb_id.txt").write_text(content)
    assert known_id(tmp_path) is None
    found = run_id(tmp_path)
    assert known_id(tmp_path) == found == run_id(tmp_path) != content


def test_a_link_is_no_id(tmp_path):
    secret: Path = tmp_path / "secret"
    secret.write_text("hunter2")
    (tmp_path / "wandb_id.txt").symlink_to(secret)
    assert run_id(tmp_path) != "hunter2" and secret.read_text() == "hunter2"
