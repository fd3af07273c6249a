"""The same seed gives the same bits, and a result.json is enough to do its run again."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import crashes, runs
from helpers.run_files import result_of
from omegaconf import open_dict

from mambapeft_vision import cli
from mambapeft_vision.data.manifest import TaskEntry, write_entry
from mambapeft_vision.results.layout import FAILURE_FILE
from mambapeft_vision.results.record import read_record
from mambapeft_vision.run.rerun import differences, split_flag, store_root_config
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_file

MORE = ["trainer.max_epochs=2", "method.lora_p_x.dropout=0.2", "+backbone.drop_path_rate=0.2", "seed=3"]


class Done:
    """A finished run of a task below paths.data; only its result.json is left where `alone` is."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.task = runs.lay_out_task(self.data / "tiny")
        command = runs.overrides(Path("${paths.data}/tiny"), folder / "out", *MORE, f"paths.data={self.data}")
        self.record = runs.run(command)
        self.folder = runs.only_run_folder(folder / "out")
        self.outputs = folder / "out"
        self.alone = folder / "elsewhere" / "result.json"
        self.alone.parent.mkdir()
        shutil.copy(self.folder / "result.json", self.alone)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return Done(tmp_path_factory.mktemp("again"))


DEMO = "mambapeft_vision.data.DemoDataModule"


def again(tmp_path, result, *more):
    return crashes.command(tmp_path, "train.py", "--from-result", str(result), *more)


def test_twice_in_two_processes_is_the_same_to_the_last_bit(done, tmp_path, capsys):
    """From its result.json alone. Dropout and drop path are on; the second process goes on where outputs are new."""
    code, out, err = again(tmp_path, done.alone)
    assert code == 0, err
    assert "accuracy and test loss are the recorded ones, to the last bit" in out
    assert "versions and device are as recorded" in out
    folder = tmp_path / "outputs-again" / done.folder.relative_to(done.outputs)  # the command's, not the record's
    for name in ("adapter.safetensors", "predictions.npz"):
        assert (folder / name).read_bytes() == (done.folder / name).read_bytes()
    record = read_record(folder)
    assert (record.fingerprint, record.accuracy, record.loss) == (
        done.record.fingerprint,
        done.record.accuracy,
        done.record.loss,
    )
    cli.main(
        ["rerun", str(done.folder), f"paths.outputs={tmp_path / 'outputs-again'}"]
    )  # a folder will do, and the command of its own
    assert "was finished before" in capsys.readouterr().out


def test_overrides_and_other_groups(done, tmp_path):
    """Seeds, keys, data elsewhere and another method, by the same grammar as ever."""
    moved = shutil.copytree(done.data, tmp_path / "moved")
    arguments = (f"paths.data={moved}", f"paths.outputs={tmp_path / 'out'}", "seed=4", "dry_run=true", "--cfg", "job")
    code, out, err = again(tmp_path, done.alone, *arguments, "--resolve")
    assert code == 0, err
    assert f"folder: {moved}/tiny" in out and out.count("seed: 4") == 2 and "dropout: 0.2" in out
    code, out, err = again(tmp_path, done.alone, "-m", *arguments[:-2], "method=[a,d],linear_probe", "logger=wandb")
    assert code == 0, err
    assert out.count("dry run: a+d on custom/tiny, seed 4") == out.count("dry run: linear_probe on custom/tiny") == 1


def test_other_images_and_other_weights_are_refused(done, tmp_path):
    moved = shutil.copytree(done.data, tmp_path / "moved")
    lines = (moved / "tiny" / "test.txt").read_text().splitlines(keepends=True)
    (moved / "tiny" / "test.txt").write_text("".join(lines[1:]))
    outputs = f"paths.outputs={tmp_path / 'out'}"
    code, out, err = again(tmp_path, done.alone, f"paths.data={moved}", outputs)
    assert code == 2 and "epoch" not in out and "Traceback" not in err
    assert f"{moved}/tiny are not those of the record: manifest unverified:" in err and "paths.data of those" in err
    assert json.loads(next((tmp_path / "out").rglob(FAILURE_FILE)).read_text())["kind"] == "UserError"

    content = result_of(done.alone) | {"backbone_sha256": "0" * 64}
    (tmp_path / "result.json").write_text(json.dumps(content))
    code, out, err = again(tmp_path, tmp_path, outputs)
    assert code == 2 and "epoch" not in out
    assert "the weights random are not those of the record" in err and "backbone.weights=PATH" in err


def test_what_differs_is_said(done):
    versions = {**done.record.versions, "torch": "9.9", "new": "1.0"}
    del versions["timm"]
    said = differences(done.record, versions, "abc", done.record.device_name)
    then = done.record.versions
    assert f"torch {then['torch']} → 9.9" in said and f"timm {then['timm']} → none" in said and "new none → 1.0" in said
    assert any(line.startswith("git commit ") and line.endswith(" → abc") for line in said) and len(said) == 4


