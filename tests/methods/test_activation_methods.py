"""Methods on activations against their formulas, written out with hooks on a plain backbone (float64)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import CLASSES, IMAGES, LABELS, ON_VIT, move, pooled, tiny_backbone

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.methods.convpass import Convpass
from mambapeft_vision.methods.diffit import DiffFit
from mambapeft_vision.methods.gps import GPS
from mambapeft_vision.methods.houlsby import Houlsby
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.lst import LST
from mambapeft_vision.methods.pfeiffer import Pfeiffer
from mambapeft_vision.methods.prompt import Prompt
from mambapeft_vision.methods.repadapter import RepAdapter
from mambapeft_vision.methods.ssf import SSF
from mambapeft_vision.methods.svp import SVP
from mambapeft_vision.methods.vpt_deep import VPTDeep
from mambapeft_vision.utils.errors import UserError

BOTH = pytest.mark.parametrize("kind", ["vim", "vit"])


def backbone(kind: str):
    """A tiny backbone with norms and biases away from one and zero, where mistakes about them would not show."""
    plain = tiny_backbone((ON_VIT,) if kind == "vit" else ())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return plain


def built(kind: str, method) -> tuple:
    """A model whose method has left its start, in evaluation mode, and the method's tensors."""
    model = move(adapt(backbone(kind), {"m": method}, CLASSES)).eval()
    return model, {name: p.detach() for name, p in model.methods["m"].owned().items()}


def assert_equal(model, plain) -> None:
    torch.testing.assert_close(pooled(model.backbone, IMAGES), pooled(plain, IMAGES), rtol=1e-10, atol=1e-12)


def after(module, function) -> None:
    """Lets the module return function(its first input, what it computes); of a tuple the first part."""

    def hook(module, inputs, out):
        if isinstance(out, tuple):
            return function(inputs[0], out[0]), *out[1:]
        return function(inputs[0], out)

    module.register_forward_hook(hook)


def branch_modules(plain) -> dict:
    """The modules of all residual branches, by the names of their ports."""
    found = {}
    for block in plain.blocks:
        found[f"{block.name}.mixer_branch"] = block.mixer if hasattr(block, "mixer") else block.attn
        if hasattr(block, "mlp"):
            found[f"{block.name}.mlp_branch"] = block.mlp
    return found


@BOTH
def test_ssf_scales_and_shifts_after_every_op(kind):
    model, own = built(kind, SSF())
    plain = backbone(kind).eval()
    sites = {name.rpartition(".")[0] for name in own}
    for site in sites:
        scale, shift = own[f"{site}.scale"], own[f"{site}.shift"]
        if site == "patch_embed.proj":  # [B, D, rows, columns]
            scale, shift = scale[:, None, None], shift[:, None, None]
        after(plain.get_submodule(site), lambda x, out, scale=scale, shift=shift: scale * out + shift)
    per_block = {"vim": 3, "vit": 6}[kind]
    assert len(sites) == 2 * per_block + 2
    assert_equal(model, plain)


def test_ssf_merges_where_every_map_has_a_bias():
    model, _ = built("vit", SSF())
    expected = model(IMAGES)
    assert model.merge() == {}
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [lambda: SSF(init="zero"), lambda: Houlsby(dim=2, init="zero")])
def test_starts_that_are_the_identity(method):
    model = adapt(backbone("vim").eval(), {"m": method()}, CLASSES).eval()
    assert model.methods["m"].identity_at_init
    torch.testing.assert_close(pooled(model.backbone, IMAGES), pooled(backbone("vim").eval(), IMAGES))


@BOTH
def test_houlsby_is_behind_every_branch(kind):
    model, own = built(kind, Houlsby(dim=3))
    plain = backbone(kind).eval()
    for name, module in branch_modules(plain).items():
        down, down_bias, up, up_bias = (own[f"{name}.{part}"] for part in ("down", "down_bias", "up", "up_bias"))
        after(
            module,
            lambda x, h, d=down, db=down_bias, u=up, ub=up_bias: h + F.gelu(h @ d.T + db) @ u.T + ub,
        )
    assert len(own) == 4 * len(branch_modules(plain))
    assert_equal(model, plain)


