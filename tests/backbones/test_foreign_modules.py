"""Adapters, hooks, masks and weights of other libraries on modules whose weights a kernel would read."""

import copy
import inspect
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm.utils
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune

import mambapeft_vision.backbones.vim  # noqa: F401 (registers its models with timm)
from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones import create_backbone, unfused
from mambapeft_vision.backbones.contract import frozen_casts
from mambapeft_vision.backbones.layers import ConvWeights, LinearWeights, PortedLinear, PortedPatches
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.lora import LoRA

# R + 2N = 32 divides into the groups of every kind of adapter.
SIZES: dict[str, Any] = {"depth": 2, "embed_dim": 32, "d_state": 14, "dt_rank": 4}
HELD = ["conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b"]
LINEAR = ["in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj", "head"]
CONVOLUTIONS = ["conv1d", "conv1d_b", "patch_embed.proj"]


@pytest.fixture(autouse=True)
def announcements_start_afresh() -> None:
    unfused.announce_once.cache_clear()


def vim(kernel: str = "auto", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    torch.manual_seed(0)
    model: Any = timm.create_model("vim_pico_patch8_32", num_classes=4, **{**SIZES, **sizes})
    nn.init.normal_(model.head.weight)
    if kernel != "auto":
        model.set_kernel(kernel, "cpu")
    return model.to(dtype).eval()


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def held(model: Any) -> list[nn.Module]:
    return [getattr(mixer, part) for mixer in model.mixers for part in HELD]


# ---------------------------------------------------------------------------------------------------------------
# The unfused mixer computes the same


def test_the_unfused_mixer_computes_the_same() -> None:
    """Output, first and second derivatives of every parameter, when one module has a hook that changes nothing."""
    plain, hooked = vim("naive", torch.float64), vim("naive", torch.float64)
    for mixer in hooked.mixers:
        mixer.dt_proj_b.register_forward_hook(lambda *_: None)
    results = []
    for model in (plain, hooked):
        loss = model(images(torch.float64)).logsumexp(1).sum()
        parameters = list(model.parameters())
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
        results.append([loss, *first, *second])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


FAMILIES: dict[str, dict[str, Any]] = {
    "vim_pico_patch8_32": {"depth": 2, "embed_dim": 32},
    "mambareg_pico_patch8_32": {"depth": 2, "embed_dim": 32},
    "videomamba_pico_patch8_32": {"depth": 2, "embed_dim": 32},
    "arm_pico_patch8_32": {"depth": 2, "embed_dim": 32},
    "vmamba_pico_patch4_32": {},
    "vmamba_vanilla_tiny": {"dims": 32, "depths": (1, 1), "d_state": 4, "img_size": 32},
    "ported_vit_pico_patch8_32": {"depth": 2, "embed_dim": 32, "num_heads": 2},
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    create_backbone("vim_pico_patch8_32", "random", depth=1)  # registers the names with timm
    model: Any = timm.create_model(name, num_classes=4, **FAMILIES[name]).double().eval()
    nn.init.normal_(model.head.weight)
    return model


def with_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with parameters of their own and none inside."""
    return {name: m for name, m in model.named_modules() if list(m.parameters()) and not list(m.children())}


@pytest.mark.filterwarnings("ignore:.* of a mixer has a hook")
@pytest.mark.parametrize("where", ["each module", "all modules"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_module_is_called_where_somebody_listens(name: str, where: str) -> None:
    model, x = family(name), images(torch.float64)
    expected, seen = model(x), set()
    if where == "each module":
        handles = [m.register_forward_hook(lambda m, *_: seen.add(m)) for m in with_weights(model).values()]
    else:
        handles = [nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m))]
    try:
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    finally:
        for handle in handles:
            handle.remove()
    assert [n for n, m in with_weights(model).items() if m not in seen] == []
    seen.clear()
    assert torch.equal(model(x), expected) and not seen


class Doubled(nn.Module):
    """Somebody's module around one of a model's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any) -> Any:
        out = self.base(*args)
        return tuple(None if t is None else 2 * t for t in out) if isinstance(out, tuple) else 2 * out


@pytest.mark.filterwarnings("ignore:.* of a mixer has a hook")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_around_any_module_takes_part(name: str) -> None:
    """So do weights that are pruned: a mask that leaves nothing is seen in the output."""
    model, x = family(name), images(torch.float64)
    expected = model(x)
    for path, module in {re.sub(r"\d+", "N", path): (path, m) for path, m in with_weights(model).items()}.values():
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, Doubled(module))
        assert not torch.allclose(model(x), expected, rtol=1e-9, atol=0), path
        setattr(model.get_submodule(parent), own, module)
        pruned = copy.deepcopy(model)
        prune.random_unstructured(pruned.get_submodule(path), "weight", amount=0.999)
        assert not torch.allclose(pruned(x), expected, rtol=1e-9, atol=0), path
    assert torch.equal(model(x), expected)


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def replaced(module: Any, name: str) -> None:
    """As sharding leaves it: a tensor in a parameter's place."""
    weight = 1.5 * getattr(module, name).detach()
    delattr(module, name)
    setattr(module, name, weight)


