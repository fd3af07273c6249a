"""Every preset on every other backbone than Vim: it goes the whole way, or is refused with the reason."""

import runpy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import (
    CLASSES,
    CONFIGS,
    HYBRIDS,
    IMAGES,
    LABELS,
    PRESETS,
    WARMED_UP,
    finish_warmup,
    fresh,
    methods_of,
    move,
    pooled,
    row_name,
)

from mambapeft_vision.adapter.files import read_adapter
from mambapeft_vision.adapter.load import apply_adapter
from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.adapter.presets import fitting_presets
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.prompt import Prompt
from mambapeft_vision.utils.errors import UserError

FOLDER = CONFIGS / "method"
TINY = {"depth": 2, "embed_dim": 32, "drop_path_rate": 0.0}
SEQUENCES = ("mambareg_pico_patch8_32", "videomamba_pico_patch8_32", "arm_pico_patch8_32")
BACKBONES = (*SEQUENCES, "vmamba_pico_patch4_32")
_NO_ATTENTION = {
    "lora_qv": r"has no 'qkv' \(linear map to queries",
    "fact_tk": r"'blocks.\*.attn.\*.weight' matches no parameter",
    "spt_lora": r"'blocks.\*\*' matches no parameter",
}
_NO_MLP = {"adapter_plus": "has no such place in layers.0", "adaptformer": "has no such place in layers.0"}
_NO_NECK = {"neck": r"has no 'neck' \(linear map between the last block and the head\)"}
# Backbone → preset that it refuses → why.
REFUSED = {
    "mambareg_pico_patch8_32": {**_NO_ATTENTION, **_NO_MLP},
    "videomamba_pico_patch8_32": {**_NO_ATTENTION, **_NO_MLP, **_NO_NECK},
    "arm_pico_patch8_32": {**_NO_ATTENTION, **_NO_NECK},
    "vmamba_pico_patch4_32": {
        **_NO_ATTENTION,
        **_NO_NECK,
        "lora_embed": "no port on activations",
        "lora_p_z": "rows='z' is no block of",
        "memba": "VMamba's blocks have no gate",
        "vpt_deep": "the maps of VMamba have no room for other tokens",
        **dict.fromkeys(("lst", "svp"), "works on blocks of one width"),
        "pos_embed": r"has no 'pos_embed' \(position embedding\)",
        **dict.fromkeys(("prompt", "prompt_wo_proj"), "the maps of VMamba have no room for other tokens"),
        **dict.fromkeys(("all", "cls_token", "hybrid", "hybrid_wo_proj"), "has no 'cls_token'"),
    },
}
ROWS = [
    *((name,) for name in PRESETS),
    *((name, WARMED_UP) for name in PRESETS if any("warmup_steps" in m for m in PRESETS[name].methods.values())),
    *HYBRIDS,
]


def cases() -> Iterator[Any]:
    """Every row on every backbone that takes it; all but one backbone a row, in turn, are for exhaustive runs."""
    for number, row in enumerate(ROWS):
        fitting = [backbone for backbone in BACKBONES if not REFUSED[backbone].keys() & set(row)]
        for backbone in fitting:
            marks = [] if backbone == fitting[number % len(fitting)] else [pytest.mark.exhaustive]
            yield pytest.param(backbone, row, id=f"{backbone.partition('_')[0]}-{row_name(row)}", marks=marks)


def tiny(backbone: str) -> torch.nn.Module:
    sizes = {"drop_path_rate": 0.0} if backbone.startswith("vmamba") else TINY
    return fresh(backbone, **sizes).double()


def specs(row: tuple[str, ...], backbone: str) -> dict[str, dict]:
    presets = [PRESETS[name] for name in row if name != WARMED_UP]
    return {name: spec for preset in presets for name, spec in preset.methods_on(backbone).items()}


def build(backbone: str, row: tuple[str, ...]) -> AdaptedModel:
    model = adapt(tiny(backbone), methods_of(specs(row, backbone)), CLASSES, seed=3)
    if WARMED_UP in row:
        finish_warmup(model)
    return model