def edited(done, tmp_path, edit):
    content = result_of(done.alone)
    edit(content["config"])
    (tmp_path / "result.json").write_text(json.dumps(content))
    return tmp_path / "result.json"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.update(hydra={"run": {"dir": "/"}}), "config has hydra, which this release does not"),
        (lambda config: config.update(defaults=["x"]), "config has defaults, which"),
        (lambda config: config["method"]["lora_p_x"].update(targets="${oc.env:HOME}"), "expected resolved values"),
        (lambda config: config["method"].update({"${oc.env:HOME}": {}}), "expected letters"),
        (lambda config: config["dataset"].update(_target_=DEMO, folder="/etc/x"), "not below its paths.data"),
        (lambda config: config["dataset"].update(_target_=DEMO, folder="data/../../x"), "not below its paths.data"),
        (lambda config: config["paths"].update(methods="/tmp/code"), "give paths.methods=DIR if you trust them"),
    ],
)
def test_a_record_is_data(done, tmp_path, edit, message):
    with pytest.raises(UserError, match=message):
        store_root_config(edited(done, tmp_path, edit), [], runs.CONFIGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from-result"], "names no file"),
        (["--from-result="], "names no file"),
        (["--from-result=nowhere"], "nowhere cannot be read"),
        (["--from-result=a", "--from-result=b"], "given twice"),
        (["--from-result=a", "--config-dir", "b"], "leave --config-dir out"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        result, rest = split_flag(arguments)
        store_root_config(result, rest, runs.CONFIGS)


def test_other_command_lines_are_left_alone():
    assert split_flag(["method=a", "seed=1"]) == (None, ["method=a", "seed=1"])


def test_records_older_than_a_key_have_its_default(done, tmp_path):
    """The published ones lack keys that came later."""
    file = edited(done, tmp_path, lambda config: [config["trainer"].pop(key) for key in ("on_nonfinite", "devices")])
    code, out, err = again(tmp_path, file, "--cfg", "job")
    assert code == 0 and "on_nonfinite: stop" in out and "devices: 1" in out, err


def test_the_fingerprint_is_found_again_wherever_the_data_is(done, tmp_path):
    code, out, err = again(tmp_path, done.alone, "dry_run=true", "paths.data=elsewhere", f"paths.outputs={tmp_path}")
    assert code == 0 and f"seed3-{done.record.fingerprint[:8]}" in out, err
    assert make_plan(runs.compose_train(runs.overrides(done.task, tmp_path))).fingerprint != done.record.fingerprint


def test_a_record_does_not_say_where_files_are_written(done, tmp_path):
    def elsewhere(config):
        config["paths"].update(outputs="/theirs", cache="/theirs/cache")

    code, out, err = again(tmp_path, edited(done, tmp_path, elsewhere), "--cfg", "job", "--resolve")
    assert code == 0 and "outputs: outputs-again" in out and "cache: data/cache" in out and "/theirs" not in out, err


def test_names_are_checked_before_any_folder_is_made(done, tmp_path):
    cfg = runs.compose_train(runs.overrides(done.task, tmp_path))
    with open_dict(cfg):
        cfg.method[f"{tmp_path}/victim/x"] = {}
    with pytest.raises(UserError, match="method name"):
        make_plan(cfg)
    assert not (tmp_path / "victim").exists()


def test_the_images_of_a_record_are_read_again(done, tmp_path):
    """A manifest that came with them proves nothing."""
    data = shutil.copytree(done.data, tmp_path / "data")
    record = result_of(done.alone)
    lists = {split: sha256_file(data / "tiny" / f"{split}.txt") for split in ("train800val200", "test")}
    write_entry(data, "tiny", TaskEntry("0" * 64, lists, 60, 1, {"test": 3}, True))
    record["data_manifest"] = "0" * 64
    (tmp_path / "result.json").write_text(json.dumps(record))
    code, _, err = again(tmp_path, tmp_path / "result.json", f"paths.data={data}", f"paths.outputs={tmp_path / 'o'}")
    assert code == 2 and "are not those of the record" in err, err


def test_a_record_does_not_choose_who_is_told(done, tmp_path):
    """The sender's W&B account would have been used without a word."""
    content = result_of(done.alone)
    content["config"]["logger"] = {
        "_target_": "mambapeft_vision.integrations.wandb_logger.WandbLogger",
        "project": "attackers",
        "entity": "attacker",
        "mode": "offline",
        "tags": [],
        "pictures": False,
    }
    file = tmp_path / "result.json"
    file.write_text(json.dumps(content))
    code, out, err = again(tmp_path, file, "--cfg", "job", f"paths.outputs={tmp_path / 'out'}")
    assert code == 0, err
    assert "attacker" not in out and "NoLogger" in out
