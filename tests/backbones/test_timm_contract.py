"""timm's own model tests on every backbone here, and what else timm's users rely on.

timm's tests are part of its source distribution. They are fetched with pip when these tests run (and kept in pytest's
cache); where that is impossible they are skipped, with the reason.
"""

import copy
import re
import subprocess
import sys
import tarfile
import textwrap
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import timm.optim
import timm.utils
import torch
from helpers import crashes
from timm.models._hub import save_for_hf

from mambapeft_vision.backbones.registry import registered
from mambapeft_vision.backbones.timm_model import stream
from mambapeft_vision.utils.errors import UserError

TINY = [name for name in registered() if "_pico_" in name or "_nano_" in name]
SEQUENCES = [name for name in TINY if not name.startswith("vmamba")]  # VMamba's maps: test_vmamba.py
PUBLISHED = [name for name in registered() if name not in TINY]
MODULES = ["arm", "mambareg", "videomamba", "vim", "vit", "vmamba"]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

#: Test of timm → beginnings of the names that it cannot hold for, and why.
_FX = "where special tokens and prompts stand is Python data that passes along with the tokens; FX traces tensors"
CANNOT_HOLD = {
    "test_model_forward_torchscript": ("", "weights are read through ports, which TorchScript does not compile"),
    "test_model_forward_fx": ("", _FX),
    "test_model_backward_fx": ("", _FX),
    "test_model_forward_fx_torchscript": ("", _FX),
    # timm compares both with num_features: features of a token and what the head reads.
    "test_model_default_cfgs_non_std": (
        tuple(f"mambareg_{size}_" for size in ("tiny", "small", "base", "large")),
        "the head reads n · D / r features of the registers, more than a token's D",
    ),
}


@pytest.fixture(scope="session")
def timm_tests(pytestconfig) -> Path:
    """timm's tests/test_models.py, of the version that is installed."""
    folder = Path(pytestconfig.cache.mkdir("timm-sdist"))
    archive = folder / f"timm-{timm.__version__}.tar.gz"
    if not archive.is_file():
        command = f"-m pip download --no-deps --no-binary timm timm=={timm.__version__} -d".split()
        done = subprocess.run([sys.executable, *command, str(folder)], capture_output=True, text=True, timeout=300)
        if not archive.is_file():
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            pytest.skip(f"timm's tests could not be fetched: pip download timm=={timm.__version__} says {last}")
    with tarfile.open(archive) as content:
        text = content.extractfile(f"timm-{timm.__version__}/tests/test_models.py").read()
    path = folder / "test_models.py"
    path.write_bytes(text)
    return path


def run_timm_tests(source: Path, folder: Path, names: list[str]) -> dict[str, str]:
    """Runs timm's tests on `names`; returns "test[name]" → "" for what passes, else the reason.

    timm leaves models of large images out. Here the limit is that of the largest, VideoMamba's 576 pixels.
    """
    text = source.read_text()
    last_limit = "MAX_BWD_FX_SIZE = 224\n"
    assert last_limit in text
    limits = " = ".join(sorted(set(re.findall(r"\bMAX_\w+_SIZE\b", text))))
    text = text.replace(last_limit, f"{last_limit}{limits} = 576\n")
    assert text.count("max(input_size) > 320:") == 1  # the one limit that has no name there
    text = text.replace("max(input_size) > 320:", "max(input_size) > 576:")
    for lists, new in (("NON_STD_FILTERS", registered()), ("FEAT_INTER_FILTERS", MODULES)):
        # As for timm's own transformers: tokens are no maps, and intermediates come from forward_intermediates.
        marker = "NUM_NON_STD = len(NON_STD_FILTERS)\n"
        assert marker in text
        text = text.replace(marker, f"{lists} += {new!r}\n{marker}")
    (folder / "test_models.py").write_text(text)
    (folder / "conftest.py").write_text(
        textwrap.dedent(f"""
            import timm
            import mambapeft_vision.backbones

            NAMES = {names!r}
            everything = timm.list_models
            timm.list_models = lambda *a, **k: [name for name in everything(*a, **k) if name in NAMES]
            timm.list_pretrained = lambda *a, **k: []


            # timm's test of pretrained weights would fetch from the network what is not in the package.
            def in_reach(item, name):
                pretrained = item.originalname == "test_model_load_pretrained"
                return not pretrained or bool(timm.get_pretrained_cfg(name).file)


            def pytest_collection_modifyitems(items):
                parameters = [getattr(item, "callspec", None) and item.callspec.params for item in items]
                names = [p and p.get("model_name") for p in parameters]
                items[:] = [item for item, name in zip(items, names) if name in NAMES and in_reach(item, name)]
        """)
    )
    options = ["-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "test_models.py"]
    crashes.run_to_end(exec, f"import os, pytest; os.chdir({str(folder)!r}); pytest.main({options})", seconds=3600)
    assert (folder / "report.xml").is_file()
    results = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        problems = [child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")]
        results[case.get("name")] = problems[0] if problems else ""
    return results


def cannot_hold(case: str) -> bool:
    test, _, parameters = case.partition("[")
    name = parameters.removesuffix("]").partition("-")[2] or parameters.removesuffix("]")
    return test in CANNOT_HOLD and name.startswith(CANNOT_HOLD[test][0])


def check(results: dict[str, str], names: list[str]) -> None:
    assert results, "timm's tests ran on nothing"
    assert all(any(name in case for case in results) for name in names)
    failed = {case: reason for case, reason in results.items() if reason}
    assert {case for case in failed if not cannot_hold(case)} == set(), failed
    now_holds = {case for case in results if cannot_hold(case) and case not in failed}
    assert not now_holds, f"listed as impossible, but passes: {now_holds}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        # The two implementations of the contract: sequences (TimmModel's own) and maps.
        pytest.param(["vim_pico_patch8_32", "vmamba_pico_patch4_32"], id="two"),
        pytest.param(TINY, id="all", marks=pytest.mark.exhaustive),
    ],
)
def test_timms_own_tests_pass_on_tiny_models(timm_tests, tmp_path, names):
    check(run_timm_tests(timm_tests, tmp_path, names), names)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PUBLISHED)