@BOTH
def test_pfeiffer_is_behind_the_last_branch(kind):
    model, own = built(kind, Pfeiffer(dim=3))
    plain = backbone(kind).eval()
    for block in plain.blocks:
        name = [branch for branch in branch_modules(plain) if branch.startswith(f"{block.name}.")][-1]
        down, down_bias, up, up_bias = (own[f"{name}.{part}"] for part in ("down", "down_bias", "up", "up_bias"))
        after(
            branch_modules(plain)[name],
            lambda x, h, d=down, db=down_bias, u=up, ub=up_bias: h + (h @ d.T + db).clamp(min=0) @ u.T + ub,
        )
    assert len(own) == 4 * len(plain.blocks)
    assert_equal(model, plain)


@BOTH
@pytest.mark.parametrize("conv_init", ["identity", "xavier"])
def test_convpass_pixel_by_pixel(kind, conv_init):
    model, own = built(kind, Convpass(dim=3, scale=0.7, conv_init=conv_init))
    plain = backbone(kind).eval()
    special = plain.layout.special[0]

    def act(x):
        return x / (1 + torch.exp(-1.702 * x))

    def bypass(x, p):
        low = act(x @ p["down"].T + p["down_bias"])
        class_token = low[:, special]
        grid = torch.cat((low[:, :special], low[:, special + 1 :]), 1).view(len(x), 4, 4, 3)
        out = torch.zeros_like(grid)
        for row in range(4):
            for column in range(4):
                for i in range(3):
                    for j in range(3):
                        y, z = row + i - 1, column + j - 1
                        if 0 <= y < 4 and 0 <= z < 4:
                            out[:, row, column] += grid[:, y, z] @ p["conv"][:, :, i, j].T
        out = out.flatten(1, 2)
        middle = (class_token @ p["conv"][:, :, 1, 1].T)[:, None]
        low = act(torch.cat((out[:, :special], middle, out[:, special:]), 1) + p["conv_bias"])
        return 0.7 * (low @ p["up"].T + p["up_bias"])

    for name, module in branch_modules(plain).items():
        parts = {key.rpartition(".")[2]: p for key, p in own.items() if key.startswith(f"{name}.")}
        after(module, lambda x, h, p=parts: h + bypass(x, p))
    assert_equal(model, plain)


@pytest.mark.parametrize(
    ("kind", "target"), [("vim", "in_proj"), ("vim", "out_proj"), ("vit", "qkv"), ("vit", "mlp_up")]
)
def test_repadapter_changes_the_input_of_a_map(kind, target):
    model, own = built(kind, RepAdapter(targets=target, dim=4, scale=0.7))
    plain = backbone(kind).eval()
    for parameter in plain.roles[target]:
        down, down_bias, up, up_bias = (own[f"{parameter}.{part}"] for part in ("down", "down_bias", "up", "up_bias"))

        def adapted(module, inputs, d=down, db=down_bias, u=up, ub=up_bias):
            low = (inputs[0] @ d.T + db).transpose(1, 2)  # grouped convolutions with one tap, as published
            return inputs[0] + 0.7 * F.conv1d(low, u[:, :, None], ub, groups=2).transpose(1, 2)

        plain.get_submodule(parameter.removesuffix(".weight")).register_forward_pre_hook(adapted)
    assert_equal(model, plain)


def test_repadapter_merges_with_its_biases_where_maps_have_them():
    model, _ = built("vit", RepAdapter(targets=["qkv", "mlp_up"], dim=4))
    expected = model(IMAGES)
    assert model.merge() == {}
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-10, atol=1e-12)