# Each puts what it computes in the place of a parameter that must not be one value (a mask of zeros changes nothing).
COMPUTED: dict[str, Callable[[Any, str], Any]] = {
    "pruned": lambda m, name: prune.l1_unstructured(m, name, 0.5),
    "replaced": replaced,
}


@pytest.mark.filterwarnings("ignore:.* of a mixer has a hook")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_computed_tensor_in_the_place_of_any_parameter_is_heard(name: str) -> None:
    """So are those of no module of their own: VMamba's A_logs are zero where N = 1, and a mask of them changes none."""
    model, x = family(name), images(torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    expected = model(x)
    paths = {re.sub(r"\d+", "N", path): path for path, _ in reversed(list(model.named_parameters()))}
    for path in paths.values():  # the last block's need not be heard: of one token it may scan nothing
        parent, _, own = path.rpartition(".")
        if own == "weight":
            continue  # see `test_a_module_around_any_module_takes_part`
        for way, compute in COMPUTED.items():
            other = copy.deepcopy(model)
            compute(other.get_submodule(parent), own)
            assert not torch.allclose(other(x), expected, rtol=1e-9, atol=0), (path, way)


@pytest.mark.filterwarnings("ignore:.* of a mixer has a hook")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_merge_takes_computed_weights_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    backbone: Any = create_backbone(name, "random", **FAMILIES[name]).double()
    target = "qkv" if "vit" in name else "in_proj"
    model = adapt(backbone, {"lora": LoRA(targets=target, rank=2)}, 4).double().eval()
    with torch.no_grad():
        for p in model.trained().values():
            p.copy_(0.3 * torch.randn_like(p))
    first, *_, last = (m for path, m in with_weights(backbone).items() if path.endswith(target))
    prune.l1_unstructured(first, "weight", 0.5)
    nn.utils.parametrize.register_parametrization(last, "weight", Scaled())
    expected = model(images(torch.float64))
    with torch.no_grad():
        first.weight_orig.mul_(2)
        last.parametrizations.weight.original.mul_(2)
    changed_logits = model(images(torch.float64))
    assert not torch.allclose(changed_logits, expected)
    assert model.merge() == {}
    torch.testing.assert_close(model(images(torch.float64)), changed_logits, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("position", ["prefix", "infix"])
def test_with_methods_of_our_own(position: str) -> None:
    """Weight ports and affix tokens take part in a mixer that calls its modules."""
    outputs = []
    for hooked in (False, True):
        backbone = create_backbone("vim_pico_patch8_32", "random", **SIZES).double()
        methods = {
            "affix": Affix(tokens=2, position=position),
            "lora": LoRA(targets=["x_proj", "dt_proj", "conv", "in_proj"], rank=2, space="weight"),
        }
        model = adapt(backbone, methods, 4).double().eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.trained().values():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        if hooked:
            for module in held(backbone):
                module.register_forward_hook(lambda *_: None)
        out = model(images(torch.float64))
        outputs.append([out, *torch.autograd.grad(out.square().sum(), list(model.trained().values()))])
    for expected, found in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_mixer_without_changes_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vim()
    parametrizations.weight_norm(model.layers[0].mixer.x_proj)  # a computed weight can be read
    monkeypatch.setattr("mambapeft_vision.backbones.mixer.mixer_through_modules", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())


def test_it_is_announced_once() -> None:
    model = vim()
    for module in held(model):
        module.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="conv1d of a mixer has a hook") as told:
        model(images())
        model(images())
    assert len(told) == 1


# ---------------------------------------------------------------------------------------------------------------
# Hooks


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen()),
    "before forward": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen()),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen()),
    "before backward": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen()),
}