def without_gradient(backbone: str, name: str) -> bool:
    """VideoMamba's forward direction in the last block sees nothing but the class token: its A has no gradient, nor
    have the first taps of its convolution, which GPS selects here, where nothing was measured.
    """
    places = ("layers.1.mixer.A_log", "layers.1.mixer.conv1d.weight.entries")
    return backbone.startswith("videomamba") and any(place in name.replace("/", ".") for place in places)


@pytest.mark.parametrize(("backbone", "row"), list(cases()))
def test_a_preset_goes_the_whole_way(backbone, row, tmp_path):
    base = pooled(tiny(backbone).eval(), IMAGES)
    model = build(backbone, row).eval()
    change = ((pooled(model.backbone, IMAGES) - base).norm() / base.norm()).item()
    identity = all(m.identity_at_init for m in model.methods.values())
    assert change < 1e-12 if identity else change > 1e-9

    model = move(model).train()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    trained = {id(p) for p in model.trained().values()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in trained), name
        assert p.grad is None or p.grad.any() or without_gradient(backbone, name), f"no gradient reaches {name}"
    torch.optim.AdamW(model.param_groups(lr=1e-2, weight_decay=0.0)).step()
    for name, p in model.named_parameters():
        moved = id(p) in trained and bool(p.grad.any())
        assert torch.equal(p, before[name]) != moved, name

    model.eval()
    expected = model(IMAGES)
    model.save(tmp_path, {"task": "test"})
    loaded = apply_adapter(read_adapter(tmp_path), tiny(backbone)).eval()
    assert torch.equal(loaded(IMAGES), expected)
    obstacles = {n: m.merge_obstacle for n, m in model.methods.items() if m.merge_obstacle is not None}
    assert model.merge() == obstacles
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_does_not_fit_is_refused_with_the_reason(backbone):
    fitting, reasons = fitting_presets(FOLDER, backbone)
    assert reasons.keys() == REFUSED[backbone].keys()
    assert set(fitting) == set(PRESETS) - reasons.keys()
    for name, pattern in REFUSED[backbone].items():
        with pytest.raises(UserError, match=pattern):
            build(backbone, (name,))