@BOTH
def test_diffit_multiplies_what_branches_add(kind):
    model, own = built(kind, DiffFit())
    plain = backbone(kind).eval()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name in own:
                p.copy_(own[name])
    for name, module in branch_modules(plain).items():
        last = {"mixer": "mixer.out_proj" if kind == "vim" else "attn.proj", "mlp": "mlp.fc2"}
        block, branch = name.rsplit(".", 1)
        factor = own[f"{block}.{last[branch.removesuffix('_branch')]}.weight.factor"]
        after(module, lambda x, h, factor=factor: factor * h)
    trained = {name for name in own if not name.endswith(".factor")}
    expected = {n for n, _ in plain.named_parameters() if n.endswith(".bias") or "norm" in n}
    assert trained == {name for name in expected if not name.startswith("head.")}
    assert_equal(model, plain)


@BOTH
@pytest.mark.parametrize("position", ["prefix_suffix", "infix"])
def test_vpt_deep_replaces_its_tokens_in_every_block(kind, position):
    model, own = built(kind, VPTDeep(tokens=3, position=position))
    plain = backbone(kind).eval()
    layout = plain.layout.joined(plain.layout.places(position, 3))
    others = [i for i in range(layout.length) if i not in layout.prompts]
    entered = {}
    plain.blocks[0].register_forward_pre_hook(lambda module, inputs: entered.update(tokens=inputs[0]))
    plain(IMAGES)
    x = IMAGES.new_zeros(len(IMAGES), layout.length, plain.embed_dim)
    x[:, others] = entered["tokens"]
    for block in plain.blocks:
        x = x.clone()
        x[:, list(layout.prompts)] = own[block.name]
        if kind == "vit":
            x, _ = block(x, layout)
        else:
            hidden, residual, _ = block(x, None, None, layout)
            x = hidden + residual
    norm = plain.norm(x) if kind == "vit" else plain.norm_f(x, None)[0]
    torch.testing.assert_close(pooled(model.backbone, IMAGES), layout.read(norm)[:, 0], rtol=1e-10, atol=1e-12)


def test_replaced_tokens_are_spared_by_drop_path():
    sizes = {"depth": 3, "embed_dim": 32, "drop_path_rate": 0.9}
    model = adapt(
        create_backbone("vim_pico_patch8_32", "random", **sizes).double(),
        {"m": VPTDeep(tokens=2, dropout=0.0)},
        CLASSES,
    ).train()
    seen = []
    for block in model.backbone.blocks:
        block.norm.register_forward_hook(lambda module, inputs, out: seen.append(out[1]))
    model(IMAGES)
    for block, residual in zip(model.backbone.blocks, seen):
        table = model.owned()[f"m.{block.name}"]
        torch.testing.assert_close(residual[:, [0, -1]], table.expand(len(IMAGES), -1, -1), check_dtype=False)


@BOTH
def test_svp_prompts_every_patch_by_itself(kind):
    model, own = built(kind, SVP(rank=3, shared_layers=2))
    plain = backbone(kind).eval()

    def linear(x, name):
        return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

    for i, block in enumerate(plain.blocks):

        def prompted(module, inputs, i=i):
            tokens = inputs[0].clone()
            for position in plain.layout.patches:
                x = inputs[0][:, position]
                inner = F.silu(linear(linear(x, f"inner_prompts.{i}.0"), f"inner_prompts.{i}.1"))
                tokens[:, position] += own["inner_scale"][i] * inner
                tokens[:, position] += own["cross_scale"][0] * F.silu(linear(x, "cross_prompts.0"))
            return tokens, *inputs[1:]

        block.register_forward_pre_hook(prompted)
    assert_equal(model, plain)


def test_svp_leaves_prompts_of_other_methods_alone():
    methods = {"p": Prompt(tokens=2), "svp": SVP(rank=3)}
    model = move(adapt(backbone("vim"), methods, CLASSES)).eval()
    inside = {}
    block = model.backbone.blocks[0]
    block.register_forward_pre_hook(lambda module, inputs: inside.update(before=inputs[0], layout=inputs[3]))
    block.norm.register_forward_hook(lambda module, inputs, out: inside.update(entered=inputs[0]))
    model(IMAGES)
    change = (inside["entered"] - inside["before"]).abs().amax((0, 2))
    assert {i for i, moved in enumerate(change.tolist()) if moved} == set(inside["layout"].patches)


