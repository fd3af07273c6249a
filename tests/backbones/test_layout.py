"""Where tokens stand, and where prompts join: any number of special tokens, anywhere, or none."""

import pytest
import torch

from mambapeft_vision.backbones.layout import PLACES, TokenLayout
from mambapeft_vision.utils.errors import UserError

LAYOUTS = {
    "middle": TokenLayout(7, (2, 3), special=(3,), readout=(3,)),
    "first": TokenLayout(7, (2, 3), special=(0,), readout=(0,)),
    "registers": TokenLayout(9, (2, 3), special=(1, 4, 7), readout=(1, 4, 7)),
    "none": TokenLayout(6, (2, 3)),
    "mean without its class token": TokenLayout(7, (2, 3), special=(3,)),
}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_joining_moves_everything_along(name, n, kind):
    """Against tokens that carry their own position: after joining, the layout finds each of them."""
    layout = LAYOUTS[name]
    if kind == "around_special" and len(layout.special) != 1:
        with pytest.raises(UserError, match="needs one such token"):
            layout.places(kind, n)
        return
    places = layout.places(kind, n)
    assert len(places) == n and places == sorted(places) and places[0] >= 0 and places[-1] <= layout.length
    sequence: list[str] = []
    for position in range(layout.length + 1):
        sequence += ["prompt"] * places.count(position)
        if position < layout.length:
            sequence.append(str(position))
    joined = layout.joined(places)
    assert joined.length == len(sequence) and joined.grid == layout.grid
    assert [sequence[i] for i in joined.special] == [str(i) for i in layout.special]
    assert [sequence[i] for i in joined.patches] == [str(i) for i in layout.patches]
    assert [sequence[i] for i in joined.prompts] == ["prompt"] * n
    if layout.readout == "mean":
        assert joined.readout == "mean"
    else:
        assert [sequence[i] for i in joined.readout] == [str(i) for i in layout.readout]
    twice = joined.joined(joined.places("prefix_suffix", 3))
    assert len(twice.prompts) == n + 3 and twice.prompts[:2] == (0, 1) and twice.prompts[-1] == twice.length - 1


def test_places():
    layout = LAYOUTS["middle"]
    assert layout.places("prefix", 2) == [0, 0]
    assert layout.places("suffix", 2) == [7, 7]
    assert layout.places("prefix_suffix", 3) == [0, 0, 7]
    assert layout.places("infix", 2) == [3, 5]  # parts of 3, 2, 2
    assert layout.places("around_special", 3) == [3, 4, 4]
    with pytest.raises(UserError, match="position='centre' is unknown; expected one of prefix"):
        layout.places("centre", 1)


def test_mirrored_twice_is_the_same():
    for layout in LAYOUTS.values():
        joined = layout.joined(layout.places("infix", 2))
        assert joined.mirrored().mirrored() == joined
    assert LAYOUTS["first"].mirrored().special == (6,)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reading_out(name):
    layout = LAYOUTS[name].joined(LAYOUTS[name].places("prefix_suffix", 3))
    tokens = torch.randn(2, layout.length, 4, dtype=torch.float64)
    found = layout.read(tokens)
    if layout.readout == "mean":
        torch.testing.assert_close(found, tokens[:, list(layout.patches)].mean(1, keepdim=True))
    else:
        assert torch.equal(found, tokens[:, list(layout.readout)])
    with pytest.raises(UserError, match=f"expected \\[B, {layout.length}, D\\]"):
        layout.read(tokens[:, 1:])
