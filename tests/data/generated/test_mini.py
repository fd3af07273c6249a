"""The mini tasks: their configs, the drawings, and laying them out."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import yaml

from mambapeft_vision.data import Preprocessing
from mambapeft_vision.data.generated import dsprites, mini
from mambapeft_vision.data.generated import solids as scenes
from mambapeft_vision.data.generated.mini import GENERATED, IMPORTED, MiniDataModule
from mambapeft_vision.data.manifest import MANIFEST_FILE, read_entry
from mambapeft_vision.data.prepare.importer import lay_out_task
from mambapeft_vision.data.prepare.torchvision_tasks import FETCHED
from mambapeft_vision.utils.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs" / "dataset" / "mini"
TASKS = IMPORTED | GENERATED | {name: fetched.task for name, fetched in FETCHED.items()}


def test_there_is_one_config_per_task():
    assert sorted(TASKS) == sorted(file.stem for file in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", TASKS)
def test_a_config_says_what_the_table_says(name):
    config, task = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), TASKS[name]
    assert (config["name"], config["num_classes"], config["group"]) == (task.name, task.num_classes, task.group)
    assert (config["num_test"], config["folder"]) == (task.num_test, f"${{paths.data}}/mini/{name}")


# Sprites


def test_sprites_are_those_of_the_published_file():
    """The hash is of the same 2,000 images taken from dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz."""
    drawn = hashlib.sha256()
    for factors in dsprites.sample(2000, mini.SPRITES_SEED):
        drawn.update(np.packbits(dsprites.draw(*factors) > 0).tobytes())
    assert drawn.hexdigest() == "52612e1a649cdba62ecc1e80018b84e58a1a8cb004c395a5c3f38a6200511469"


def test_sprites_turn_and_move_as_their_factors_say():
    # The heart's halves mirror each other when it is upright and in the middle, and its tip points down.
    heart = dsprites.fill(*(256 * 32 + 256 * dsprites.heart()).round().astype(int)) > 0
    np.testing.assert_array_equal(heart, heart[:, ::-1])
    assert heart[:31].sum() > heart[31:].sum() > 0
    np.testing.assert_array_equal(dsprites.draw(2, 5, 0, 16, 16), dsprites.draw(2, 5, 39, 16, 16))
    for shape in range(3):
        centres = [np.nonzero(dsprites.draw(shape, 3, 5, x, 9))[1].mean() for x in (0, 31)]
        assert centres[1] - centres[0] == pytest.approx(32, abs=0.5)
    # The ellipse is longer than high; a quarter of a turn later it is higher than long.
    upright, turned = (np.nonzero(dsprites.draw(1, 5, orientation, 16, 16)) for orientation in (0, 10))
    assert np.ptp(upright[1]) > np.ptp(upright[0]) and np.ptp(turned[1]) < np.ptp(turned[0])


def test_sprite_labels_are_sixteen_even_bins():
    factors = np.array([(0, 0, o, x, 0) for o, x in [(0, 0), (2, 1), (3, 2), (39, 31)]])
    assert dsprites.location_labels(factors).tolist() == [0, 0, 1, 15]
    assert dsprites.orientation_labels(factors).tolist() == [0, 0, 1, 15]


def test_sampled_sprites_differ():
    factors = dsprites.sample(500, 0)
    assert len(np.unique(factors, axis=0)) == 500 and (factors.max(0) < dsprites.FACTORS).all()


# Scenes


def test_a_scene_shows_every_solid_in_its_colour():
    one = scenes.Solid("sphere", 0.6, 0.0, 0.0, 0.0, 1)
    for kind in ("sphere", "cube", "cylinder"):
        image = scenes.render([scenes.Solid(kind, 0.6, 0.0, 0.0, 0.3, 1)]).astype(int)
        red = (image[..., 0] > 2 * image[..., 1]).sum()
        assert 100 < red < 600, kind
    near, far = (scenes.render([scenes.Solid("sphere", 0.6, 0.0, y, 0.0, 1)]).astype(int) for y in (-2, 2))
    assert (near[..., 0] > 2 * near[..., 1]).sum() > 1.5 * (far[..., 0] > 2 * far[..., 1]).sum()
    hidden = scenes.Solid("sphere", 0.35, 0.0, 1.6, 0.0, 2)
    blue = (scenes.render([one, hidden]).astype(int)[..., 2] > 100).sum()
    assert blue < (scenes.render([hidden]).astype(int)[..., 2] > 100).sum()


def test_labels_of_scenes_are_what_is_in_them():
    sampled = scenes.sample(300, 0)
    assert {scenes.count_label(scene) for scene in sampled} == set(range(8))
    assert set(np.unique([scenes.distance_label(scene) for scene in sampled])) == set(range(6))
    for scene in sampled:
        centres = np.array([(solid.x, solid.y) for solid in scene])
        apart = np.linalg.norm(centres[:, None] - centres, axis=2)[~np.eye(len(scene), dtype=bool)]
        assert apart.min() > 2 * 0.35
    assert scenes.sample(3, 0) == scenes.sample(3, 0) != scenes.sample(3, 1)


# Laying out


@pytest.fixture
def small(monkeypatch):
    """The location task with few images."""
    task = mini.Task("sprites_loc", "structured", 16, 4, num_train=5, num_val=2, family="mini")
    monkeypatch.setitem(mini.GENERATED, "sprites_loc", task)
    return task


def make(folder) -> MiniDataModule:
    return MiniDataModule(name="mini/sprites_loc", folder=folder, num_classes=16, group="structured", num_test=4)


PREPROCESSING = Preprocessing((8, 8), "bicubic", (0, 0, 0), (1, 1, 1))


def test_a_generated_task_is_laid_out_at_first_use_and_always_the_same(small, tmp_path, monkeypatch):
    first = make(tmp_path / "a" / "sprites_loc")
    first.load(PREPROCESSING)
    assert len(first.train_set) == 7 and sum(len(labels) for _, labels in first.test_dataloader()) == 4
    second = make(tmp_path / "b" / "sprites_loc")
    second.load(PREPROCESSING)
    assert first.manifest_hash == second.manifest_hash and not first.manifest_hash.startswith("unverified")
    monkeypatch.setattr(mini, "draw_splits", None)
    make(tmp_path / "a" / "sprites_loc").load(PREPROCESSING)


def test_a_generated_task_is_there_when_a_run_checks_it(small, tmp_path):
    """Runs check a task before anything else, before they load it."""
    make(tmp_path / "sprites_loc").check()
    assert (tmp_path / "sprites_loc" / "test.txt").is_file()


def test_a_kill_before_the_manifest_is_made_good_the_next_time(small, tmp_path):
    folder = tmp_path / "sprites_loc"
    make(folder).load(PREPROCESSING)
    record = read_entry(tmp_path, "sprites_loc")
    (tmp_path / MANIFEST_FILE).unlink()
    make(folder).load(PREPROCESSING)
    assert read_entry(tmp_path, "sprites_loc") == record


def test_of_two_processes_the_second_takes_the_folder_of_the_first(small, tmp_path, monkeypatch):
    folder = tmp_path / "sprites_loc"

    def overtaken(*arguments):
        lay_out_task(*arguments)
        raise OSError("Directory not empty")

    monkeypatch.setattr(mini, "lay_out_task", overtaken)
    make(folder).load(PREPROCESSING)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".sprites_loc.verified.json",
        MANIFEST_FILE,
        "sprites_loc",
    ]


def test_an_absent_imported_task_names_the_command(tmp_path):
    data = MiniDataModule(name="mini/usps", folder=tmp_path / "usps", num_classes=10, group="natural")
    with pytest.raises(UserError, match=r"mambapeft prepare mini import PATH --name usps"):
        data.load(PREPROCESSING)