@pytest.mark.parametrize("backbone", (*BACKBONES, "vim_pico_patch8_32"))
def test_recomputed_blocks_have_the_same_gradients(backbone):
    gradients = []
    for recompute in (False, True):
        model = move(build(backbone, ("affix_wo_proj",))).train()
        model.backbone.set_grad_checkpointing(recompute)
        F.cross_entropy(model(IMAGES), LABELS).backward()
        gradients.append({name: p.grad for name, p in model.trained().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-13)


def test_a_membrane_that_passes_from_block_to_block_cannot_be_recomputed():
    model = move(build("arm_pico_patch8_32", ("memba",))).train()
    model.backbone.set_grad_checkpointing()
    loss = F.cross_entropy(model(IMAGES), LABELS)
    with pytest.raises(UserError, match="Switch gradient checkpointing off"):
        loss.backward()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_trains_under_autocast(backbone):
    row = ("lora_p_x", "affix_wo_proj", "a" if backbone.startswith("vmamba") else "cls_token")
    specified = methods_of(specs(row, backbone))
    model = move(adapt(tiny(backbone).float(), specified, CLASSES, seed=3)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of mixed dtypes
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(IMAGES.float())
    F.cross_entropy(logits.float(), LABELS).backward()
    expected = model.double()(IMAGES)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.trained().values())


# Formulas of the papers' methods with these sizes, without the head: blocks n, directions K, E channels, N states.
_COLUMNS = (
    "bias", "a", "conv1d", "lora_p_x", "lora_in_proj", "lora_out_proj", "lora_x_proj", "affix_wo_proj",
    "additional_scan", "parallel_adapter",
)  # fmt: skip
_SMALL = (36_864, 589_824, 147_456, 1_769_472, 1_474_560, 2_654_208, 2_531_328, 221_184, 663_552, 884_736)
COUNTS = {
    "mambareg_small_patch16_224": _SMALL,
    "videomamba_small_patch16_224": _SMALL,
    "mambareg_base_patch16_224":
        (73_728, 1_179_648, 294_912, 3_538_944, 2_949_120, 5_308_416, 4_964_352, 442_368, 1_327_104, 1_769_472),
    "mambareg_large_patch16_224":
        (196_608, 3_145_728, 786_432, 9_437_184, 7_864_320, 14_155_776, 13_172_736, 1_179_648, 3_538_944, 4_718_592),
    "videomamba_tiny_patch16_224":
        (18_432, 294_912, 73_728, 884_736, 737_280, 1_327_104, 1_314_816, 110_592, 331_776, 442_368),
    "videomamba_middle_patch16_224":
        (73_728, 1_179_648, 294_912, 3_538_944, 2_949_120, 5_308_416, 4_997_120, 442_368, 1_327_104, 1_769_472),
    "arm_base_patch16_224":
        (36_864, 589_824, 147_456, 1_179_648, 884_736, 1_769_472, 2_605_056, 221_184, 663_552, 589_824),
    "arm_large_patch16_224":
        (98_304, 1_572_864, 393_216, 3_145_728, 2_359_296, 4_718_592, 6_881_280, 589_824, 1_769_472, 1_572_864),
    "arm_huge_patch16_224":
        (147_456, 2_359_296, 589_824, 4_718_592, 3_538_944, 7_077_888, 10_223_616, 884_736, 2_654_208, 2_359_296),
}  # fmt: skip


def counts(backbone: str, *presets: str) -> dict[str, int]:
    """Trained parameters of each preset, all attached to one model of published size."""
    with torch.device("meta"):
        model = adapt(create_backbone(backbone, "random"), methods_of(specs(presets, backbone)), CLASSES)
    return model.counts()["by_method"]


@pytest.mark.parametrize("backbone", COUNTS)
def test_trained_parameters_are_as_many_as_the_formulas_say(backbone):
    expected = dict(zip(_COLUMNS, COUNTS[backbone])) | {"d": COUNTS[backbone][0]}
    assert counts(backbone, *expected) == expected


def test_registers_and_their_neck_are_counted():
    for backbone, tokens, neck in (("small", 4_608, 73_728), ("base", 9_216, 147_456), ("large", 16_384, 131_072)):
        found = counts(f"mambareg_{backbone}_patch16_224", "cls_token", "neck", "pos_embed")
        assert found["cls_token"] == tokens
        assert found["neck"] == neck + (2_048 if backbone == "large" else 2_304)
        assert backbone != "small" or found["pos_embed"] == 75_264


# ---------------------------------------------------------------------------------------------------------------
# Where prompts and affix tokens stand


@pytest.mark.parametrize("backbone", SEQUENCES)
@pytest.mark.parametrize("position", ["prefix", "suffix", "prefix_suffix", "infix"])
def test_prompts_move_what_is_read_and_are_not_read_themselves(backbone, position):
    """With mixers that pass nothing on, the head reads what it reads without prompts."""
    plain, model = tiny(backbone).eval(), tiny(backbone)
    for net in (plain, model):
        for mixer in net.mixers:
            torch.nn.init.zeros_(mixer.out_proj.weight)
    adapted = adapt(model, {"prompt": Prompt(tokens=3, position=position)}, CLASSES).eval()
    tokens = model.forward_features(IMAGES)
    assert tokens.shape[1] == plain.layout.length + 3
    torch.testing.assert_close(pooled(model, IMAGES), pooled(plain, IMAGES), rtol=1e-12, atol=1e-12)
    torch.nn.init.normal_(model.head.weight)
    torch.testing.assert_close(model.forward_head(tokens), adapted(IMAGES), rtol=1e-12, atol=1e-12)


def test_prompts_keep_their_places_in_arms_column_order():
    """A second implementation of the column order: all permutations are of patches among the places of patches."""
    from mambapeft_vision.backbones.arm import column_order

    layout = tiny("arm_pico_patch8_32").layout  # 4 x 4 patches, class token at 8
    joined = layout.joined(layout.places("infix", 3))
    order, inverse = column_order(joined, torch.device("cpu"))
    for place in (*joined.special, *joined.prompts):
        assert order[place] == place
    patches = [joined.patches.index(i) for i in order[list(joined.patches)].tolist()]
    assert patches == [row * 4 + column for column in range(4) for row in range(4)]
    assert torch.equal(order[inverse], torch.arange(joined.length))


@pytest.mark.parametrize("position", ["prefix", "infix", "around_class"])
@pytest.mark.parametrize("directions", ["single", "dual"])
def test_affix_tokens_of_arm_stand_in_the_sequence_of_each_direction(position, directions):
    """Against scans of explicit sequences, one for each of the four directions."""
    backbone = tiny("arm_pico_patch8_32")
    method = Affix(tokens=3, position=position, directions=directions)
    adapt(backbone, {"affix": method}, CLASSES)
    mixer, layout = backbone.layers[0].mixer, backbone.layout
    h = torch.randn(1, layout.length, 32, dtype=torch.float64)
    actual = mixer(h, layout)

    table = method.sites().unflatten(1, (2, -1, 64))[:, 0]  # of the first layer: [n, directions, 2E]
    xz = F.linear(h, mixer.in_proj.weight)[0]
    rows, columns, places = 4, 4, list(layout.patches)
    across = list(range(layout.length))
    for j in range(columns):
        for i in range(rows):
            across[places[j * rows + i]] = places[i * columns + j]
    kind = {"prefix": "prefix", "infix": "infix", "around_class": "around_special"}[position]
    total = torch.zeros(1, layout.length, 32, dtype=torch.float64)
    for k, direction in enumerate(mixer.directions(torch.float64)):
        order = across if k >= 2 else list(range(layout.length))
        new = list(table[:, k if directions == "dual" else 0])
        # A direction with tokens of its own, or a prefix, reads them where they stand in its own sequence; shared
        # tokens between others stand in one sequence, which the second direction reads from its end.
        own_sequence = directions == "dual" or position == "prefix"
        mirrored = direction.reverse and own_sequence
        order, seen = (order[::-1], layout.mirrored()) if mirrored else (order, layout)
        at = seen.places(kind, 3)
        sequence, kept = [], []
        for step in range(layout.length + 1):
            sequence += [token for token, place in zip(new, at) if place == step]
            if step < layout.length:
                kept.append(len(sequence))
                sequence.append(xz[order[step]])
        reverse = direction.reverse and not own_sequence
        scanned = mixer._scan(torch.stack(sequence)[None], None, (direction._replace(reverse=reverse),))
        total[:, order] += scanned[:, kept]
    torch.testing.assert_close(actual, F.linear(total, mixer.out_proj.weight), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"lean": True}, {"projection": True}, {"inner": False}])
def test_every_affix_token_of_arm_is_trained(options):
    model = adapt(tiny("arm_pico_patch8_32"), {"affix": Affix(tokens=2, **options)}, CLASSES)
    F.cross_entropy(move(model)(IMAGES), LABELS).backward()
    tokens = model.methods["affix"].sites()
    assert tokens.shape[1] == 2 * 4 * (32 if options.get("lean") or not options.get("inner", True) else 64)
    for name, p in model.owned().items():
        assert p.grad is not None and p.grad.any(), name


def test_around_the_class_token_is_refused_where_there_are_registers():
    with pytest.raises(UserError, match="needs one such token, but this backbone has 4 special tokens"):
        adapt(
            create_backbone("mambareg_pico_patch8_32", "random"), {"affix": Affix(tokens=2, position="around_class")}, 2
        )


def test_the_table_in_the_documentation_is_up_to_date():
    script = CONFIGS.parent / "scripts" / "make_backbones_doc.py"
    assert runpy.run_path(str(script))["main"](["--check"]) == 0, f"run python {script}"
