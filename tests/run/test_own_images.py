"""From a folder of images to predictions of new ones: what a run knows of its classes reaches all that comes after."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import runs
from helpers.own_images import draw, tree
from PIL import Image

from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.commands import explain as explain_command
from mambapeft_vision.commands import predict as command
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.run import predict
from mambapeft_vision.run.compose import compose
from mambapeft_vision.run.evaluate import evaluate
from mambapeft_vision.run.explain import explain
from mambapeft_vision.run.inputs import Fingerprints, Inputs, changed
from mambapeft_vision.run.rerun import ROOT_CONFIG, store_root_config
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.run.trained import TrainedModel, open_trained
from mambapeft_vision.utils.errors import UserError

CLASSES = ("a cat", "dog", "Ünïcode, =1")


def overrides(path: Path, at: Path, *more: str) -> list[str]:
    kept = [word for word in runs.overrides(path, at / "runs", *more) if not word.startswith("dataset.")]
    return [
        *kept,
        "dataset.name=custom/own",
        f"dataset.path={path}",
        "dataset.batch_size=16",
        f"paths.data={at / 'data'}",
        *(word for word in more if word.startswith("dataset.")),
    ]


@pytest.fixture(scope="module")
def at(tmp_path_factory) -> Path:
    """A folder with the photos and all that a run on them leaves."""
    folder = tmp_path_factory.mktemp("own")
    tree(folder / "photos", dict.fromkeys(CLASSES, 16))
    return folder


@pytest.fixture(scope="module")
def record(at) -> RunRecord:
    found = runs.run(overrides(at / "photos", at, "trainer.max_epochs=30", "trainer.picture=true"))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def folder(at, record) -> Path:
    return runs.only_run_folder(at / "runs")


@pytest.fixture(scope="module")
def trained(folder) -> TrainedModel:
    return open_trained(folder, device="cpu")


def test_a_folder_of_images_is_learned(record, folder):
    assert record.accuracy >= 0.75 and record.num_test == 9
    assert "48 images of 3 classes" in (folder / "train.log").read_text()
    assert (folder / "confusion.png").is_file() and (folder / "predictions.png").is_file()


def test_the_same_command_is_finished_before_and_another_image_is_noticed(at, record, capsys):
    command = overrides(at / "photos", at, "trainer.max_epochs=30", "trainer.picture=true")
    assert runs.run(command) == record and "finished before" in capsys.readouterr().out
    plan = make_plan(runs.compose_train(command))
    assert not changed(Fingerprints.of_record(record), Inputs().of(plan))
    more = draw(at / "photos" / "dog" / "more.png", 1, 500)
    assert changed(Fingerprints.of_record(record), Inputs().of(plan)) == "images"
    more.unlink()


def test_a_record_of_others_records_splits_below_ones_own_data_alone(at, record, folder):
    store_root_config(folder, [], runs.CONFIGS)
    cfg = compose(ROOT_CONFIG, [f"paths.outputs={at / 'again'}"])
    assert cfg.dataset.path == str(at / "photos") and cfg.paths.data == "data"


def test_names_of_classes_and_images_are_in_all_that_a_run_leaves(folder):
    assert json.loads((folder / "adapter_config.json").read_text())["class_names"] == list(CLASSES)
    record = json.loads((folder / "result.json").read_text())
    assert (record["class_names"], record["multi_label"], record["schema_version"]) == (list(CLASSES), False, 3)
    with np.load(folder / "predictions.npz") as file:
        assert file["class_names"].tolist() == list(CLASSES) and len(file["names"]) == 9
        assert file["names"][0].startswith("images/a cat/")
        assert np.allclose(file["top_probabilities"].sum(axis=1), 1) and file["top_classes"].shape == (9, 3)
        assert (file["top_classes"][:, 0] == file["predicted"]).all()


def test_an_evaluation_keeps_what_was_predicted_of_each_image(folder, record):
    cfg = runs.compose_root("evaluate", ["device=cpu"])
    cfg.run = str(folder)
    found = evaluate(cfg)
    assert found["accuracy"] == record.accuracy and found["class_names"] == list(CLASSES)
    record = json.loads((folder / "result.json").read_text())
    assert (record["class_names"], record["multi_label"], record["schema_version"]) == (list(CLASSES), False, 3)
    with np.load(folder / "evaluation.npz") as now, np.load(folder / "predictions.npz") as then:
        assert {*now} == {*then} and all((now[name] == then[name]).all() for name in ("predicted", "names", "labels"))


def test_the_command_predicts_what_the_test_did(folder, at, tmp_path):
    out = tmp_path / "out.csv"
    assert command.main([f"run={folder}", f"images={at / 'photos'}", "--out", str(out), "--device", "cpu"]) is None
    with open(out, newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert len(rows) == 48
    (own,) = (path for path in (at / "data" / "own").iterdir() if path.is_dir())
    assert own.is_dir()
    with np.load(folder / "predictions.npz") as tested:
        for name, label, share in zip(tested["names"], tested["predicted"], tested["top_probabilities"], strict=True):
            row = rows[str(at / "photos" / name.removeprefix("images/"))]
            assert row["class"] == CLASSES[label] and float(row["probability"]) == pytest.approx(share[0], abs=1e-5)


def test_images_that_cannot_be_read_are_said_and_skipped(trained, folder, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "odd.png").write_bytes(draw(tmp_path / "x" / "1.png", 0, 99).read_bytes())
    Image.open(tmp_path / "odd.png").resize((501, 37)).save(tmp_path / "odd.png")
    found: list = []
    outcome = predict.predict_files(trained, predict.find_images([str(tmp_path)]), found.append, batch_size=2)
    assert outcome.predicted == len(found) == 2 and list(outcome.skipped) == [str(tmp_path / "bad.jpg")]
    assert "bad.jpg: it is none of" in capsys.readouterr().err
    code = command.main([f"run={folder}", str(tmp_path / "bad.jpg"), str(tmp_path / "odd.png"), "--device=cpu"])
    assert code == command.SOME_SKIPPED and "odd.png,a cat" in capsys.readouterr().out


def test_json_lines_hold_everything(trained, at, tmp_path):
    file = at / "photos" / "dog" / "00.png"
    with predict.output(tmp_path / "o.jsonl") as write:
        predict.predict_files(trained, [file], write, top=2, quiet=True)
    (line,) = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    assert line["file"] == str(file) and line["class"] in CLASSES and len(line["top"]) == 2
    assert line["top"][0] == {"class": line["class"], "probability": line["probability"]}


def test_a_watched_folder_is_predicted_as_it_fills_up(trained, at, tmp_path):
    inbox, out = tmp_path / "inbox", tmp_path / "o.csv"
    inbox.mkdir()
    arriving = {1: "dog/00.png", 3: "a cat/01.png"}
    handled: list[list[str]] = []

    def sleep(_: float) -> None:
        number = len(slept)
        slept.append(number)
        if number in arriving:
            shutil.copy(at / "photos" / arriving[number], inbox / f"{number}.png")

    slept: list[int] = []
    with predict.output(out, append=True) as write:

        def handle(files):
            handled.append([file.name for file in files])
            predict.predict_files(trained, files, write, quiet=True)

        predict.watch(inbox, set(), handle, every_s=1, sleep=sleep, rounds=range(8))
    assert handled == [["1.png"], ["3.png"]]
    assert predict.files_in(out) == {str(inbox / "1.png"), str(inbox / "3.png")}
    with predict.output(out, append=True) as write:
        predict.predict_files(trained, [inbox / "1.png"], write, quiet=True)
    assert out.read_text().count("file,class") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["images=x"], "run=DIR"),
        (["run=x"], "images=DIR"),
        (["run={run}", "images=nowhere/*.jpg"], "no image is there"),
        (["run={run}", "images={run}", "--out", "x.txt"], ".csv or .jsonl"),
        (["run={run}", "images=x.jpg", "--watch"], "one folder"),
        (["run=nowhere", "images={photos}"], "adapter_config.json does not exist"),
        (["run={run}", "images={photos}", "--top", "0"], "at least 1"),
    ],
)
def test_mistakes_are_said_with_the_remedy(words, said, folder, at):
    words = [word.format(run=folder, photos=at / "photos") for word in words]
    with pytest.raises(UserError, match=said.replace("*", r"\*")):
        command.main(words)


def test_a_model_predicts_files_images_and_arrays(folder, at, trained):
    model = load_adapter(folder, "random")
    model.train()
    model.backbone.norm_f.eval()
    path = at / "photos" / "dog" / "03.png"
    with Image.open(path) as opened:
        image = opened.copy()
    pixels = np.asarray(image)
    same = [path, str(path), image, pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1)]
    found = model.predict(same, top=2, batch_size=2)
    assert model.training and not model.backbone.norm_f.training  # as they were
    assert {p.probability for p in found} == {found[0].probability} and {p.class_name for p in found} <= {*CLASSES}
    assert [p.name for p in found] == [str(path), str(path), "2", "3", "4"]
    (one,) = model.predict(path)
    assert one.labels == (one.class_name,) and len(one.top) == 3
    assert one.probability == pytest.approx(found[0].probability, abs=1e-6)
    (batch,) = trained.probabilities([np.asarray(image.resize((32, 32), 3)).transpose(2, 0, 1)])[:, one.label]
    assert float(batch) == pytest.approx(one.probability, abs=2e-2)
    with pytest.raises(UserError, match=r"image 0 .*float32.*model\(images\)"):
        model.predict([np.zeros((8, 8, 3), dtype=np.float32)])
    with pytest.raises(UserError, match="nowhere.png does not exist"):
        model.predict("nowhere.png")


def test_class_names_survive_loading_and_saving(folder, tmp_path):
    load_adapter(folder, "random").save(tmp_path / "copy", {})
    assert load_adapter(tmp_path / "copy", "random").class_names == CLASSES
    config = tmp_path / "copy" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "class_names": ["one"]}))
    with pytest.raises(UserError, match="class_names"):
        load_adapter(tmp_path / "copy", "random")


# Explanations


def test_what_is_covered_matters_where_the_class_is(trained, folder, at, tmp_path, capsys):
    """The class is the brightest quarter of an image: the first class's is the upper left."""
    falls = np.zeros((2, 2))
    for number in range(6):
        image = at / "photos" / "a cat" / f"{number:02}.png"
        falls += explain(trained, image, grid=2, class_name="a cat").importance
    assert falls.argmax() == 0
    words = [f"run={folder}", f"image={image}", "--grid=4", "--device=cpu", "--out", str(tmp_path / "why.png")]
    explain_command.main(words)
    with Image.open(tmp_path / "why.png") as picture:
        assert picture.width > picture.height > 300
    assert "is drawn in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["image={image}", "--class=cow"], "no class of the model; .*dog"),
        (["image={image}", "--grid=99"], "1 to 32"),
        (["image=nowhere.png"], "does not exist"),
        (["image={run}/result.json"], "cannot be used"),
        ([], "image=FILE"),
    ],
)
def test_mistakes_in_asking_for_an_explanation_are_said(more, said, folder, at):
    image = at / "photos" / "dog" / "00.png"
    with pytest.raises(UserError, match=said):
        explain_command.main(
            [f"run={folder}", "--device=cpu", *(word.format(image=image, run=folder) for word in more)]
        )