@BOTH
def test_lst_by_its_formula(kind):
    model, own = built(kind, LST(reduction=4))
    plain = backbone(kind).eval()
    outputs = []
    for block in plain.blocks:
        block.register_forward_hook(
            lambda module, inputs, out: outputs.append(out[0] if kind == "vit" else out[0] + out[1])
        )
    feature = pooled(plain, IMAGES)

    def linear(x, name):
        return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * own[f"{name}.weight"] + own[f"{name}.bias"]

    z = None
    for block, h in zip(plain.blocks, outputs):
        name = block.name
        low = linear(h, f"{name}.down")
        if z is not None:
            gate = 1 / (1 + torch.exp(-own[f"{name}.gate"] / 0.1))
            low = gate * low + (1 - gate) * z
        q, k, v = linear(norm(low, f"{name}.norm1"), f"{name}.qkv").chunk(3, dim=-1)
        z = low + linear((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v, f"{name}.proj")
        z = z + linear(F.gelu(linear(norm(z, f"{name}.norm2"), f"{name}.fc1")), f"{name}.fc2")
    expected = feature + linear(norm(plain.layout.read(z)[:, 0], "norm"), "up")
    torch.testing.assert_close(pooled(model.backbone, IMAGES), expected, rtol=1e-10, atol=1e-12)


@BOTH
def test_no_gradient_of_the_side_network_enters_the_trunk(kind):
    """A trunk that trains beside LST gets the gradient that it gets beside a constant."""
    model, _ = built(kind, LST(reduction=4))
    plain = backbone(kind).eval()
    side = (pooled(model.backbone, IMAGES) - pooled(plain, IMAGES)).detach()
    assert side.abs().max() > 1e-3
    name = plain.roles["norm"][0]
    weights = model.backbone.get_parameter(name), plain.get_parameter(name)
    for weight in weights:
        weight.requires_grad_(True)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    F.cross_entropy(model.backbone.head(pooled(plain, IMAGES) + side), LABELS).backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-9, atol=1e-12)


def saved_elements(model) -> int:
    """How many numbers autograd keeps for the backward pass, parameters aside."""
    kept = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().size() // tensor.element_size(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(IMAGES).sum()
    return sum(size for size, _ in kept.values())


def test_a_trunk_beside_lst_keeps_nothing_for_backward():
    """All that is kept is the side network's: twice the trunk's state size changes nothing."""
    sizes = [
        saved_elements(
            adapt(
                create_backbone("vim_pico_patch8_32", "random", depth=2, embed_dim=32, expand=expand).double(),
                {"m": method()},
                CLASSES,
            ).eval()
        )
        for method in (lambda: LST(reduction=8), lambda: LoRA(targets="in_proj", rank=2))
        for expand in (1, 2)
    ]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3]


def test_lst_with_checkpointing_is_refused():
    model, _ = built("vim", LST(reduction=4))
    model.backbone.set_grad_checkpointing(True)
    model.eval()(IMAGES)
    with pytest.raises(UserError, match=r"set_grad_checkpointing\(False\)"):
        model.train()(IMAGES)


def test_lst_without_the_trunk_is_refused():
    model, _ = built("vim", LST(reduction=4))
    tokens = model.backbone.forward_features(IMAGES)
    model.backbone.forward_head(tokens)
    with pytest.raises(UserError, match="forward_features right before"):
        model.backbone.forward_head(tokens)


