"""Values of files and configs against annotations."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.typed import build, check_arguments, describe, expected_kind


@dataclass
class Part:
    rank: int
    scale: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    where: Path | None = None


@dataclass
class Whole:
    name: str
    parts: dict[str, Part] = field(default_factory=dict)
    targets: str | list[str] = "a"
    mode: Literal["on", "off"] = "on"
    more: Any = None

    def __post_init__(self) -> None:
        if self.name == "never":
            raise UserError("never is no name; choose another")


def test_what_fits_is_built():
    built = build(Whole, {"name": "a", "parts": {"x": {"rank": 2, "scale": 1, "betas": [0, 1], "where": "p"}}}, "f")
    assert built == Whole("a", {"x": Part(2, 1.0, (0.0, 1.0), Path("p"))})
    assert build(Whole, {"name": "a", "more": {"any": [None]}}, "f").more == {"any": [None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": 1}, "f: name=1; expected text. Repair it"),
        ({}, "f: name is missing; expected text. Repair it"),
        ({"name": "a", "part": 1}, "f: part is unknown; did you mean parts, targets?. Repair it"),
        ({"name": "a", "parts": {"x": {"rank": "1"}}}, "f: parts.x.rank='1'; expected a whole number. Repair it"),
        ({"name": "a", "parts": {"x": {"rank": True}}}, "f: parts.x.rank=True; expected a whole number. Repair it"),
        ({"name": "a", "parts": {"x": {"rank": 1.0}}}, "f: parts.x.rank=1.0; expected a whole number. Repair it"),
        ({"name": "a", "parts": {"x": {"rank": 1, "rnak": 2}}}, "f: parts.x.rnak is unknown; did you mean rank"),
        ({"name": "a", "parts": {"x": {"rank": 1, "scale": float("nan")}}}, "expected a number, finite"),
        ({"name": "a", "parts": {"x": {"rank": 1, "betas": [1]}}}, "f: parts.x.betas=[1]; expected 2 values"),
        ({"name": "a", "parts": {"x": {"rank": 1, "betas": [1, 2, 3]}}}, "parts.x.betas=[1, 2, 3]; expected 2 values"),
        ({"name": "a", "parts": {"x": {"rank": 1, "betas": ["a", 2]}}}, "parts.x.betas.0='a'; expected a number"),
        ({"name": "a", "parts": {"x": {"rank": 1, "where": 3}}}, "f: parts.x.where=3; expected null or text"),
        ({"name": "a", "parts": [1]}, "f: parts=[1]; expected keys and values"),
        ({"name": "a", "targets": [1]}, "f: targets=[1]; expected a list or text. Repair it"),
        ({"name": "a", "mode": "up"}, "f: mode='up'; expected one of on, off"),
        (["a"], "f: the content=['a']; expected keys and values"),
        ({"name": "\udcff"}, "not UTF-8"),
        ({"name": "never"}, "never is no name"),
    ],
)
def test_what_does_not_is_one_message(content, message):
    with pytest.raises(UserError) as error:
        build(Whole, content, "f", remedy="Repair it")
    assert message in str(error.value).replace("\n", " ")


def test_messages_are_bounded_and_without_escapes():
    content = {"name": "x" * 10**6, **{f"k{i}\x1b": i for i in range(1000)}}
    with pytest.raises(UserError) as error:
        build(Whole, content, "f")
    assert len(str(error.value)) < 3000 and "\x1b" not in str(error.value) and "994 more" in str(error.value)


def takes(rank: int, other: object, free=None, *, folder: str | Path = "x") -> None: ...


def test_arguments_of_a_call():
    check_arguments(takes, {"rank": 1, "other": object(), "free": object(), "folder": Path("x")}, "g")
    for arguments, message in (
        ({"rnak": 1}, r"g\.rnak is no key of takes; did you mean rank\?"),
        ({"rank": "1", "other": 1}, r"g\.rank='1'; expected a whole number"),
        ({"rank": 1}, "g lacks other, which takes needs"),
    ):
        with pytest.raises(UserError, match=message):
            check_arguments(takes, arguments, "g")


def test_words():
    assert expected_kind(1, float) is None and expected_kind(1.5, int) == "a whole number"
    assert expected_kind(True, int) == "a whole number" and expected_kind(1, bool) == "true or false"
    assert expected_kind(["a"], str | list[str]) is None and expected_kind([1], str | list[str]) == "a list or text"
    assert expected_kind("x", list[dict]) == "a list" and describe(float | None) == "a number or null"