@pytest.mark.parametrize("part", HELD)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_called(hook: str, part: str) -> None:
    model, calls = vim(depth=1), []
    HOOKS[hook](getattr(model.layers[0].mixer, part), lambda: calls.append(1))
    model(images()).sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("part", HELD)
def test_a_hook_may_change_the_output(part: str) -> None:
    model = vim(depth=1)
    before = model(images())
    handle = getattr(model.layers[0].mixer, part).register_forward_hook(lambda *args: args[-1] * 1.5)
    assert not torch.allclose(model(images()), before, atol=1e-4)
    handle.remove()
    assert torch.equal(model(images()), before)


# ---------------------------------------------------------------------------------------------------------------
# Masks, norms, other modules, offloading


@pytest.mark.parametrize("part", HELD)
def test_pruning_trains_and_can_be_made_permanent(part: str) -> None:
    model = vim(depth=1)
    module = getattr(model.layers[0].mixer, part)
    prune.l1_unstructured(module, "weight", amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        assert module.weight_orig.grad.abs().sum() > 0
        assert not module.weight_orig.grad[module.weight_mask == 0].any()
        optimizer.step()
    expected = model(images())
    prune.remove(module, "weight")
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", HELD)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_the_older_weight_norm(part: str) -> None:
    model = vim(depth=1)
    expected = model(images())
    module = getattr(model.layers[0].mixer, part)
    nn.utils.weight_norm(module)
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    for _ in range(2):  # the weight of the first step is not that of the second
        model(images()).square().sum().backward()
        assert module.weight_g.grad.abs().sum() > 0
        with torch.no_grad():
            module.weight_g.mul_(1.5)
    assert not torch.allclose(model(images()), expected, atol=1e-4)


@pytest.mark.parametrize("part", ["x_proj", "dt_proj_b"])
def test_a_quantised_layer_in_its_place(part: str) -> None:
    """Dynamic quantisation replaces a linear map by a module without a weight tensor."""
    model = vim(depth=1)
    mixer = model.layers[0].mixer
    before = model(images())
    linear = getattr(mixer, part)
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    plain.load_state_dict(linear.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(plain), {nn.Linear})[0]
    assert not isinstance(quantised, nn.Linear)
    setattr(mixer, part, quantised)
    after = model(images())
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.1)


def test_a_model_quantised_as_a_whole_runs() -> None:
    model = vim(depth=1)
    before = model(images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, LinearWeights, PortedLinear})
    torch.testing.assert_close(model(images()), before, rtol=0.1, atol=0.1)


def test_weights_that_are_offloaded_to_a_store() -> None:
    import accelerate  # comes with peft

    model = vim()
    expected = model(images())
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.layers[0].mixer.x_proj.weight.is_meta
    torch.testing.assert_close(model(images()), expected)


# ---------------------------------------------------------------------------------------------------------------
# Adapters of peft


