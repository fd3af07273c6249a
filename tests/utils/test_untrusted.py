"""Readers of files of others: what they give for good files, and that nothing but UserError comes of any other."""

import io
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.untrusted import parse_json, parse_yaml, read_arrays, read_bytes, read_json, read_yaml

bounded = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
TEXTS = st.text(st.characters(exclude_characters="$", exclude_categories=("Cs", "Cc")), max_size=8)
# PyYAML leaves them without quotes, and people mean numbers by them.
NO_NUMBERS = TEXTS.filter(lambda text: not re.search(r"\d\.?[eE]", text))


def values(texts: st.SearchStrategy[str]) -> st.SearchStrategy:
    return st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**12), 10**12)
        | st.floats(allow_nan=False, allow_infinity=False)
        | texts,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text("abc_", min_size=1, max_size=5), inner, max_size=4)
        ),
        max_leaves=20,
    )


@bounded
@given(values(TEXTS), values(NO_NUMBERS))
def test_what_was_written_is_read(value, without_numbers):
    assert parse_json(json.dumps(value), "x") == value
    assert parse_yaml(OmegaConf.to_yaml(OmegaConf.create({"a": value})), "x") == {"a": value}
    assert parse_yaml(yaml.safe_dump(without_numbers, allow_unicode=True), "x") == without_numbers


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.5E4", 1.5e4), ("2024-01-01", "2024-01-01"), ("yes", True)]
)
def test_yaml_reads_numbers_as_people_write_them(text, value):
    assert parse_yaml(f"a: {text}", "x") == {"a": value}


def test_references_are_read_only_where_they_are_allowed(tmp_path):
    (tmp_path / "a.yaml").write_text("a: ${b}")
    assert read_yaml(tmp_path / "a.yaml", references=True) == {"a": "${b}"}
    with pytest.raises(UserError, match="is a reference"):
        read_yaml(tmp_path / "a.yaml")


@bounded
@given(st.binary(max_size=60) | st.text("{}[]:,\"'&*!-?|> \n\tab1.e$%@`#", max_size=60).map(str.encode))
def test_any_text_is_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x"
        file.write_bytes(content)
        for read in (read_json, read_yaml):
            try:
                read(file)
            except UserError as error:
                assert str(error).replace("\n", "").isprintable() and len(str(error)) < 1_000


ARRAYS = {
    "blob": np.arange(200, dtype=np.uint8),
    "labels": np.arange(6).reshape(2, 3),
    "names": np.array(["a", "béé"]),
    "none": np.zeros((0, 3)),
    "scalar": np.array(3.5),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "bytes": np.array([b"a", b"bc"]),
    "empty": np.array([""]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    found = read_arrays(tmp_path / "a.npz")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def whole() -> bytes:
    file = io.BytesIO()
    np.savez(file, **ARRAYS)
    return file.getvalue()


WHOLE = whole()


@bounded
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 40)
)
def test_damaged_arrays_are_the_same_or_refused(changes, cut):
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place] = value
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.npz"
        file.write_bytes(content[: len(content) - cut])
        try:
            found = read_arrays(file)
        except UserError:
            return
        for name in found.keys() & ARRAYS.keys():
            np.testing.assert_array_equal(found[name], ARRAYS[name])


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(100))
    size = os.fstat
    monkeypatch.setattr(
        os, "fstat", lambda descriptor: os.stat_result((*size(descriptor)[:6], 1, *size(descriptor)[7:]))
    )
    with pytest.raises(UserError, match="expected at most 50"):
        read_bytes(tmp_path / "x", max_bytes=50)