def test_timms_own_tests_pass_on_published_sizes(timm_tests, tmp_path, name):
    check(run_timm_tests(timm_tests, tmp_path, [name]), [name])


# ---------------------------------------------------------------------------------------------------------------
# What timm's tests do not ask


def model_of(name: str, **kwargs):
    return timm.create_model(name, **{"num_classes": 5, "img_size": 32, **kwargs}).eval()


@pytest.fixture(params=TINY)
def name(request) -> str:
    return request.param


@pytest.fixture(params=SEQUENCES)
def sequence(request) -> str:
    return request.param


def test_records_are_timms(name):
    model = model_of(name)
    record = model.pretrained_cfg
    assert record["architecture"] == name
    timm.models.PretrainedCfg(**record)  # nothing that timm does not know
    assert model.default_cfg is record
    assert record["input_size"] == (3, 32, 32)
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 32, 32)
    own = 64 if "nano" in name else 32
    assert timm.models.get_pretrained_cfg(name).input_size == (3, own, own)


@pytest.mark.parametrize("name", registered())
def test_every_name_has_a_record_that_says_where_its_weights_are(name):
    record = timm.models.get_pretrained_cfg(name)
    _, height, width = record.input_size
    assert (record.architecture, width, record.classifier) == (name, height, "head")
    assert name.startswith("vmamba_") or name.endswith(f"_{height}")
    assert any((record.url, record.file, record.hf_hub_id)) == timm.is_model_pretrained(name)
    assert not record.file or Path(record.file).is_file()
    assert bool(record.hf_hub_id) == bool(record.hf_hub_filename)


def test_only_models_with_weights_are_listed_as_pretrained():
    listed = {name for name in timm.list_models(pretrained=True) if name.split(".")[0] in registered()}
    published = {"vim", "videomamba", "mambareg", "ported", "vmamba"}
    assert {name.partition("_")[0] for name in listed} == published
    assert "vim_nano_patch8_64" in listed and timm.is_model_pretrained("vim_nano_patch8_64")
    assert not any("pico" in name or name.startswith("arm") for name in listed)


