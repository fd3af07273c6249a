"""The reference of keys: every key of every schema has a type, a default and a meaning."""

import dataclasses

import pytest

from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.run.config_reference import SCHEMAS, meanings, reference


@pytest.mark.parametrize("root", SCHEMAS)
def test_every_key_has_a_meaning(root):
    keys = {key.name: key for key in reference(root)}
    assert {field.name for field in dataclasses.fields(SCHEMAS[root])} <= keys.keys()
    assert all(key.meaning and key.kind for key in keys.values())


def test_keys_show_what_a_command_line_takes():
    keys = {key.name: key for key in reference()}
    assert keys["trainer.betas"].default == "[0.9, 0.999]" and keys["trainer.betas"].kind == "list of float"
    assert keys["trainer.clip_norm"].kind == "float or null" and keys["trainer.cuda_graph"].default == "true"
    assert keys["paths.cache"].default == "${paths.data}/cache" and keys["method"].kind == "section"
    assert {f"trainer.{field.name}" for field in dataclasses.fields(TrainerConfig)} <= keys.keys()
    pretraining = {key.name: key for key in reference("pretrain")}
    assert pretraining["sources.NAME.flip"].default == "0.5" and not pretraining["sources.NAME.path"].default


def test_a_docstring_says_one_thing_a_key():
    class Schema:
        """Things.

        Args:
            one: the first,
                in two lines.
            two, three: both.

        Raises: nothing.
        """

    assert meanings(Schema) == {"one": "the first, in two lines.", "two": "both.", "three": "both."}