# Other kinds of image


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_grey_and_multi_channel_images_are_learned(channels, mode, tmp_path):
    photos = tree(tmp_path / "photos", {"a": 12, "b": 12}, mode)
    more = [f"+backbone.in_chans={channels}", "trainer.max_epochs=3", "backbone.weights=random"]
    record = runs.run(overrides(photos, tmp_path, *more))
    assert record is not None and record.num_test == 4
    model = load_adapter(runs.only_run_folder(tmp_path / "runs"), "random")
    assert model.backbone.default_cfg["input_size"][0] == channels
    assert len(model.predict(sorted(photos.glob("*/*.png"))[:3])) == 3


def test_images_with_several_labels_are_learned(tmp_path):
    lines = []
    for number in range(30):
        label = number % 3
        draw(tmp_path / "images" / f"{number}.png", label, number)
        lines.append(f"images/{number}.png,{'abc'[label]}{'|even' if label != 1 else ''}\n")
    (tmp_path / "labels.csv").write_text("path,labels\n" + "".join(lines))
    more = ["dataset.multi_label=true", "trainer.max_epochs=30"]
    record = runs.run(overrides(tmp_path / "labels.csv", tmp_path, *more))
    assert record is not None and record.accuracy > 0.6 and 0 <= record.train_accuracy <= 1
    assert record.multi_label and record.class_names == ["a", "b", "c", "even"]
    folder = runs.only_run_folder(tmp_path / "runs")
    assert "mAP" in (folder / "train.log").read_text()
    (found,) = load_adapter(folder, "random").predict(tmp_path / "images" / "0.png", top=4)
    assert {name for name, _ in found.top} == {"a", "b", "c", "even"}
    with np.load(folder / "predictions.npz") as file:
        assert file["labels"].shape == (6, 4) and file["top_probabilities"].shape == (6, 4)