def test_pretrained_cfg_overlay_is_heeded(tmp_path):
    torch.manual_seed(0)
    source = model_of("vim_pico_patch8_32", num_classes=7)
    torch.nn.init.normal_(source.head.weight)
    torch.save({"model": source.state_dict()}, tmp_path / "mine.pth")
    overlay = {"file": str(tmp_path / "mine.pth"), "num_classes": 7}
    model = timm.create_model("vim_pico_patch8_32", pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.num_classes == 7
    loaded, expected = model.state_dict(), source.state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    nano = timm.create_model("vim_nano_patch8_64", pretrained=True)
    given = timm.create_model(
        "vim_nano_patch8_64", pretrained=True, pretrained_cfg_overlay={"state_dict": copy.deepcopy(nano.state_dict())}
    )
    assert torch.equal(nano.pos_embed, given.pos_embed)
    missing = {"file": str(tmp_path / "no.pth")}
    with pytest.raises(UserError, match="do not exist"):
        timm.create_model("vim_nano_patch8_64", pretrained=True, pretrained_cfg_overlay=missing)


@pytest.mark.parametrize("averaged", [False, True])
def test_checkpoints_of_timms_train_script_are_pretrained_weights(tmp_path, averaged):
    """As its `--pretrained-path FILE` gives them: averaged weights where there are some, and a new head."""
    name = "vim_pico_patch8_32"
    trained = model_of(name, num_classes=7)
    torch.nn.init.normal_(trained.head.weight)
    average = timm.utils.ModelEmaV3(trained) if averaged else None
    if average is not None:
        torch.nn.init.normal_(average.module.pos_embed)
    optimizer = timm.optim.create_optimizer_v2(trained, opt="adamw", lr=1e-3)
    settings = {"args": Namespace(model=name), "model_ema": average, "checkpoint_dir": str(tmp_path)}
    timm.utils.CheckpointSaver(trained, optimizer, **settings).save_checkpoint(0, metric=1.0)

    overlay = {"file": str(tmp_path / "last.pth.tar"), "num_classes": -1}
    model = timm.create_model(name, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    expected = (trained if average is None else average.module).state_dict()
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, expected[k])} == {"head.weight"}


def test_saved_for_the_hub_and_read_back(name, tmp_path):
    """timm's own format; sizes that are not the name's own are what timm calls model_args."""
    sizes = {"depths": (1, 1)} if name.startswith("vmamba") else {"depth": 2}
    model = model_of(name, **sizes)
    torch.nn.init.normal_(model.head.weight)
    save_for_hf(model, tmp_path, model_args={**sizes, "img_size": 32})
    read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(read(IMAGES), model(IMAGES))


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax"])
def test_every_pooling_has_its_head(name, pool):
    if pool == "token" and name.startswith("vmamba"):
        with pytest.raises(UserError, match="no special tokens"):
            model_of(name, global_pool=pool)
        return
    model = model_of(name, global_pool=pool)
    torch.nn.init.normal_(model.head.weight)
    tokens = model.forward_features(IMAGES)
    feature = model.forward_head(tokens, pre_logits=True)
    assert feature.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(tokens), model(IMAGES))
    patches = tokens[:, list(model.output_layout().patches)]
    if pool == "max":
        assert torch.equal(feature, patches.amax(1))
    if pool == "avg":
        torch.testing.assert_close(feature, patches.mean(1))
    model.reset_classifier(3, "avg")
    assert model(IMAGES).shape == (2, 3)
    with pytest.raises(UserError, match="global_pool='mean'; expected one of 'token'"):
        model.reset_classifier(3, "mean")


def test_dropout_in_front_of_the_head(name):
    model = model_of(name, drop_rate=0.5)
    tokens = model.forward_features(IMAGES)
    feature = model.forward_head(tokens, pre_logits=True)
    dropped = model.train().forward_head(tokens, pre_logits=True)
    zero = dropped == 0
    assert zero.any() and not zero.all()
    torch.testing.assert_close(dropped[~zero], 2 * feature[~zero])


def test_intermediates_are_the_blocks_outputs(sequence):
    model = model_of(sequence)
    final, maps = model.forward_intermediates(IMAGES)
    assert torch.equal(final, model.forward_features(IMAGES))
    assert len(maps) == len(model.feature_info) == len(model.block_list)
    assert all(m.shape == (2, model.embed_dim, 4, 4) for m in maps)
    patches, special = model.forward_intermediates(
        IMAGES, indices=[-1], norm=True, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )[0]
    assert torch.equal(patches, final[:, list(model.layout.patches)])
    assert torch.equal(special, final[:, list(model.layout.special)])
    early = model.forward_intermediates(IMAGES, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], maps[1])
    whole = model.forward_intermediates(IMAGES, indices=1, output_dict=True, return_prefix_tokens=True)
    assert whole.keys() == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    with pytest.raises(UserError, match="'NCHW' or 'NLC'"):
        model.forward_intermediates(IMAGES, output_fmt="NHWC")