# Kinds that work on tokens of language models, or need more than a target's name; GLoRA takes no subclass of nn.Linear.
NO_ADAPTERS = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "GLORA", "LN_TUNING", "MULTITASK_PROMPT_TUNING", "POLY",
    "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "SHADOW", "TRAINABLE_TOKENS", "XLORA",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 2, "target_r": 2},
    "BOFT": {"boft_block_size": 2},
    "C3A": {"block_size": 2},
    "FOURIERFT": {"n_frequency": 5},
    "GRALORA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 2, "r": 0},
    "ROAD": {"group_size": 2},
    "SHIRA": {"r": 1},
    "VBLORA": {"num_vectors": 8, "vector_length": 2, "topk": 2},
    "WAVEFT": {"n_frequency": 16},
}
VARIANTS = {
    "LORA dora": {"use_dora": True},
    "LORA rslora": {"use_rslora": True},
    "LORA pissa": {"init_lora_weights": "pissa"},
    "LORA olora": {"init_lora_weights": "olora"},
    "LORA bias": {"lora_bias": True},
}
NEVER_MERGES = {"LILY"}
MERGES_INTO_A_BIAS = {"BEFT", "LORA bias"}
WITH_BIAS = ["dt_proj", "dt_proj_b", "head"]
WRONG_IN_PEFT = {("OFT", "patch_embed.proj")}  # its merge differs with timm's own models too


def kinds() -> list[str]:
    try:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    except ImportError:
        return ["peft is not installed"]
    names = {getattr(kind, "name", str(kind)) for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    return sorted((names - NO_ADAPTERS) | set(VARIANTS))


def with_adapter(kind: str, targets: list[str], backbone: Any = None, **more: Any) -> Any:
    """A model with a peft adapter whose tensors are not zero; None where peft refuses, or attaches to nothing."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    name, *_ = kind.split()
    config = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    known = inspect.signature(config).parameters
    arguments = {"r": 2, **SETTINGS.get(name, {}), **VARIANTS.get(kind, {}), **more}
    arguments = {key: value for key, value in arguments.items() if key in known}
    try:
        model: Any = get_peft_model(backbone or vim(), config(target_modules=targets, **arguments)).eval()
    except (ValueError, TypeError, KeyError, NotImplementedError):
        return None
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model if trained else None


def check_adapter(kind: str, model: Any) -> None:
    out = model(images())
    out.square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not dead, f"{kind} does not train {dead}"
    if kind not in NEVER_MERGES:
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(images()), out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_train_and_merge(kind: str) -> None:
    linear = WITH_BIAS if kind in MERGES_INTO_A_BIAS else LINEAR
    for target in linear:
        assert with_adapter(kind, [target]) is not None, f"{kind} is refused on {target}"
    check_adapter(kind, with_adapter(kind, linear))
    for target in CONVOLUTIONS:  # few kinds take convolutions, fewer those with groups
        model = with_adapter(kind, [target])
        if model is not None and (kind, target) not in WRONG_IN_PEFT:
            check_adapter(kind, model)


def check_gradient(model: Any, x: Tensor) -> None:
    """Each trained tensor has a gradient; that of all of them, in one direction, equals a central difference."""

    def loss() -> Tensor:
        return model(x).logsumexp(1).sum()

    def shift(step: float) -> None:
        with torch.no_grad():
            for p, v in zip(trained, direction):
                p.add_(step * v)

    names, trained = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    gradient = torch.autograd.grad(loss(), trained, allow_unused=True)
    assert [n for n, g in zip(names, gradient) if g is None or not g.any()] == []
    generator = torch.Generator().manual_seed(4)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
    found = sum((g * v).sum() for g, v in zip(gradient, direction))
    values = []
    with torch.no_grad():
        for step in (STEP, -2 * STEP):
            shift(step)
            values.append(loss())
        shift(STEP)
    torch.testing.assert_close(found, (values[0] - values[1]) / (2 * STEP), rtol=1e-5, atol=1e-7)


STEP = 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("vim")])
def test_adapters_of_peft_on_other_backbones(name: str) -> None:
    """Of each sort of adapter one: of weights, of activations, rotations around a module, copies in its place.

    Outputs are compared with those of the merged backbone, which has plain modules; gradients with differences.
    """
    modules, x = with_weights(family(name)), images(torch.float64)
    linear = [path for path, m in modules.items() if isinstance(m, nn.Linear)]
    convolutions = [path for path, m in modules.items() if isinstance(m, (nn.Conv1d, nn.Conv2d))]
    ungrouped = [path for path in convolutions if modules[path].groups == 1]  # peft's LoRA divides r into groups
    others = [path for path in modules if path not in linear + ungrouped]
    for kind, targets, copied in (
        ("LORA", linear + ungrouped, others),
        ("LOHA", linear, None),
        ("IA3", linear + [path for path in convolutions if "conv1d" not in path], None),
        ("ROAD", [path for path in linear if modules[path].out_features % 2 == 0], None),
    ):
        model = with_adapter(kind, targets, family(name), modules_to_save=copied).double()
        assert model is not None, (kind, targets)
        check_gradient(model, x)
        out = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), out, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_tuning_of_norms_by_peft(name: str) -> None:
    import peft

    backbone = family(name)
    norms = [path for path in with_weights(backbone) if "norm" in path or re.search(r"patch_embed\.[27]$", path)]
    before = backbone(images(torch.float64))
    model = peft.get_peft_model(backbone, peft.LNTuningConfig(target_modules=norms))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(model(images(torch.float64)), before)
    model(images(torch.float64)).square().sum().backward()
    assert len(trained) >= len(norms) and all(p.grad is not None and p.grad.any() for p in trained.values())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_a_weight_alone() -> None:
    """peft's `target_parameters` puts the weight in place only while the module runs."""
    import peft

    model = peft.get_peft_model(vim(), peft.LoraConfig(target_parameters=["x_proj.weight"], r=2))
    model(images()).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("vmamba")])
