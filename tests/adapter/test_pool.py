"""Many adapters on one backbone: each computes as if it were alone, the backbone stays, memory is the adapters'."""

import pytest
import torch
from helpers import runs

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.adapter.pool import AdapterPool
from mambapeft_vision.adapter.presets import read_preset
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.benchmarks import adapters as bench
from mambapeft_vision.utils.errors import UserError

BACKBONE, SIZES = "vim_pico_patch8_32", {"depth": 2, "embed_dim": 32}
# On activations, on weights, tokens, tensors of the backbone itself, and weights drawn anew.
PRESETS = {"lora_p_x": 3, "memba": 2, "affix": 4, "bias": 5, "full": 3, "scratch": 2, "additional_scan": 6}


def base():
    return create_backbone(BACKBONE, "random", seed=0, **SIZES).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a changed adapter of each preset."""
    found = {}
    for number, (name, classes) in enumerate(PRESETS.items()):
        specs = read_preset(runs.CONFIGS / "method" / f"{name}.yaml").methods
        model = adapt(base(), {key: build_method(key, spec, name) for key, spec in specs.items()}, classes)
        torch.manual_seed(number)
        with torch.no_grad():
            for tensor in model.trained().values():
                tensor.add_(0.05 * torch.randn_like(tensor))
        found[name] = tmp_path_factory.mktemp(name)
        model.save(found[name], {"task": name})
    return found


@pytest.fixture(scope="module")
def pool(folders):
    pool = AdapterPool(base())
    for name, folder in folders.items():
        pool.add(name, folder)
    return pool


def test_each_computes_as_if_it_were_alone(pool, folders):
    images = torch.randn(len(PRESETS), 3, 32, 32)
    together = pool(images, list(PRESETS))
    for number, (name, classes) in enumerate(PRESETS.items()):
        alone = load_adapter(folders[name], "random")
        with torch.no_grad():
            expected = alone(images[number : number + 1])[0]
        assert together[number].shape == (classes,)
        torch.testing.assert_close(together[number], expected, rtol=1e-5, atol=1e-6)


def test_answers_are_an_evaluated_models_whoever_trained_it_before(tmp_path):
    backbone = create_backbone("vmamba_pico_patch4_32", "random", dims=8, depths=(2,), drop_path_rate=0.5)
    adapt(create_backbone("vmamba_pico_patch4_32", "random", dims=8, depths=(2,)), {}, 3).save(tmp_path, {})
    pool = AdapterPool(backbone)
    pool.add("one", tmp_path)
    images = torch.randn(8, 3, 32, 32)
    expected = pool(images, ["one"] * 8)
    pool.model("one").train()
    assert all(map(torch.equal, pool(images, ["one"] * 8), expected))


def test_the_backbone_stays_and_its_tensors_are_shared(pool):
    untouched = base()
    for (name, mine), (_, fresh) in zip(pool.backbone.named_parameters(), untouched.named_parameters(), strict=True):
        assert torch.equal(mine, fresh), name
    for name in PRESETS:
        model = pool.model(name)
        own = sum(tensor.nbytes for tensor in model.adapter_state().values())
        assert own <= pool.bytes_of(name) <= 1.2 * own + 4096, name
    assert pool.bytes_of("lora_p_x") < 0.5 * pool.backbone_bytes < pool.bytes_of("full")


def test_requests_come_back_in_their_order(pool):
    images = torch.randn(5, 3, 32, 32)
    names = ["bias", "lora_p_x", "bias", "memba", "lora_p_x"]
    mixed = pool(images, names)
    for number, name in enumerate(names):
        torch.testing.assert_close(mixed[number], pool(images[number : number + 1], [name])[0], rtol=1e-5, atol=1e-6)
    assert pool(images[:0], []) == []


def test_adapters_come_and_go(folders):
    pool = AdapterPool(base())
    pool.add("first", folders["bias"])
    with pytest.raises(UserError, match="there is an adapter first already"):
        pool.add("first", folders["bias"])
    with pytest.raises(UserError, match="there is no adapter frist; did you mean first"):
        pool(torch.randn(1, 3, 32, 32), ["frist"])
    with pytest.raises(UserError, match="2 names for 1 images"):
        pool(torch.randn(1, 3, 32, 32), ["first", "first"])
    pool.remove("first")
    assert pool.names == []
    other = AdapterPool(create_backbone(BACKBONE, "random", seed=1, **SIZES))
    with pytest.raises(UserError, match="was trained on vim_pico_patch8_32 with weights sha256"):
        other.add("first", folders["bias"])


def test_the_benchmark_says_what_it_measured(capsys):
    bench.main(["--backbone=vim_pico_patch8_32", "--adapters=3", "--batch=2", "--repeats=2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and "3 of lora_p_x" in lines[1] and "switch takes" in lines[4]
    assert "PyTorch " in lines[6] and "commit " in lines[6]