@BOTH
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_gps_selects_the_largest_gradients_of_each_row(kind, count):
    target = {"vim": ["in_proj", "conv", "patch_embed"], "vit": ["qkv", "patch_embed"]}[kind]
    adapted = backbone(kind)
    plain = copy.deepcopy(adapted)
    model = move(adapt(adapted, {"m": GPS(targets=target, per_neuron=count)}, CLASSES))
    method = model.methods["m"]
    plain.head = copy.deepcopy(model.backbone.head)
    names = [name for role in target for name in plain.roles[role]]
    sums = dict.fromkeys(names, 0)
    for images in (IMAGES, IMAGES.flip(0)):
        F.cross_entropy(model(images), LABELS).backward()
        weights = [plain.get_parameter(name).requires_grad_(True) for name in names]
        for name, gradient in zip(names, torch.autograd.grad(F.cross_entropy(plain(images), LABELS), weights)):
            sums[name] = sums[name] + gradient.flatten(1)
    model.eval()(IMAGES)  # measures nothing
    method.finish_warmup()
    saved = method.saved()
    for name in names:
        kept = min(count, sums[name].shape[1])
        best = sums[name].abs().argsort(dim=1, descending=True)[:, :kept].sort(1).values
        assert torch.equal(saved[f"{name}.places"], best)
        assert saved[f"{name}.entries"].shape == best.shape and not saved[f"{name}.entries"].any()
    move(model)
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.backbone.get_submodule(path)
        change = (module.read(attribute) - plain.get_parameter(name)).flatten(1)
        expected = torch.zeros_like(change).scatter(1, saved[f"{name}.places"], method.owned()[f"{name}.entries"])
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "method",
    [
        lambda: SVP(rank=2, dropout=0.5),
        lambda: VPTDeep(tokens=2, dropout=0.5),
        lambda: Convpass(dim=2, dropout=0.5),
        lambda: RepAdapter(dim=2, dropout=0.5),
    ],
)
def test_dropout_is_active_in_training_only(method):
    model, _ = built("vim", method())
    assert torch.equal(model(IMAGES), model(IMAGES))
    model.train()
    assert not torch.equal(model(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SVP(cross="first"), "'own' or 'first_half'"),
        (lambda: SVP(rank=0), "rank=0"),
        (lambda: SSF(init="none"), "'published' or 'zero'"),
        (lambda: VPTDeep(tokens=2, position="middle"), "prefix_suffix"),
        (lambda: Convpass(conv_init="zero"), "'identity' or 'xavier'"),
        (lambda: RepAdapter(dim=3), "groups=2"),
        (lambda: Houlsby(init="random"), "'published' or 'zero'"),
        (lambda: GPS(targets="in_proj", per_neuron=0), "per_neuron=0"),
        (lambda: LST(reduction=0), "reduction=0"),
    ],
)
def test_wrong_arguments(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("kind", "method", "words"),
    [
        ("vit", lambda: SVP(cross="first_half"), "Set cross: own"),
        ("vim", lambda: SVP(scale_rows=1), "scale_rows=1"),
        ("vim", lambda: SSF(targets="x_proj"), "no place for β"),
        ("vim", lambda: RepAdapter(targets="x_proj"), "port on activations"),
        ("vit", lambda: RepAdapter(targets="in_proj"), "has no 'in_proj'"),
        ("vim", lambda: RepAdapter(dim=6, groups=6), "groups=6"),
        ("vim", lambda: GPS(targets="D"), "is a vector"),
        ("vit", lambda: DiffFit(outputs="out_proj"), "has no 'out_proj'"),
        ("vim", lambda: LST(reduction=64), "at most 32"),
    ],
)
def test_wrong_places(kind, method, words):
    with pytest.raises(UserError) as error:
        adapt(backbone(kind), {"mine": method()}, CLASSES)
    assert words in str(error.value)
    assert "mine" in str(error.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SVP, SVP),
        (LST, LST),
        (SSF, SSF),
        (lambda: VPTDeep(tokens=1), lambda: Prompt(tokens=1)),
    ],
)
def test_two_owners_of_one_place_are_refused_with_both_names(first, second):
    with pytest.raises(UserError) as error:
        adapt(backbone("vim"), {"first": first(), "second": second()}, CLASSES)
    assert "first" in str(error.value) and "second" in str(error.value)
