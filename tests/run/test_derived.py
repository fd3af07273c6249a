"""Results that are made from finished runs: ensembles and interpolations."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import runs

from mambapeft_vision import cli
from mambapeft_vision.results.predictions import read_probabilities
from mambapeft_vision.results.record import RunRecord, is_derived, read_record, write_record
from mambapeft_vision.results.tables import collect, find_records, read_standard
from mambapeft_vision.run.ensemble import Member, ensemble
from mambapeft_vision.run.inputs import CONTENT
from mambapeft_vision.run.interpolate import How, NotInterpolableError, best_of, open_interpolation
from mambapeft_vision.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class World:
    outputs: Path
    folders: dict[str, Path]

    def record(self, name: str) -> RunRecord:
        return read_record(self.folders[name])

    def member(self, name: str) -> Member:
        return Member(self.folders[name], self.record(name))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """LoRA with two seeds on all 40 images and one on 30 of them, a linear probe and a method on activations."""
    folder = tmp_path_factory.mktemp("derived")
    task = runs.lay_out_task(folder / "task")
    lines = (task / "train800val200.txt").read_text().splitlines(keepends=True)
    (task / "train800.txt").write_text("".join(lines[:30]))
    (task / "val200.txt").write_text("".join(lines[30:]))
    wanted = {
        "lora 0": ["seed=0"],
        "lora 1": ["seed=1"],
        "lora on train800": ["dataset.train_split=train800", "dataset.test_split=val200"],
        "probe": ["method=linear_probe", "~method.lora_p_x"],
        "svp": ["method=[memba]"],
    }
    folders = {}
    for name, more in wanted.items():
        line = [text for text in runs.overrides(task, folder / "outputs", *more) if not text.startswith("~")]
        if any(text.startswith("method=") for text in more):
            line = [text for text in line if not text.startswith("method.lora")]
        before = set((folder / "outputs").glob("*/*/*/*"))
        runs.run([*line, "trainer.max_epochs=2"])
        (folders[name],) = set((folder / "outputs").glob("*/*/*/*")) - before
    return World(folder / "outputs", folders)


# Ensembles


def test_an_ensemble_is_the_mean_of_the_probabilities(world, tmp_path):
    shares, labels, _ = zip(*(read_probabilities(world.folders[name]) for name in ("lora 0", "lora 1")))
    folder, record = ensemble([world.member("lora 0"), world.member("lora 1")], tmp_path)
    mean = (shares[0].astype(float) + shares[1]) / 2
    assert record.accuracy == (mean.argmax(1) == labels[0]).mean()
    assert record.loss == pytest.approx(-np.log(mean[np.arange(len(mean)), labels[0]]).mean())
    assert record.trainable == 2 * world.record("lora 0").trainable and record.num_test == runs.TEST_IMAGES
    assert record.config["derived"]["label"] == "2 seeds" and is_derived(read_record(folder))
    again, *_ = read_probabilities(folder)
    np.testing.assert_allclose(again, mean, atol=1e-6)
    same, _ = ensemble([world.member("lora 1"), world.member("lora 0")], tmp_path)
    assert same == folder  # whatever the order


def test_an_ensemble_has_the_settings_of_the_method_that_is_named_first(world, tmp_path):
    """Whatever the fingerprints: else the ensembles of two methods on several tasks would be several rows."""
    rates = set()
    for probe, lora in (("0" * 64, "f" * 64), ("f" * 64, "0" * 64)):
        members = [_changed(world.member("probe"), probe, 0.1), _changed(world.member("lora 0"), lora, 0.2)]
        rates.add(ensemble(members, tmp_path / probe[0])[1].config["trainer"]["learning_rate"])
    assert rates == {0.1}  # linear_probe comes before lora_p_x


def _changed(member: Member, fingerprint: str, rate: float) -> Member:
    config = {**member.record.config, "trainer": {**member.record.config["trainer"], "learning_rate": rate}}
    return Member(member.folder, dataclasses.replace(member.record, fingerprint=fingerprint, config=config))


def test_runs_on_other_images_are_refused(world, tmp_path):
    first, second = world.member("lora 0"), world.member("lora 1")
    with pytest.raises(UserError, match="another test split than .*: (val200, not test|test, not val200)"):
        ensemble([first, world.member("lora on train800")], tmp_path)
    moved = Member(second.folder, dataclasses.replace(second.record, data_manifest="other"))
    with pytest.raises(UserError, match="another images .by their fingerprint.*(other, not|not other)"):
        ensemble([first, moved], tmp_path)
    with pytest.raises(UserError, match="an ensemble of 1 run"):
        ensemble([first, first], tmp_path)
    assert not list(tmp_path.iterdir())


def of_other_pixels(record: RunRecord) -> RunRecord:
    return dataclasses.replace(record, versions={**record.versions, CONTENT: "other"})


def test_runs_on_other_pixels_are_refused(world, tmp_path):
    """Files of the same sizes: the task is not verified, so its fingerprint is the same."""
    first, second = world.member("lora 0"), world.member("lora 1")
    with pytest.raises(UserError, match="was tested on images of other content than"):
        ensemble([first, Member(second.folder, of_other_pixels(second.record))], tmp_path)
    probe = shutil.copytree(world.folders["probe"], tmp_path / "probe")
    write_record(probe, of_other_pixels(world.record("probe")))
    with pytest.raises(UserError, match="is no linear probe on custom/tiny with the same images"):
        open_interpolation(world.folders["lora 0"], "test", How("cpu"), probe)


def test_predictions_are_those_of_the_run(world, tmp_path):
    """Another run's, and each of some flipped bits."""
    run = shutil.copytree(world.folders["lora 0"], tmp_path / "run")
    file = run / "predictions.npz"
    good, other = file.read_bytes(), (world.folders["lora 1"] / "predictions.npz").read_bytes()
    flips = [good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :] for place in range(40, len(good), 97)]
    for content in (other, *flips):
        file.write_bytes(content)
        with pytest.raises(UserError, match="predictions.npz"):
            read_probabilities(run)
    file.write_bytes(good)
    assert read_probabilities(run)