def test_intermediates_in_training_have_the_branches_that_were_dropped():
    """The tokens after a block are what the next block adds up, drop path included."""
    model = timm.create_model("vim_pico_patch8_32", drop_path_rate=0.5).train()
    torch.manual_seed(0)
    _, taken = model.run_blocks(*model.embed(IMAGES), take=[0, 1, 2, 3])
    residuals = [state.residual for state in taken]
    for state, following in zip(taken, residuals[1:]):
        torch.testing.assert_close(stream(state), following)


def test_pruned_models_have_no_unused_parameters(sequence):
    for index, norm in ((0, True), (1, False), (3, True)):
        model = model_of(sequence).train()
        (kept,) = model.prune_intermediate_layers([index], prune_norm=not norm)
        (feature,) = model.forward_intermediates(IMAGES, indices=[kept], norm=norm, intermediates_only=True)
        feature.sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]
        assert model.forward_features(IMAGES).shape[-1] == model.embed_dim
    if model.readout_names:
        with pytest.raises(UserError, match="reads what was pruned away"):
            model.reset_classifier(3, "token")


def test_features_only(sequence):
    model = timm.create_model(sequence, features_only=True, out_indices=(1, 3), img_size=32)
    maps = model(IMAGES)
    assert [m.shape[1:] for m in maps] == [(model.model.embed_dim, 4, 4)] * 2
    assert model.feature_info.reduction() == [8, 8]


def test_checkpointed_blocks_have_the_same_gradients(name):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = model_of(name, num_classes=0).double().train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)  # drop path draws the same
        model(IMAGES.double()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_weight_decay_spares_what_it_must_not_touch(sequence):
    model = model_of(sequence)
    spared, decayed = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    shapes = {id(p): n for n, p in model.named_parameters()}
    names = [{shapes[id(p)] for p in group["params"]} for group in (spared, decayed)]
    assert spared["weight_decay"] == 0 and decayed["weight_decay"] == 0.05
    assert {"cls_token", "pos_embed"} <= names[0]
    assert not any(n.endswith(("_log", ".bias")) or "norm" in n for n in names[1])
    assert any(n.endswith("patch_embed.proj.weight") for n in names[1])


@pytest.mark.parametrize("name", ["vmamba_pico_patch4_32", "vmamba_vanilla_tiny"])
def test_weight_decay_spares_vmambas_biases(name):
    """Those of its four directions have two axes, as weights have."""
    model = timm.create_model(name, dims=16, depths=(1, 1), img_size=32)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in timm.optim.create_optimizer_v2(model, opt="adamw", weight_decay=0.05).param_groups:
        found = {names[id(p)] for p in group["params"]}
        kept = {name for name in found if name.endswith(("A_logs", "Ds", "bias"))}
        assert kept == (set() if group["weight_decay"] else kept) and bool(kept) != bool(group["weight_decay"])


def test_layers_learn_at_rates_that_fall_towards_the_input(sequence):
    optimiser = timm.optim.create_optimizer_v2(model_of(sequence), opt="sgd", lr=1.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimiser.param_groups for p in group["params"]}
    model_parameters = [n for n, _ in model_of(sequence).named_parameters()]
    assert len(scale) == len(model_parameters)
    assert len({group["lr_scale"] for group in optimiser.param_groups}) == 6 + ("nano" in sequence) * 2


def test_ema_follows_and_stays_apart(name):
    model = model_of(name).train()
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        first = next(model.parameters()).add_(1.0)
    ema.update(model)
    torch.testing.assert_close(next(ema.module.parameters()), first - 0.5)
    assert ema.module.eval()(IMAGES).shape == (2, 5)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_with_pretrained_filters(channels):
    three = timm.create_model("vim_nano_patch8_64", pretrained=True)
    model = timm.create_model("vim_nano_patch8_64", pretrained=True, in_chans=channels, num_classes=0).eval()
    expected = timm.models.adapt_input_conv(channels, three.patch_embed.proj.weight)
    assert torch.equal(model.patch_embed.proj.weight, expected)
    assert model(torch.randn(1, channels, 64, 64)).shape == (1, 192)
    assert model.pretrained_cfg["input_size"] == (channels, 64, 64)


def test_made_without_values_then_initialised():
    """What `device="meta"` leaves out, `init_weights` makes, buffers that no state dict holds included."""
    model = timm.create_model("vim_pico_patch8_32", device="meta", drop_path_rate=0.3)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(t).all() for t in (*model.parameters(), *model.buffers()))
    assert (1 - model.branch_scales.keep).tolist() == pytest.approx([0, 0, 0.1, 0.2, 0.3])
