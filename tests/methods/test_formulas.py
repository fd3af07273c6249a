"""Methods against their formulas, computed densely and token by token in float64 (naive_vim.py).

The forms that the reference has, and has right, are checked against its own values in tests/interop instead.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import CLASSES, IMAGES, move, pooled, tiny_backbone
from helpers.naive_vim import Changes, features

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.methods.additional_scan import AdditionalScan
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.dora import DoRA
from mambapeft_vision.methods.memba import Memba
from mambapeft_vision.methods.parallel_adapter import ParallelAdapter
from mambapeft_vision.methods.prodial import ProDiaL
from mambapeft_vision.methods.prompt import Prompt
from mambapeft_vision.methods.sdt import SDT
from mambapeft_vision.methods.state_offset import StateOffset

IN_PROJ, OUT_PROJ = "layers.*.mixer.in_proj.weight", "layers.*.mixer.out_proj.weight"
X_PROJ = ["layers.*.mixer.x_proj.weight", "layers.*.mixer.x_proj_b.weight"]
LAYERS, CLASS_INDEX = range(2), 8


def built(*methods, prepare=None):
    """A tiny model with the methods' tensors away from their start, its frozen weights, and its features."""
    model = adapt(tiny_backbone(), {f"m{i}": method for i, method in enumerate(methods)}, CLASSES).eval()
    if prepare:
        prepare(model)
    move(model)
    weights = {name: p.detach() for name, p in model.backbone.named_parameters()}
    return model, weights, pooled(model.backbone, IMAGES)


def check(actual, weights, changes=None):
    torch.testing.assert_close(actual, features(weights, IMAGES, changes), rtol=1e-10, atol=1e-12)


def test_the_naive_model_is_the_backbone():
    check(pooled(tiny_backbone().eval(), IMAGES), built(Prompt(tokens=1))[1])


# -- functions of weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["d", "b", "c"])
def test_dora_on_rows_takes_each_directions_own_magnitude(rows):
    method = DoRA(targets=X_PROJ, rank=2, rows=rows, scale=0.7)
    plain = pooled(tiny_backbone().eval(), IMAGES)
    start = adapt(tiny_backbone(), {"m": method}, CLASSES).eval()
    torch.testing.assert_close(pooled(start.backbone, IMAGES), plain, rtol=1e-12, atol=1e-12)

    method = DoRA(targets=X_PROJ, rank=2, rows=rows, scale=0.7)
    _, weights, actual = built(method)
    place = {"d": slice(0, 2), "b": slice(2, 18), "c": slice(18, 34)}[rows]
    for name in [f"layers.{i}.mixer.{x}.weight" for i in LAYERS for x in ("x_proj", "x_proj_b")]:
        own = {key.rpartition(".")[2]: p for key, p in method.owned().items() if key.startswith(name + ".")}
        adapted = weights[name][place] + 0.7 * own["up"] @ own["down"]
        weights[name] = weights[name].clone()
        weights[name][place] = own["magnitude"] * adapted / adapted.pow(2).sum(0).sqrt()
    check(actual, weights)


@pytest.mark.parametrize("magnitudes", ["columns", "rows"])
@pytest.mark.parametrize(
    "target", ["patch_embed.proj", "layers.*.mixer.in_proj", "layers.*.mixer.out_proj", "layers.*.mixer.dt_proj_b"]
)
def test_dora_on_whole_weights(target, magnitudes):
    method = DoRA(targets=f"{target}.weight", rank=2, scale=0.7, magnitudes=magnitudes)
    axis = 0 if magnitudes == "columns" else 1
    model, weights, actual = built(method)
    names = {key.rpartition(".")[0] for key in method.owned()}
    assert len(names) == (1 if target.startswith("patch") else 2)
    for name in names:
        own = {key.rpartition(".")[2]: p for key, p in method.owned().items() if key.startswith(name + ".")}
        adapted = weights[name].flatten(1) + 0.7 * own["up"].flatten(1) @ own["down"].flatten(1)
        adapted = own["magnitude"].flatten(1) * adapted / adapted.pow(2).sum(axis, keepdim=True).sqrt()
        weights[name] = adapted.view_as(weights[name])
    check(actual, weights)
    assert model.merge() == {}
    torch.testing.assert_close(pooled(model.backbone, IMAGES), actual)


