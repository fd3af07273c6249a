"""Benchmarks with published splits: labels numbered anew, leaks shown, missing images named, lists of shots."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.own_images import draw

from mambapeft_vision.commands import prepare
from mambapeft_vision.data import TaskDataModule
from mambapeft_vision.data.manifest import read_entry
from mambapeft_vision.data.prepare import published
from mambapeft_vision.data.prepare.published import FEW_SHOT, FGVC, SEEDS, SHOTS, prepare_few_shot, prepare_fgvc
from mambapeft_vision.utils.errors import UserError

TINY = replace(FGVC["cars"], num_classes=3, counts={"train": (6,), "val": (3,), "test": (3,)})
OLD = (7, 9, 12)  # labels with gaps
NAMES = ("Audi", "BMW", "Fiat")


def lists_of(folder: Path, leak: int = 0) -> tuple[Path, Path]:
    """VPT's files and images: 2 + 1 + 1 of each class; `leak` of the images of val are those of train."""
    splits: dict[str, dict[str, int]] = {"train": {}, "val": {}, "test": {}}
    for label, name in enumerate(NAMES):
        for number, split in enumerate(("train", "train", "val", "test")):
            draw(folder / "images" / name / f"{number}.png", label, number)
            splits[split][f"{name}/{number}.png"] = OLD[label]
    for name in NAMES[:leak]:
        splits["val"][f"{name}/0.png"] = splits["val"].pop(f"{name}/2.png") and OLD[NAMES.index(name)]
    (folder / "lists").mkdir()
    for split, labels in splits.items():
        (folder / "lists" / f"{split}.json").write_text(json.dumps(labels))
    return folder / "lists", folder / "images"


def test_fgvc_becomes_a_task_with_labels_from_zero(tmp_path):
    notes = prepare_fgvc(TINY, *lists_of(tmp_path), tmp_path / "data" / "cars")
    assert any("labels 7 … 12 were numbered anew" in note for note in notes)
    data = TaskDataModule(name="fgvc/cars", folder=tmp_path / "data" / "cars", num_classes=3, num_test=3)
    data.check()
    assert data.class_names == NAMES
    assert (data.folder / "train800.txt").read_text().split("\n")[0] == "images/Audi/0.png 0"
    assert len((data.folder / "train800val200.txt").read_text().splitlines()) == 9
    entry = read_entry(tmp_path / "data", "cars")
    assert entry is not None and entry.decoded and data.manifest_hash == data.fingerprint(check_images=True)


def test_images_in_two_splits_are_shown(tmp_path):
    notes = prepare_fgvc(TINY, *lists_of(tmp_path, leak=2), tmp_path / "cars")
    assert any("2 of 3 images of val are in train too, such as 'Audi/0.png'" in note for note in notes)
    assert (tmp_path / "cars" / "train800val200.txt").read_text().count("Audi/0.png") == 1


def test_missing_images_and_other_numbers_are_refused(tmp_path):
    lists, images = lists_of(tmp_path)
    (images / "BMW" / "3.png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 12 images: 'BMW/3.png'.*six digits"):
        prepare_fgvc(TINY, lists, images, tmp_path / "cars")
    with pytest.raises(UserError, match=r"train 6 \(expected 7,329 or 8,144\)"):
        prepare_fgvc(FGVC["cars"], lists, images, tmp_path / "cars")
    with pytest.raises(UserError, match=r"has 3 classes: expected 4"):
        prepare_fgvc(replace(TINY, num_classes=4), lists, images, tmp_path / "cars")
    (lists / "val.json").write_text('["a"]')
    with pytest.raises(UserError, match=r"val\.json is no list of labels"):
        prepare_fgvc(TINY, lists, images, tmp_path / "cars")
    assert not (tmp_path / "cars").exists()


def few_lists(folder: Path, classes: int = 2, repeat: int = 1) -> tuple[Path, Path]:
    lists = folder / "annotations"
    lists.mkdir(parents=True)
    for label in range(classes):
        for number in range(18):
            draw(folder / "images" / f"{label}_{number}.png", label, number)
    for shots in SHOTS:
        for seed in SEEDS:
            lines = [f"{label}_{number}.png {label}\n" * repeat for label in range(classes) for number in range(shots)]
            (lists / f"train_meta.list.num_shot_{shots}.seed_{seed}").write_text("".join(lines))
    for name, number in (("val", 16), ("test", 17)):
        text = "".join(f"{label}_{number}.png {label}\n" for label in range(classes))
        (lists / f"{name}_meta.list").write_text(text)
    return lists, folder / "images"


def test_few_shot_lists_become_splits(tmp_path):
    task = replace(FEW_SHOT["pets"], num_classes=2)
    notes = prepare_few_shot(task, *few_lists(tmp_path, repeat=2), tmp_path / "data" / "pets")
    assert any("num_shot_4.seed_1 names 8 images a second time" in note for note in notes)
    data = TaskDataModule(
        name="fewshot/pets", folder=tmp_path / "data" / "pets", num_classes=2, train_split="shots4_seed1"
    )
    data.check()
    assert len(data.listings["shots4_seed1"]) == 8 and not data.manifest_hash.startswith("unverified")
    assert data.manifest_hash == data.fingerprint(check_images=True)


def test_a_list_with_another_number_of_shots_is_noted(tmp_path):
    lists, images = few_lists(tmp_path)
    with open(lists / "train_meta.list.num_shot_1.seed_0", "a") as file:
        file.write("0_1.png 0\n")
    task = replace(FEW_SHOT["pets"], num_classes=2)
    assert any(
        "shots1_seed0 has not 1 images of 1 classes" in n for n in prepare_few_shot(task, lists, images, tmp_path / "p")
    )
    with open(lists / "test_meta.list", "a") as file:
        file.write("0_1.png 5\n")
    with pytest.raises(UserError, match=r"test_meta\.list:3: '0_1\.png 5'; expected a path and a label of 0 to 1"):
        prepare_few_shot(task, lists, images, tmp_path / "q")


def test_the_command_says_how_to_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(published.FGVC, "cars", TINY)
    lists, images = lists_of(tmp_path)
    words = ["fgvc", "cars", "--lists", str(lists), "--images", str(images), "--root", str(tmp_path / "data")]
    prepare.main(words)
    assert f"mambapeft train dataset=fgvc/cars dataset.folder={tmp_path}/data/cars" in capsys.readouterr().out
