"""Random input for readers of files of others.

The examples are the same in every run (derandomised) and few; HYPOTHESIS_EXAMPLES=10000 tries more.
"""

import copy
import os
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def bounded(examples: int):
    """Settings: the same `examples` in every run."""
    given_number = os.environ.get("HYPOTHESIS_EXAMPLES")
    return settings(
        max_examples=int(given_number or examples),
        derandomize=given_number is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def mutated(content: bytes):
    """`content` with some bytes changed, cut or put in."""
    place = st.integers(0, len(content))
    edit = st.tuples(place, st.integers(0, 8), st.binary(max_size=8))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        changed = content
        for start, removed, added in edits:
            changed = changed[:start] + added + changed[start + removed :]
        return changed

    return st.lists(edit, min_size=1, max_size=6).map(apply)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of everything inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((*path, key), *places(inner, (*path, key)))]


def change(config: dict, path: tuple, value: object, how: str) -> None:
    for key in path[:-1]:
        if not isinstance(config, (dict, list)):
            return
        with suppress(LookupError, TypeError):
            config = config[key]
    with suppress(LookupError, TypeError, AttributeError):
        if how == "remove":
            del config[path[-1]]
        elif how == "rename":
            config[str(value)] = config.pop(path[-1])
        else:
            config[path[-1]] = value


@st.composite
def changed_values(draw, content: Any, most: int = 2) -> Any:
    """A copy of JSON values with some of them set to others, removed, or under another name."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(places(content) or [()]))
        if path:
            change(content, path, draw(JSON), draw(st.sampled_from(["set", "set", "set", "remove", "rename"])))
    return content