def test_an_interpolation_on_other_images_says_so(world, tmp_path, capsys):
    run = shutil.copytree(world.folders["lora 0"], tmp_path / "run")
    write_record(run, of_other_pixels(world.record("lora 0")))
    open_interpolation(run, "test", How("cpu"))
    assert "the images are not those that the run was made from" in capsys.readouterr().out
    open_interpolation(world.folders["lora 0"], "test", How("cpu"))
    assert "are not those" not in capsys.readouterr().out


def test_files_without_probabilities_say_so(world, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    write_record(old, world.record("lora 1"))
    labels = read_probabilities(world.folders["lora 1"])[1]
    np.savez(old / "predictions.npz", predicted=labels, labels=labels)
    with pytest.raises(UserError, match="holds no probabilities, as those of earlier releases"):
        ensemble([world.member("lora 0"), Member(old, world.record("lora 1"))], tmp_path)
    wrong = {"top_classes": np.zeros((3, 2), int), "top_probabilities": np.ones((3, 3), np.float32)}
    np.savez(old / "predictions.npz", predicted=labels, labels=labels, **wrong)
    with pytest.raises(UserError, match="do not fit each other"):
        read_probabilities(old)


def test_what_is_not_kept_is_spread_over_the_other_classes(tmp_path):
    arrays = {"predicted": [3], "labels": [0], "top_classes": [[3, 1]], "top_probabilities": np.float32([[0.6, 0.2]])}
    np.savez(tmp_path / "predictions.npz", **arrays)
    np.testing.assert_allclose(read_probabilities(tmp_path)[0], [[0.1, 0.2, 0.1, 0.6]], rtol=1e-6)


def test_ensembles_are_rows_of_the_tables(world, tmp_path, capsys):
    cli.main(["ensemble", str(world.folders["lora 0"].parent), f"--out={tmp_path}"])
    out = capsys.readouterr().out
    assert "of 2 runs" in out and "(train800 / val200): one run, so no ensemble" in out
    with pytest.raises(UserError, match="nothing was averaged"):
        cli.main(["ensemble", f"runs={world.folders['lora 0']}"])
    (folder,) = tmp_path.rglob("result.json")
    records = [world.record("lora 0"), world.record("lora 1"), *find_records([tmp_path])]
    (collection,) = collect(records, read_standard(runs.CONFIGS))
    assert [row.settings.get("ensemble") for row in collection.rows] == [None, "2 seeds"]
    with pytest.raises(UserError, match="was made from finished runs, not trained"):
        cli.main(["rerun", str(folder)])


# Interpolation


def test_the_ends_are_the_adapted_and_the_pretrained_weights(world):
    between = open_interpolation(world.folders["lora 0"], "test", How(device="cpu"), world.folders["probe"])
    for name, alpha in (("lora 0", 1.0), ("probe", 0.0)):
        shares, *_ = read_probabilities(world.folders[name])
        found = between.test(alpha)
        order = torch.from_numpy(shares).gather(1, found.classes)
        torch.testing.assert_close(found.probabilities, order, rtol=1e-4, atol=1e-5)
    weights = dict(between.setup.model.backbone.named_parameters())
    between.test(0.25)
    name, (pretrained, adapted) = next(iter(between.ends.items()))
    torch.testing.assert_close(weights[name], 0.75 * pretrained + 0.25 * adapted)
    assert set(between.ends) == {
        *(n for n in between.ends if n.endswith("mixer.in_proj.weight")),
        "head.weight",
        "head.bias",
    }


def test_without_a_probe_the_head_stays(world):
    between = open_interpolation(world.folders["lora 0"], "test", How(device="cpu"))
    assert between.ends and not any(name.startswith("head.") for name in between.ends)


def test_methods_on_activations_and_other_probes_are_refused(world):
    with pytest.raises(NotInterpolableError, match="memba cannot be interpolated"):
        open_interpolation(world.folders["svp"], "test", How(device="cpu"))
    with pytest.raises(UserError, match="is no linear probe on custom/tiny"):
        open_interpolation(world.folders["lora 0"], "test", How(device="cpu"), world.folders["lora 1"])


def test_alpha_is_chosen_on_images_that_were_not_trained_on(world, tmp_path, capsys):
    run, chooser = str(world.folders["lora 0"]), str(world.folders["lora on train800"])
    common = [f"--out={tmp_path}", "--device=cpu", "--alphas=0,0.5,1"]
    with pytest.raises(UserError, match="trained on train800val200, of which val200 is a part"):
        cli.main(["interpolate", run, *common])
    cli.main(["interpolate", run, f"--select={chooser}", *common])
    out = capsys.readouterr().out
    assert out.count("on val200") == 3 and out.count("<- chosen") == 1
    (record,) = find_records([tmp_path])
    assert record.config["derived"]["label"] == "chosen on val200" and record.config["derived"]["alpha"] in (0, 0.5, 1)
    (curve,) = tmp_path.rglob("curve.csv")
    assert len(curve.read_text().splitlines()) == 4
    cli.main(["interpolate", run, "--alpha=1", *common])
    whole = next(r for r in find_records([tmp_path]) if r.config["derived"]["label"] == "1.0")
    assert whole.accuracy == world.record("lora 0").accuracy


def test_of_equally_good_factors_the_one_nearest_to_the_adapter_is_taken():
    assert best_of({0.0: 0.5, 0.5: 0.7, 1.0: 0.7}) == 1.0
    assert best_of({0.0: 0.5, 0.5: 0.8, 1.0: 0.7}) == 0.5