def test_the_norm_of_dora_is_constant_for_the_gradient():
    method = DoRA(targets="patch_embed.proj.weight", rank=2)
    _, weights, actual = built(method)
    own = {key.rpartition(".")[2]: p for key, p in method.owned().items()}
    W = weights["patch_embed.proj.weight"].flatten(1)
    direction = W + 0.1 * own["up"].flatten(1) @ own["down"].flatten(1)
    norm = direction.pow(2).sum(0).sqrt().detach()
    weights["patch_embed.proj.weight"] = (own["magnitude"].flatten(1) * direction / norm).view(32, 3, 8, 8)
    names = list(own)
    expected = torch.autograd.grad(features(weights, IMAGES).square().sum(), [own[n] for n in names])
    gradients = torch.autograd.grad(actual.square().sum(), [own[n] for n in names])
    for mine, theirs in zip(gradients, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("diagonal", ["free", "relu"])
@pytest.mark.parametrize("n_blocks", [1, 5, 32])  # 5 does not divide 32 or 64
def test_prodial(diagonal, n_blocks):
    method = ProDiaL(targets=[IN_PROJ, OUT_PROJ], n_blocks=n_blocks, rank=3, alpha=6, diagonal=diagonal)
    model, weights, actual = built(method)
    for name in [f"layers.{i}.mixer.{p}.weight" for i in LAYERS for p in ("in_proj", "out_proj")]:
        own = {key.rpartition(".")[2]: p for key, p in method.owned().items() if key.startswith(name + ".")}
        W = weights[name]
        D_b = torch.block_diag(*own["blocks"])[: W.shape[1], : W.shape[1]]
        raw = D_b.diagonal()
        D_b = D_b - torch.diag(raw) + torch.diag(1 + raw if diagonal == "free" else 1 - raw.clamp(min=0))
        weights[name] = torch.diag(own["scale"]) @ W @ D_b + 6 / 3 * own["up"] @ own["down"]
    check(actual, weights)
    model.merge()
    merged = dict(model.backbone.named_parameters())
    torch.testing.assert_close(merged["layers.1.mixer.in_proj.weight"], weights["layers.1.mixer.in_proj.weight"])


def test_released_prodial_never_moves_its_diagonal():
    """relu has no gradient at zero; the free form has one. (Blocks of one input are all diagonal.)"""
    moved = {}
    for diagonal in ("relu", "free"):
        method = ProDiaL(targets=IN_PROJ, n_blocks=32, rank=2, alpha=2, diagonal=diagonal)
        model = adapt(tiny_backbone(), {"m": method}, CLASSES)
        pooled(model.backbone, IMAGES).square().sum().backward()
        moved[diagonal] = any(p.grad.any() for key, p in method.owned().items() if key.endswith("blocks"))
    assert moved == {"relu": False, "free": True}


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("init", ["copy", "arange", "constant"])
def test_additional_scan(position, init):
    method = AdditionalScan(states=3, position=position, init=init, constant=2.5 if init == "constant" else None)
    start = adapt(tiny_backbone(), {"m": method}, CLASSES)
    columns = start.owned()["m.layers.0.mixer.A_log"].exp()
    expected = {
        "copy": [1.0 if position == "before" else 16.0] * 3,
        "arange": [17.0, 18.0, 19.0],
        "constant": [2.5] * 3,
    }
    torch.testing.assert_close(columns, torch.tensor(expected[init], dtype=columns.dtype).expand_as(columns))

    method = AdditionalScan(states=3, position=position, init=init, constant=method.constant)
    model, weights, actual = built(method)
    join = (
        (lambda old, new, dim: torch.cat((new, old), dim))
        if position == "before"
        else (lambda old, new, dim: torch.cat((old, new), dim))
    )
    own = method.owned()
    for i in LAYERS:
        for A, x in (("A_log", "x_proj"), ("A_b_log", "x_proj_b")):
            A, x = f"layers.{i}.mixer.{A}", f"layers.{i}.mixer.{x}.weight"
            dt, B, C = weights[x].split((2, 16, 16))
            weights[A] = join(weights[A], own[A], 1)
            weights[x] = torch.cat((dt, join(B, own[x][:3], 0), join(C, own[x][3:], 0)))
    check(actual, weights)
    model.merge()
    assert model.backbone.layers[0].mixer.A_log.shape[1] == 19
    torch.testing.assert_close(pooled(model.backbone, IMAGES), actual)


def test_additional_scan_with_zero_c_is_the_identity_and_trains():
    model = adapt(tiny_backbone(), {"m": AdditionalScan(states=2, zero_c=True)}, CLASSES).eval()
    actual = pooled(model.backbone, IMAGES)
    torch.testing.assert_close(actual, pooled(tiny_backbone().eval(), IMAGES))
    actual.square().sum().backward()
    rows = model.owned()["m.layers.0.mixer.x_proj.weight"].grad
    assert rows[2:].any()
    assert not rows[:2].any()  # B follows once C has moved


def test_sdt_trains_the_selected_entries_and_rows():
    method = SDT(f_channels=0.95, f_states=0.75, rank=2, dropout=0.0, scale=0.4)

    def prepare(model):
        with torch.no_grad():
            for key, p in method.owned().items():
                if key.endswith("offset"):
                    p.normal_(generator=torch.Generator().manual_seed(len(key)))
        method.finish_warmup()

    _, weights, actual = built(method, prepare=prepare)
    saved = method.saved()
    for i in LAYERS:
        for A, x in (("A_log", "x_proj"), ("A_b_log", "x_proj_b")):
            A, x = f"layers.{i}.mixer.{A}", f"layers.{i}.mixer.{x}.weight"
            weights[A], weights[x] = weights[A].clone(), weights[x].clone()
            for c, channel in enumerate(saved[f"{A}.channels"].tolist()):
                weights[x][2:, channel] += saved[f"{A}.rows"][:, c]
                for s, state in enumerate(saved[f"{A}.states"][c].tolist()):
                    weights[A][channel, state] += saved[f"{A}.entries"][c, s]
        out = f"layers.{i}.mixer.out_proj.weight"
        weights[out] = weights[out] + 0.4 * saved[f"{out}.up"] @ saved[f"{out}.down"]
    check(actual, weights)


# -- activations ----------------------------------------------------------------------------------------------------


def test_parallel_adapter():
    method = ParallelAdapter(rank=3, scale=0.3)
    model, _, _ = built(method)
    site, y = model.backbone.layers[1].mixer.out_proj, torch.randn(2, 5, 64, dtype=torch.float64)
    own = {key.rpartition(".")[2]: p for key, p in method.owned().items() if key.startswith("layers.1")}
    expected = y @ site.weight.T + 0.3 * (y @ own["down"].T).clamp(min=0) @ own["up"].T
    torch.testing.assert_close(site(y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["state", "output"])
def test_state_offset(form):
    method = StateOffset(form=form)
    _, weights, actual = built(method)
    own = method.owned()
    offsets = {
        (i, d): own[f"layers.{i}.mixer.{side}_offset"] for i in LAYERS for d, side in enumerate(("forward", "backward"))
    }
    check(actual, weights, Changes(**{form: offsets}))


@pytest.mark.parametrize("chunks", [1, 4])  # 17 tokens in 4 chunks: three are padded
@pytest.mark.parametrize("transfer, reset_first", [(True, False), (False, False), (True, True)])
def test_memba(transfer, reset_first, chunks):
    method = Memba(tau=0.6, threshold=0.05, chunks=chunks, transfer=transfer, reset_first=reset_first)
    _, weights, actual = built(method)
    means = {}

    def gate(layer, z):
        size = -(-z.shape[1] // chunks)
        padded = torch.cat((z, torch.zeros(z.shape[0], size * chunks - z.shape[1], z.shape[2], dtype=z.dtype)), 1)
        u = means[layer - 1] if layer and transfer else torch.zeros_like(padded[:, :size])
        seen = []
        for i in range(chunks):
            kept = torch.where(u > 0.05, 0.0, u) if reset_first else u
            v = 0.6 * kept + padded[:, i * size : (i + 1) * size]
            u = v if reset_first else torch.where(v > 0.05, 0.0, v)
            seen.append(u)
        means[layer] = torch.stack(seen).mean(0)
        return torch.cat(seen, 1)[:, : z.shape[1]]

    check(actual, weights, Changes(gate=gate))


def test_memba_without_leak_and_threshold_changes_nothing():
    method = Memba(tau=0, threshold=None)
    assert method.identity_at_init
    _, weights, actual = built(method)
    check(actual, weights)


# -- tokens ---------------------------------------------------------------------------------------------------------


def evenly(rows, new):
    """`new` rows between the parts that torch.tensor_split makes of `rows`; and where the rows are."""
    joined, at, parts = [], [], torch.arange(len(rows)).tensor_split(len(new) + 1)
    for i, part in enumerate(parts):
        for token in part.tolist():
            at.append(len(joined))
            joined.append(rows[token])
        if i < len(new):
            joined.append(new[i])
    return joined, at


def around(rows, new, index):
    """Half of `new` right before rows[index], the rest right after."""
    half = len(new) // 2
    joined = [*rows[:index], *new[:half], rows[index], *new[half:], *rows[index + 1 :]]
    at = [i + (half if i >= index else 0) + (len(new) - half if i > index else 0) for i in range(len(rows))]
    return joined, at


def affix_tokens(method, width, per_layer):
    """(layer, which) → n rows [B, width], from the generator's table."""
    table = method.sites().detach()
    blocks = table.split(width, dim=1)
    batch = IMAGES.shape[0]
    return lambda layer, which: [row.expand(batch, -1) for row in blocks[layer * per_layer + which]]


INNER = [(p, d) for p in ("prefix", "infix", "around_class") for d in ("single", "dual")] + [("suffix", "single")]


@pytest.mark.parametrize(("position", "directions"), INNER)
@pytest.mark.parametrize("projection", [False, True])
def test_inner_affix(position, directions, projection):
    method = Affix(tokens=3, position=position, directions=directions, projection=projection)
    _, weights, actual = built(method)
    dual = directions == "dual"
    tokens = affix_tokens(method, 128, 1 + dual)

    def inner(layer, direction, rows):
        new = tokens(layer, direction if dual else 0)
        if position == "prefix":
            return [*new, *rows], [i + 3 for i in range(len(rows))]
        if position == "suffix":  # in natural order behind: the backward direction reads it first, from its end
            return (
                ([*rows, *new], list(range(len(rows))))
                if direction == 0
                else (
                    [*reversed(new), *rows],
                    [i + 3 for i in range(len(rows))],
                )
            )
        place = evenly if position == "infix" else lambda r, n: around(r, n, CLASS_INDEX)
        if dual or direction == 0:
            return place(rows, new)  # the class token is in the middle of the 17 tokens from both sides
        natural, at = place(rows[::-1], new)  # one buffer, read from its end
        return natural[::-1], [len(natural) - 1 - i for i in reversed(at)]

    check(actual, weights, Changes(inner=inner))


@pytest.mark.parametrize("directions", ["single", "dual"])
@pytest.mark.parametrize("position", ["prefix", "infix", "around_class"])
def test_outer_affix(position, directions):
    method = Affix(tokens=2, position=position, directions=directions, inner=False)
    _, weights, actual = built(method)
    dual = directions == "dual"
    tokens = affix_tokens(method, 32, 1 + dual)

    def outer(layer, direction, rows):
        if position == "prefix":
            behind = tokens(layer, 1) if dual else []
            return [*tokens(layer, 0), *rows, *behind], [i + 2 for i in range(len(rows))]
        new = tokens(layer, direction if dual else 0)
        place = evenly if position == "infix" else lambda r, n: around(r, n, CLASS_INDEX)
        if not dual or direction == 0:
            return place(rows, new)
        reading, at = place(rows[::-1], new)
        return reading[::-1], [len(reading) - 1 - i for i in reversed(at)]

    check(actual, weights, Changes(outer=outer))


def test_lean_affix_equals_the_full_one():
    full, lean = Affix(tokens=2), Affix(tokens=2, lean=True)
    models = [adapt(tiny_backbone(), {"m": method}, CLASSES).eval() for method in (full, lean)]
    assert sum(p.numel() for p in lean.owned().values()) * 2 == sum(p.numel() for p in full.owned().values())
    with torch.no_grad():
        halves = full.sites.table.unflatten(1, (-1, 2, 64))[:, :, 0]  # x halves of [layers · directions, x | z]
        lean.sites.table.copy_(halves.flatten(1))
    assert torch.equal(*(pooled(model.backbone, IMAGES) for model in models))


def test_the_gate_half_of_an_affix_is_dead():
    method = Affix(tokens=2)
    _, _, actual = built(method)
    actual.square().sum().backward()
    x, z = method.sites.table.grad.unflatten(1, (-1, 2, 64)).unbind(2)
    assert not z.any()
    assert x.any(dim=-1).all()


@pytest.mark.parametrize("position", ["prefix_suffix", "prefix", "infix", "suffix"])
@pytest.mark.parametrize("projection", [False, True])
def test_prompt(position, projection):
    method = Prompt(tokens=5, position=position, projection=projection)
    model, weights, actual = built(method)
    own = method.owned()
    table = own["embedding"]
    if projection:
        table = F.linear(torch.tanh(F.linear(table, own["fc1.weight"], own["fc1.bias"])), own["fc2.weight"])
        table = table + own["fc2.bias"]
    new = [row.expand(IMAGES.shape[0], -1) for row in table]

    def prompt(rows, index):
        if position == "infix":
            joined, at = evenly(rows, new)
            return joined, at[index]
        front = {"prefix_suffix": 3, "prefix": 5, "suffix": 0}[position]
        return [*new[:front], *rows, *new[front:]], index + front

    check(actual, weights, Changes(prompt=prompt))
    model.merge()  # folds the projection
    assert set(method.owned()) == {"embedding"}
    torch.testing.assert_close(pooled(model.backbone, IMAGES), actual)


def test_affix_around_the_class_token_follows_it_behind_prompts():
    """Prompts in front shift the class token; the affix finds it (an affix beside any other token differs)."""
    affix, prompt = Affix(tokens=2, position="around_class", directions="single"), Prompt(tokens=4, position="infix")
    _, weights, actual = built(affix, prompt)
    tokens = affix_tokens(affix, 128, 1)
    new = [row.expand(IMAGES.shape[0], -1) for row in prompt.owned()["embedding"]]
    shifted = evenly(list(range(17)), new)[1][CLASS_INDEX]

    def inner(layer, direction, rows):
        if direction == 0:
            return around(rows, tokens(layer, 0), shifted)
        natural, at = around(rows[::-1], tokens(layer, 0), shifted)
        return natural[::-1], [len(natural) - 1 - i for i in reversed(at)]

    def join(rows, index):
        joined, at = evenly(rows, new)
        return joined, at[index]

    check(actual, weights, Changes(inner=inner, prompt=join))
