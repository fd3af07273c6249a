"""TaskDataModule: what load checks, which batches come in which order, and going on where a run was killed."""

import os
import warnings

import lightning.pytorch as pl
import pytest
import torch

from mambapeft_vision.data import TaskDataModule, module
from mambapeft_vision.data.loaders import epoch_order
from mambapeft_vision.data.manifest import write_entry
from mambapeft_vision.data.prepare.verify import verify_task
from mambapeft_vision.utils.errors import UserError


def make(folder, **changes) -> TaskDataModule:
    arguments = {"name": "custom/toy", "num_classes": 3, "group": "custom", "num_test": 4, "num_workers": 0}
    return TaskDataModule(folder=folder, **arguments | {"batch_size": 3, "test_batch_size": 3, "seed": 7} | changes)


class Trainer:
    """All the data module asks of a trainer."""

    def __init__(self, current_epoch, rank=0, ranks=1):
        self.current_epoch, self.global_rank, self.world_size = current_epoch, rank, ranks


# Order


def test_epoch_order_is_a_permutation_decided_by_seed_and_epoch():
    order = epoch_order(1000, seed=3, epoch=5)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(1000))
    assert torch.equal(order, epoch_order(1000, seed=3, epoch=5))
    for seed, epoch in [(3, 6), (4, 5), (5, 3)]:
        assert not torch.equal(order, epoch_order(1000, seed, epoch))


