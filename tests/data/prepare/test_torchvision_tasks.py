"""Tasks from torchvision's downloads: stand-ins for its classes, everything else as it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from mambapeft_vision.commands import prepare_mini
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.manifest import read_entry
from mambapeft_vision.data.prepare import torchvision_tasks as fetched_module
from mambapeft_vision.data.prepare.torchvision_tasks import FETCHED, fetch_task
from mambapeft_vision.utils.errors import UserError


class StandIn:
    """Like torchvision's: (image, label) by index. The image's grey is its number, so that images can be told apart."""

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        assert download
        Path(root).mkdir(parents=True, exist_ok=True)
        self._numbers = range(0, 1500) if train else range(1500, 1600)

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError
        number = self._numbers[index]
        pixels = np.array([[number // 256, number % 256]], np.uint8)
        return Image.fromarray(pixels), number % 10


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    """Fifty instead of thousands."""
    monkeypatch.setattr(fetched_module, "MOST_TEST", 50)
    for name, row in FETCHED.items():
        monkeypatch.setitem(FETCHED, name, replace(row, task=replace(row.task, num_test=50)))


def numbers_of(folder, split):
    entries = read_list(folder / f"{split}.txt", 10, remedy="").entries
    found = [(np.asarray(Image.open(folder / entry.path))[0].astype(int), entry.label) for entry in entries]
    assert all((256 * a + b) % 10 == label for (a, b), label in found)
    return [256 * a + b for (a, b), _ in found]


def test_a_download_becomes_a_task(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "USPS", StandIn)
    report = fetch_task(FETCHED["usps"], tmp_path / "mini", tmp_path / "downloads")
    folder = tmp_path / "mini" / "usps"
    train, val, test = (numbers_of(folder, split) for split in ("train800", "val200", "test"))
    assert (len(train), len(val), len(test)) == (800, 200, 50)
    assert len({*train, *val}) == 1000 and max(*train, *val) < 1500 and len(set(test)) == 50 and min(test) >= 1500
    assert report.entry == read_entry(tmp_path / "mini", "usps")


def test_large_images_are_shrunk_in_shape(tmp_path, monkeypatch):
    class Large(StandIn):
        def __getitem__(self, index):
            return Image.new("RGB", (300, 150)), super().__getitem__(index)[1]

    monkeypatch.setattr(torchvision.datasets, "USPS", Large)
    fetch_task(FETCHED["usps"], tmp_path, tmp_path / "downloads")
    assert {Image.open(file).size for file in (tmp_path / "usps" / "images" / "test").iterdir()} == {(128, 64)}


def test_without_a_test_part_test_images_are_others(tmp_path, monkeypatch):
    class Whole(StandIn):
        def __init__(self, root, transform=None, target_transform=None, download=False):
            super().__init__(root, download=download)

    monkeypatch.setattr(torchvision.datasets, "EuroSAT", Whole)
    fetch_task(FETCHED["eurosat"], tmp_path, tmp_path / "downloads")
    splits = [numbers_of(tmp_path / "eurosat", split) for split in ("train800", "val200", "test")]
    assert len({number for split in splits for number in split}) == 1050


def test_every_row_names_a_class_that_takes_its_arguments(tmp_path, monkeypatch):
    """Up to the download, torchvision's own classes run; a wrong argument would be a TypeError."""
    import socket

    def offline(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    for name, fetched in FETCHED.items():
        with pytest.raises(UserError, match=f"mini/{name}: .* cannot be downloaded"):
            fetch_task(fetched, tmp_path / "mini", tmp_path / "downloads")
        assert not (tmp_path / "mini" / name).exists()


def test_offline_the_command_says_so_and_the_rest_is_laid_out(tmp_path, monkeypatch, capsys):
    class Offline:
        def __init__(self, **_):
            raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", Offline)
    monkeypatch.setattr(torchvision.datasets, "USPS", StandIn)
    command = ["fetch", "fashion", "usps", "--out", str(tmp_path / "mini"), "--downloads", str(tmp_path / "downloads")]
    with pytest.raises(UserError) as offline:
        prepare_mini.main(command)
    assert "mini/usps: natural, 10 classes, 800 + 200 to train, 50 to test" in capsys.readouterr().out
    for words in ("mini/fashion", "connection to the internet", "import PATH --name fashion"):
        assert words in str(offline.value)
    with pytest.raises(UserError, match="mini/fashion"):
        prepare_mini.main(command)
    assert "mini/usps: laid out before" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"Unknown tasks \['mnist'\]"):
        prepare_mini.main(["fetch", "mnist", "--out", str(tmp_path)])


def test_labels_that_do_not_fit_the_table_are_refused(tmp_path, monkeypatch):
    class Eleven(StandIn):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], index % 11

    monkeypatch.setattr(torchvision.datasets, "KMNIST", Eleven)
    with pytest.raises(UserError, match="labels .* run from 0 to 10; expected 0 to 9"):
        fetch_task(FETCHED["kmnist"], tmp_path, tmp_path / "downloads")