def test_adapters_on_weights_that_all_directions_share(name: str) -> None:
    """VMamba keeps the maps of its four directions in parameters, not in modules; peft adapts those by their names."""
    import peft

    for parameter in ("op.x_proj_weight", "op.dt_projs_weight", "op.dt_projs_bias", "op.A_logs"):
        backbone = family(name)
        before = backbone(images(torch.float64))
        model = peft.get_peft_model(backbone, peft.LoraConfig(target_parameters=[parameter], r=2)).double().eval()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for p in trained.values():
                p.add_(0.05)
        out = model(images(torch.float64))
        out.square().sum().backward()
        assert trained and all(p.grad is not None and p.grad.any() for p in trained.values()), parameter
        assert not torch.equal(out, before), parameter
        torch.testing.assert_close(model.merge_and_unload()(images(torch.float64)), out, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------------
# Weights that change between passes: no old cast is ever used


def autocast_logits(model: nn.Module) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(images())


@pytest.mark.parametrize("part", ["in_proj", "x_proj", "out_proj"])
def test_writes_through_data_are_seen(part: str) -> None:
    model, reference = vim().requires_grad_(False), vim().requires_grad_(False)
    before = autocast_logits(model)
    for m in (model, reference):
        getattr(m.layers[0].mixer, part).weight.data.mul_(3)
    after = autocast_logits(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, autocast_logits(reference))  # which never ran before


def test_averages_of_weights_are_seen() -> None:
    model, other = vim().requires_grad_(False), vim().requires_grad_(False)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.2)
    autocast_logits(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.lerp_(theirs.data, 1.0)
    assert torch.equal(autocast_logits(model), autocast_logits(other))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_way_to_change_weights_is_seen(name: str) -> None:
    """A model that has computed is given the weights of one that has not; both compute the same then."""
    fresh = changed(family(name).float().requires_grad_(False))
    expected = autocast_logits(copy.deepcopy(fresh))
    ways: dict[str, Callable[[Any], Any]] = {
        "data": changed,
        "load_state_dict": lambda m: loaded(m, fresh),
        "assign": lambda m: loaded(m, copy.deepcopy(fresh), assign=True),
        "deepcopy": lambda m: changed(copy.deepcopy(m)),
        "pickle": lambda m: changed(pickle.loads(pickle.dumps(m))),
        "average": averaged_with(fresh),
    }
    for way, change in ways.items():
        model = family(name).float().requires_grad_(False)
        assert not torch.equal(autocast_logits(model), expected)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model(images())
        model = change(model)
        assert torch.equal(autocast_logits(model), expected), way


def changed(model: Any) -> Any:
    for p in model.parameters():
        p.data.mul_(1.1)
    return model


def loaded(model: nn.Module, other: nn.Module, **options: bool) -> nn.Module:
    model.load_state_dict(other.state_dict(), **options)
    return model


def averaged_with(other: nn.Module) -> Callable[[nn.Module], nn.Module]:
    """timm's average of weights with a decay of zero, which has computed before it is brought up to date."""

    def averaged(model: nn.Module) -> nn.Module:
        average = timm.utils.ModelEmaV3(model, decay=0.0)
        autocast_logits(average.module)
        average.update(other)
        return average.module

    return averaged


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_steps_of_an_optimizer_are_seen(implementation: str) -> None:
    watched, plain = vim(), vim()
    for model in (watched, plain):
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, **{implementation: True})
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(images()).float().logsumexp(1).sum()
            loss.backward()
            optimizer.step()
            if model is watched:
                autocast_logits(model)
    fresh = vim()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(autocast_logits(watched), autocast_logits(fresh))