def test_epoch_order_never_changes():
    """Results of earlier versions of this project can only be repeated in the same order."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [5, 3, 2, 9, 7, 4, 0, 6, 8, 1]
    assert epoch_order(10, seed=1, epoch=99).tolist() == [1, 3, 9, 8, 5, 7, 0, 4, 6, 2]


def test_epoch_order_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch_order(10, 0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_is_its_order_in_batches_with_the_last_partial_one(toy_folder, preprocessing):
    data = make(toy_folder)
    data.load(preprocessing)
    data.trainer = Trainer(current_epoch=2)
    batches = list(data.train_dataloader())
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert len(data.train_dataloader()) == data.steps_per_epoch == 3
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = data.epoch_order(2)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images, data.train_set.images[order]) and torch.equal(labels, data.train_set.labels[order])


def test_ranks_share_every_batch(toy_folder, preprocessing):
    data = make(toy_folder)
    data.load(preprocessing)
    parts = []
    for rank in range(2):
        data.trainer = Trainer(0, rank, 2)
        parts.append([labels for _, labels in data.train_dataloader()])
    together = torch.cat([torch.cat(pair) for pair in zip(*parts, strict=True)])
    assert torch.equal(together, data.train_set.labels[data.epoch_order(0)])
    assert all(0 <= len(first) - len(second) <= 1 for first, second in zip(*parts))


def test_each_pass_follows_the_trainers_epoch(toy_folder, preprocessing):
    data = make(toy_folder)
    data.load(preprocessing)
    data.trainer = Trainer(0)
    loader = data.train_dataloader()
    for epoch in (0, 1, 1):
        data.trainer.current_epoch = epoch
        images = torch.cat([images for images, _ in loader])
        assert torch.equal(images, data.train_set.images[data.epoch_order(epoch)])


def test_a_pass_that_was_broken_off_does_not_shorten_the_next(toy_folder, preprocessing):
    data = make(toy_folder)
    data.load(preprocessing)
    data.trainer = Trainer(0)
    loader = data.train_dataloader()
    next(iter(loader))
    assert len(list(loader)) == 3


def test_a_loop_without_a_trainer_is_told_what_to_do(toy_folder, preprocessing):
    data = make(toy_folder)
    data.load(preprocessing)
    with pytest.raises(RuntimeError, match="epoch_order"):
        next(iter(data.train_dataloader()))


# Resuming with Lightning


class Recorder(pl.LightningModule):
    """Remembers the batches it saw; may stop the run after some step as a kill would."""

    def __init__(self, die_after_step=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.die_after_step = die_after_step
        self.seen = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.current_epoch, batch_idx, images.sum().item(), labels.tolist()))
        return self.weight * 1.0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == self.die_after_step:
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEveryEpoch(pl.Callback):
    def __init__(self, file):
        self.file = file

    def on_train_epoch_end(self, trainer, *args):
        trainer.save_checkpoint(self.file)


def fit(folder, preprocessing, model, file, resume_from=None):
    data = make(folder)
    data.load(preprocessing)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SaveEveryEpoch(file)],
    )
    trainer.fit(model, datamodule=data, ckpt_path=resume_from)


@pytest.mark.parametrize("step", [4, 7])
def test_a_killed_run_sees_the_same_batches_as_an_uninterrupted_one(tmp_path, toy_folder, preprocessing, step):
    whole, killed, resumed = Recorder(), Recorder(die_after_step=step), Recorder()
    fit(toy_folder, preprocessing, whole, tmp_path / "whole.ckpt")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(toy_folder, preprocessing, killed, tmp_path / "killed.ckpt")
    fit(toy_folder, preprocessing, resumed, tmp_path / "resumed.ckpt", resume_from=tmp_path / "killed.ckpt")
    assert [entry[:2] for entry in whole.seen] == [(epoch, batch) for epoch in range(3) for batch in range(3)]
    assert len(killed.seen) == step
    assert killed.seen[: 3 * (step // 3)] + resumed.seen == whole.seen


# Testing


def test_a_small_test_split_comes_in_list_order_and_is_decoded_once(toy_folder, preprocessing, monkeypatch):
    data = make(toy_folder)
    data.load(preprocessing)
    batches = list(data.test_dataloader())
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [0]]
    monkeypatch.setattr(module, "cached_list", None)
    again = list(data.test_dataloader())
    assert all(torch.equal(first[0], second[0]) for first, second in zip(batches, again, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_large_test_split_gives_the_same_batches_from_any_number_of_workers(
    toy_folder, preprocessing, monkeypatch, workers
):
    data = make(toy_folder, num_workers=workers)
    data.load(preprocessing)
    in_memory = list(data.test_dataloader())
    monkeypatch.setattr(module, "KEEP_IN_MEMORY", 3)
    decoded = data.test_dataloader()
    assert len(decoded) == 2
    for (images, labels), (expected_images, expected_labels) in zip(decoded, in_memory, strict=True):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_of_a_large_test_split_names_file_and_line_without_a_workers_traceback(
    toy_folder, preprocessing, monkeypatch, workers
):
    monkeypatch.setattr(module, "KEEP_IN_MEMORY", 3)
    image = toy_folder / "images/test/000003.jpg"
    image.write_bytes(image.read_bytes()[:-60])
    data = make(toy_folder, num_workers=workers)
    data.load(preprocessing)
    with pytest.raises(UserError) as error:
        list(data.test_dataloader())
    assert str(error.value).startswith(f"{toy_folder / 'test.txt'}:4: {image}: cannot decode the image")
    assert "Traceback" not in str(error.value)


def test_other_splits_can_be_chosen(toy_folder, preprocessing):
    data = make(toy_folder, train_split="train800", test_split="val200")
    data.load(preprocessing)
    assert len(data.train_set) == 5
    assert data.train_set.names[0].startswith("images/train800/")
    assert [labels.tolist() for _, labels in data.test_dataloader()] == [[0, 1]]


def test_loading_again_decodes_only_for_another_size(toy_folder, preprocessing, monkeypatch):
    data = make(toy_folder)
    data.load(preprocessing)
    data.test_dataloader()
    data.load(type(preprocessing)((4, 4), "bicubic", (0, 0, 0), (1, 1, 1)))
    assert data.train_set.images.shape[2:] == (4, 4)
    assert next(iter(data.test_dataloader()))[0].shape[2:] == (4, 4)
    monkeypatch.setattr(module, "cached_list", None)
    data.load(type(preprocessing)((4, 4), "bicubic", (0, 0, 0), (1, 1, 1)))


def test_the_train_set_can_be_moved(toy_folder, preprocessing):
    data = make(toy_folder)
    data.load(preprocessing)
    data.train_set = data.train_set.to("meta")
    data.trainer = Trainer(0)
    assert next(iter(data.train_dataloader()))[0].device.type == "meta"


# Errors before training


@pytest.mark.parametrize("use", ["train_set", "steps_per_epoch", "manifest_hash", "test_dataloader"])
def test_use_before_load_says_so(toy_folder, use):
    with pytest.raises(UserError, match=r"call load\(preprocessing\) first"):
        getattr(make(toy_folder), use)()


def test_missing_vtab_data_names_the_path_and_the_command(tmp_path, preprocessing):
    data = make(tmp_path / "vtab-1k" / "cifar", name="vtab/cifar", num_classes=100, num_test=10_000, group="natural")
    with pytest.raises(UserError) as error:
        data.load(preprocessing)
    assert f"{tmp_path / 'vtab-1k' / 'cifar'} is missing" in str(error.value)
    assert f"Run `mambapeft prepare vtab1k --root {tmp_path / 'vtab-1k'}`" in str(error.value)


def test_damaged_vtab_data_is_to_be_deleted_first_since_the_command_leaves_what_is_there(toy_folder, preprocessing):
    (toy_folder / "test.txt").unlink()
    with pytest.raises(UserError) as error:
        make(toy_folder, name="vtab/kitti", num_classes=4, train_split="val200").load(preprocessing)
    assert f"Delete {toy_folder} and run `mambapeft prepare vtab1k --root {toy_folder.parent}`" in str(error.value)


def test_a_vtab_task_with_too_few_images_fails(toy_folder, preprocessing):
    data = make(toy_folder, name="vtab/kitti", num_classes=4)
    with pytest.raises(UserError, match="lists 7 images: expected 1,000 for vtab/kitti"):
        data.load(preprocessing)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "test.txt").unlink(), "test.txt is missing"),
        (
            lambda folder: (folder / "images/test/000002.jpg").unlink(),
            r"test.txt:3: .*does not exist \(1 of 4 do not\)",
        ),
        (lambda folder: (folder / "test.txt").write_text("images/test/000000.jpg 0\n"), "lists 1 images: expected 4"),
        (lambda folder: (folder / "test.txt").write_text("images/test/000000.jpg 5\n"), "test.txt:1: label 5"),
        (lambda folder: (folder / "train800val200.txt").unlink(), "train800val200.txt is missing"),
        (
            lambda folder: (folder / "images/train800val200/000006.jpg").write_bytes(b""),
            "train800val200.txt:7: .*decode",
        ),
    ],
)
def test_load_finds_damage_in_either_split(toy_folder, preprocessing, damage, reason):
    damage(toy_folder)
    with pytest.raises(UserError, match=reason):
        make(toy_folder).load(preprocessing)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group": "nature"}, "dataset.group='nature': expected one of natural"),
        ({"num_classes": 1}, "dataset.num_classes=1: expected a whole number of at least 2"),
        ({"batch_size": 0}, "dataset.batch_size=0"),
        ({"test_batch_size": 0}, "dataset.test_batch_size=0"),
        ({"num_workers": -1}, "dataset.num_workers=-1"),
    ],
)
def test_impossible_arguments_are_errors(tmp_path, change, reason):
    with pytest.raises(UserError, match=reason):
        make(tmp_path, **change)


# Fingerprint


def test_the_fingerprint_is_the_manifests_once_verified_and_marked_before(toy_folder, toy, preprocessing):
    data = make(toy_folder)
    data.load(preprocessing)
    assert data.manifest_hash.startswith("unverified:")
    record = verify_task(toy, toy_folder).entry
    write_entry(toy_folder.parent, "toy", record)
    data = make(toy_folder)
    data.load(preprocessing)
    assert data.manifest_hash == record.sha256


def test_the_fingerprint_is_unverified_when_a_list_changed_after_verification(toy_folder, toy, preprocessing):
    write_entry(toy_folder.parent, "toy", verify_task(toy, toy_folder).entry)
    file = toy_folder / "train800val200.txt"
    file.write_text(file.read_text().replace("000000.jpg 0", "000000.jpg 1"))
    data = make(toy_folder)
    data.load(preprocessing)
    assert data.manifest_hash.startswith("unverified:")


def test_a_manifest_that_came_with_other_images_is_no_evidence(toy_folder, toy, preprocessing):
    entry = verify_task(toy, toy_folder).entry
    write_entry(toy_folder.parent, "toy", entry)
    data = make(toy_folder)
    data.check()
    assert data.fingerprint() == data.fingerprint(check_images=True) == entry.sha256
    image = toy_folder / "images/test/000001.jpg"
    image.write_bytes((toy_folder / "images/test/000002.jpg").read_bytes())
    assert data.fingerprint(check_images=True).startswith("changed:")


def test_a_list_that_is_not_the_verified_one_is_told_of(toy_folder, toy, capsys):
    write_entry(toy_folder.parent, "toy", verify_task(toy, toy_folder).entry)
    file = toy_folder / "test.txt"
    file.write_text(file.read_text().replace("000000.jpg 0", "000000.jpg 1"))
    data = make(toy_folder)
    data.check()
    with warnings.catch_warnings():  # as with PYTHONWARNINGS=error
        warnings.simplefilter("error")
        assert data.fingerprint().startswith("unverified:")
    assert "test.txt: not as verified in" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"test\.txt: not as verified in .*manifest\.json"):
        assert data.manifest_hash.startswith("unverified:")


def test_an_evaluation_needs_the_test_split_alone_and_lays_nothing_out(toy_folder, preprocessing, monkeypatch):
    (toy_folder / "train800val200.txt").unlink()
    data = make(toy_folder)
    monkeypatch.setattr(data, "lay_out", lambda: pytest.fail("laid out"))
    data.load_test(preprocessing)
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 4
    with pytest.raises(UserError, match="not loaded"):
        _ = data.train_set


def test_a_config_starts_no_more_processes_than_there_are_cpus(toy_folder):
    assert make(toy_folder, num_workers=10_000).num_workers <= (os.cpu_count() or 1)


def test_what_makes_an_accuracy_mean_something_else_is_told_of(toy_folder):
    data = make(toy_folder)
    data.check()
    assert data.notes == []
    train, test = toy_folder / "train800val200.txt", toy_folder / "test.txt"
    lines = train.read_text().splitlines(keepends=True)
    unseen = lines[0].split()[1]
    train.write_text("".join(line for line in lines if line.split()[1] != unseen))
    data.check()
    assert data.notes == [f"1 classes of the test images have no training image: {unseen}."]
    train.write_text("".join(lines))
    test.write_text("".join([*test.read_text().splitlines(keepends=True)[1:], lines[0]]))
    data.check()
    assert data.notes == [f"1 of the 4 test images are training images too, such as {lines[0].split()[0]}."]
    data.check(test_only=True)
    assert data.notes == []
