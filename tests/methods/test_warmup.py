"""Two phases as a training loop sees them: warm-up, selection, training; and going on after a stop in either."""

import pytest
import torch
from helpers.method_cases import IMAGES
from helpers.two_phases import KINDS, STEPS, WARMUP, new_backbone, new_model, optimiser_of, train

from mambapeft_vision.adapter.files import read_adapter
from mambapeft_vision.adapter.load import apply_adapter
from mambapeft_vision.methods.linear_probe import LinearProbe


def test_phases():
    model = new_model()
    method = model.methods["two_phases"]
    start = {name: p.detach().clone() for name, p in method.owned().items()}
    train(model, 0, WARMUP)
    assert method.warming_up
    offsets = {
        name.removesuffix(".offset"): p.detach().clone() for name, p in method.owned().items() if "offset" in name
    }
    assert offsets.keys() == {f"layers.{i}.mixer.{A}" for i in range(2) for A in ("A_log", "A_b_log")}
    assert all(offset.any() for offset in offsets.values())

    line = method.finish_warmup()
    assert "6 of 64 channels" in line
    assert "4 of 16 states" in line
    assert not method.warming_up
    saved = method.saved()
    for site, offset in offsets.items():
        scores = offset.square().sum(1)
        kept, off = saved[f"{site}.channels"], saved[f"{site}.off_channels"]
        assert len(off) == 16
        assert scores[off].max() <= scores.sort().values[15]
        assert scores[kept].min() >= scores.sort().values[-6]
        for c, channel in enumerate(kept):
            ranking = offset[channel].square().argsort(descending=True)
            assert saved[f"{site}.states"][c].tolist() == ranking[:4].tolist()
    owned = method.owned()
    assert {key: tuple(p.shape) for key, p in owned.items() if "A_log" in key and ".0." in key} == {
        "layers.0.mixer.A_log.entries": (6, 4),
        "layers.0.mixer.A_log.rows": (32, 6),
    }
    assert all(not p.any() for key, p in owned.items() if key.endswith(("entries", "rows")))
    for key in start.keys() & owned.keys():  # LoRA starts anew
        assert torch.equal(owned[key], start[key])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [2, WARMUP, 5])
def test_stopped_and_continued_equals_straight_through(stop, kind):
    """A checkpoint is the adapter's state and the optimiser's; the phase follows from the former."""
    straight = new_model(kind)
    _, lines = train(straight, 0, STEPS)
    assert len(lines) == 1

    first = new_model(kind)
    optimiser, _ = train(first, 0, stop)
    state = {name: t.detach().clone() for name, t in first.adapter_state().items()}
    second = new_model(kind)
    second.load_adapter_state(state)
    assert second.methods["two_phases"].warming_up == (stop <= WARMUP)
    continued = optimiser_of(second)
    continued.load_state_dict(optimiser.state_dict())
    train(second, stop, STEPS, continued)
    states = straight.adapter_state(), second.adapter_state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, STEPS])
def test_adapter_of_either_phase_loads(steps, kind, tmp_path):
    model = new_model(kind)
    train(model, 0, steps)
    model.save(tmp_path, {})
    loaded = apply_adapter(read_adapter(tmp_path), new_backbone(kind))
    assert torch.equal(model.eval()(IMAGES), loaded.eval()(IMAGES))


def test_switched_off_channels_have_no_memory():
    model = new_model()
    train(model, 0, WARMUP + 1)
    off = model.methods["two_phases"].saved()["layers.0.mixer.A_log.off_channels"]
    A_log = model.backbone.layers[0].mixer.read("A_log")
    torch.testing.assert_close(A_log[off], torch.full_like(A_log[off], 10.0))
    assert (A_log > 9).sum() == 16 * 16


def test_methods_without_a_warmup_say_so():
    method = LinearProbe()
    assert method.warmup_steps == 0
    assert not method.warming_up
    with pytest.raises(NotImplementedError):
        method.finish_warmup()