def test_a_weight_that_is_replaced_while_casts_are_held_is_seen() -> None:
    """Offloading puts another tensor in a parameter's place for each pass."""
    model, expected = vim().requires_grad_(False), vim().requires_grad_(False)
    with frozen_casts(model, torch.bfloat16):
        held_logits = autocast_logits(model)
        for m in (model, expected):
            in_proj = m.layers[0].mixer.in_proj
            in_proj.weight = nn.Parameter(3 * in_proj.weight, requires_grad=False)
        assert torch.equal(autocast_logits(model), autocast_logits(expected))
    assert not torch.equal(held_logits, autocast_logits(model))


@pytest.mark.filterwarnings("ignore")
def test_a_merge_of_peft_is_seen() -> None:
    model = with_adapter("LORA", ["in_proj", "out_proj", "x_proj"])
    apart = autocast_logits(model)
    model.merge_adapter()
    torch.testing.assert_close(autocast_logits(model), apart, rtol=0.1, atol=0.2)  # bfloat16 rounds elsewhere
    assert not torch.allclose(autocast_logits(vim()), apart, rtol=0.1, atol=0.2), "an adapter that does nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_without_images(name: str) -> None:
    assert family(name).float()(images()[:0]).shape == (0, 4)


def test_training_after_an_evaluation_in_inference_mode() -> None:
    model = vim().requires_grad_(False)
    model.pos_embed.requires_grad_(True)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(images())
    with torch.autocast("cpu", torch.bfloat16):
        model(images()).sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0


def test_a_model_that_was_built_in_inference_mode() -> None:
    with torch.inference_mode():
        model = vim()
        assert torch.isfinite(model(images())).all()


# ---------------------------------------------------------------------------------------------------------------
# Derivatives of whole models


@pytest.mark.parametrize("methods", ["none", "lora"])
def test_second_derivatives_of_a_model(methods: str) -> None:
    found = []
    for kernel in ("naive", "torch", "auto"):
        model = vim(kernel, torch.float64)
        if methods == "lora":
            lora = LoRA(targets=["in_proj", "out_proj"], rank=2)
            adapted = adapt(vim(kernel, torch.float64), {"lora": lora}, 4).double()
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for p in adapted.trained().values():
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            model, parameters = adapted, list(adapted.trained().values())
        else:
            parameters = [model.layers[0].mixer.in_proj.weight, model.head.weight]
        first = torch.autograd.grad(model(images(torch.float64)).logsumexp(1).sum(), parameters, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append([total.detach(), *torch.autograd.grad(total, parameters)])
        if methods == "lora" and kernel == "torch":  # both kernels share the branches: finite differences
            check_along_a_line(model, parameters, found[-1][1:])
    for expected, *others in zip(*found, strict=True):
        for mine in others:
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "vit" not in name])
def test_second_derivatives_of_every_backbone(name: str) -> None:
    """Of every parameter, by two kernels and against finite differences."""
    found = []
    for kernel in ("naive", "auto"):
        model = family(name)
        if kernel != "auto":
            model.set_kernel(kernel, "cpu")
        found.append(second_derivatives(model))
    check_along_a_line(model, list(model.parameters()), found[-1])
    for expected, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-9)


