"""A method author's path: one file and one yaml in folders of one's own, and it passes the whole matrix."""

import inspect
import textwrap

import pytest
import test_matrix as matrix
from helpers import method_cases
from hydra import compose, initialize_config_dir

import mambapeft_vision.methods
from mambapeft_vision.adapter.presets import read_preset
from mambapeft_vision.methods import add_methods_folder
from mambapeft_vision.run.config import register_schemas

CODE = '''
"""Row-scaling: W' = diag(1 + s) W."""

import torch
from torch import nn

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.targets import frozen_weight, match_parameters, weight_port


class RowScale(Method):
    """W' = diag(1 + s) W, s starts at zero."""

    def __init__(self, *, targets: str | list[str], **multipliers: float) -> None:
        super().__init__(**multipliers)
        self.targets = targets
        self.sites = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for parameter in match_parameters(model, self.targets, self.name):
            site = Rows(frozen_weight(model, parameter))
            self.sites[site_key(parameter)] = site
            weight_port(model, parameter).add(self.name, site)


class Rows(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(weight.new_zeros(weight.shape[0]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.scale[:, None] * weight
'''
YAML = """\
# Row-scaling of out_proj: one factor for each output.
# W' = diag(1 + s) W; s starts at zero.
# count: 9,216
# paper: none
# run: mambapeft train method=row_scale dataset=vtab/cifar paths.methods=... --config-dir ...
row_scale:
  _target_: mambapeft_vision.methods.row_scale.RowScale
  targets: out_proj
  lr_mult: 2.0
"""


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The preset `row_scale`, found through folders outside the project."""
    (tmp_path / "code").mkdir()
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "code" / "row_scale.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "configs" / "method" / "row_scale.yaml").write_text(YAML)
    monkeypatch.setattr(mambapeft_vision.methods, "__path__", list(mambapeft_vision.methods.__path__))
    add_methods_folder(tmp_path / "code")
    preset = read_preset(tmp_path / "configs" / "method" / "row_scale.yaml")
    monkeypatch.setitem(method_cases.PRESETS, "row_scale", preset)
    return tmp_path


@pytest.mark.parametrize("row", [("row_scale",), ("row_scale", "lora_out_proj", "affix")], ids=method_cases.row_name)
@pytest.mark.parametrize("test", [name for name in vars(matrix) if name.startswith("test_")])
def test_an_added_method_passes_the_whole_matrix(added, test, row, tmp_path):
    test = getattr(matrix, test)
    parameters = inspect.signature(test).parameters
    for precision in ("fp32", "bf16") if "precision" in parameters else (None,):
        values = {"row": row, "name": "row_scale", "tmp_path": tmp_path, "precision": precision}
        test(**{parameter: values[parameter] for parameter in parameters})


def test_its_yaml_is_found_through_hydras_search_path(added):
    register_schemas()
    search = f"hydra.searchpath=[file://{added / 'configs'}]"
    with initialize_config_dir(str(method_cases.CONFIGS), version_base=None):
        config = compose("train", overrides=[search, "method=[row_scale,affix]"])
    assert set(config.method) == {"row_scale", "affix"}
    assert config.method.row_scale.lr_mult == 2.0