def test_second_derivatives_of_a_vision_transformer() -> None:
    """PyTorch's fast attention on the CPU has none and says so; its plain one has them."""
    model = family("ported_vit_pico_patch8_32")
    with pytest.raises(RuntimeError, match="derivative for .*attention.* is not implemented"):
        second_derivatives(model)
    with sdpa_kernel(SDPBackend.MATH):
        check_along_a_line(model, list(model.parameters()), second_derivatives(model), step=1e-6)


def second_derivatives(model: nn.Module) -> tuple[Tensor, ...]:
    parameters = list(model.parameters())
    first = torch.autograd.grad(model(images(torch.float64)).logsumexp(1).sum(), parameters, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)


def check_along_a_line(
    model: nn.Module, parameters: list[Tensor], gradient: Sequence[Tensor], step: float = 1e-5
) -> None:
    generator = torch.Generator().manual_seed(4)
    line = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    values = []
    for change in (step, -2 * step):
        with torch.no_grad():
            for p, direction in zip(parameters, line, strict=True):
                p.add_(change * direction)
        first = torch.autograd.grad(model(images(torch.float64)).logsumexp(1).sum(), parameters)
        values.append(sum(g.square().sum() for g in first))
    slope = (values[0] - values[1]) / (2 * step)
    expected = sum((g * direction).sum() for g, direction in zip(gradient, line, strict=True))
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_backward_pass_of_every_backbone_within_autocast(name: str) -> None:
    model = family(name).float()
    with torch.autocast("cpu", torch.bfloat16):
        model(images()).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kernel", ["auto", "torch", "naive"])
def test_a_backward_pass_of_a_model_within_autocast(kernel: str) -> None:
    model = vim(kernel)
    with torch.autocast("cpu", torch.bfloat16):
        model(images()).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------
# Layers that other libraries make of ours


def test_layers_have_the_signatures_of_pytorch() -> None:
    for ours, theirs in ((PortedLinear, nn.Linear), (LinearWeights, nn.Linear)):
        mine, plain = ours(6, 4, bias=False, dtype=torch.float64), theirs(6, 4, bias=False, dtype=torch.float64)
        mine.load_state_dict(plain.state_dict())
        x = torch.randn(3, 6, dtype=torch.float64)
        torch.testing.assert_close(mine(x), plain(x))
    x = torch.randn(2, 4, 9, 8)
    options: list[dict[str, Any]] = [
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": (2, 3), "stride": (2, 1), "bias": False},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "dilation": 2, "groups": 2},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ]
    for option in options:
        conv, ported = nn.Conv2d(4, 6, **option), PortedPatches(4, 6, **option)
        ported.load_state_dict(conv.state_dict())
        torch.testing.assert_close(ported(x), conv(x), rtol=1e-4, atol=1e-5)
    conv, held_conv = nn.Conv1d(4, 4, 3, groups=4), ConvWeights(4, 4, 3, groups=4)
    held_conv.load_state_dict(conv.state_dict())
    torch.testing.assert_close(held_conv(x[:, :, 0]), conv(x[:, :, 0]))


def test_images_of_other_channels_are_refused_readably() -> None:
    with pytest.raises(ValueError, match=r"\[2, 1, 32, 32\]; expected \[B, 3, H, W\].*in_chans"):
        vim()(torch.randn(2, 1, 32, 32))


def test_shapes_without_values() -> None:
    model = vim().to("meta")
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 4)
