"""Every yaml composes and builds what it describes; every misspelt key is an error that names it."""

from pathlib import Path

import pytest
from helpers import runs
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mambapeft_vision.adapter.presets import read_preset
from mambapeft_vision.backbones.registry import registered
from mambapeft_vision.data import TaskDataModule
from mambapeft_vision.engine.device import resolve_device
from mambapeft_vision.integrations.wandb_logger import NoLogger, WandbLogger
from mambapeft_vision.pretraining.config import config_of
from mambapeft_vision.run import build
from mambapeft_vision.run.evaluate import evaluate
from mambapeft_vision.run.exit import describe_error
from mambapeft_vision.run.run_config import RunPlan, make_plan
from mambapeft_vision.utils.errors import UserError


def options(group: str) -> list[str]:
    folder = runs.CONFIGS / group
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def plan_of(*overrides: str) -> RunPlan:
    return make_plan(runs.compose_train(overrides))


# Every yaml


def test_every_yaml_is_covered_here():
    """A new group of configs needs a test below."""
    groups = {file.relative_to(runs.CONFIGS).parts[0] for file in runs.CONFIGS.rglob("*.yaml")}
    tested = {"backbone", "dataset", "experiment", "logger", "method", "pretrain", "trainer"}
    roots = {"train.yaml", "evaluate.yaml"}
    # The help texts under hydra/ are in test_commands.py, the spaces under search/ in tests/sweep.
    assert groups == tested | roots | {"hydra", "search"}


@pytest.mark.parametrize("name", options("backbone"))
def test_backbone(name):
    stages = name.startswith("vmamba")
    small = ["dims=16", "depths=[1,1]"] if stages else ["depth=1", "embed_dim=16"]
    plan = plan_of(f"backbone={name}", "backbone.weights=random", *(f"+backbone.{size}" for size in small))
    backbone = build.build_backbone(plan)
    assert backbone.pretrained_cfg["architecture"] == plan.config["backbone"]["name"]
    assert backbone.embed_dim == 16


# Those in part/ change a few keys of another: a backbone's config takes them in.
@pytest.mark.parametrize("name", [name for name in options("trainer") if not name.startswith("part/")])
def test_trainer(name):
    assert plan_of(f"trainer={name}").recipe.max_epochs >= 1


def test_default_trainer_is_the_published_recipe():
    recipe = plan_of().recipe
    assert (recipe.learning_rate, recipe.min_lr, recipe.weight_decay) == (1e-3, 1e-5, 1e-4)
    assert (recipe.betas, recipe.eps) == ([0.9, 0.999], 1e-8)
    assert (recipe.max_epochs, recipe.warmup_epochs, recipe.start_factor, recipe.clip_norm) == (100, 10, 1e-3, 5.0)
    assert (recipe.head_lr_mult, recipe.head_decay_mult) == (1.0, 1.0)


@pytest.mark.parametrize("name", options("logger"))
def test_logger(name):
    assert type(build.build_logger(plan_of(f"logger={name}"))) is {"none": NoLogger, "wandb": WandbLogger}[name]


def methods_and_datasets() -> list[tuple[str, str]]:
    """Each method and each dataset at least once: composing a config takes longer than what is asked of it."""
    methods, datasets = options("method"), options("dataset")
    return [(methods[n % len(methods)], datasets[n % len(datasets)]) for n in range(max(len(methods), len(datasets)))]


NEEDED = {
    "folder": ["dataset.folder=somewhere", "dataset.num_classes=2"],
    "hf": ["dataset.source=somewhere"],
    "torchvision": ["dataset.source=GTSRB"],
}


@pytest.mark.parametrize(("name", "data"), methods_and_datasets())
def test_method_and_dataset(name, data):
    made_for = read_preset(runs.CONFIGS / "method" / f"{name}.yaml").backbone
    backbone = {"vit_s": runs.SMALL_VIT, "mambareg_s": runs.SMALL_MAMBAREG}.get(made_for, runs.SMALL_BACKBONE)
    plan = plan_of(f"method={name}", *backbone, f"dataset={data}", *NEEDED.get(data, []))
    dataset = build.build_dataset(plan)
    assert isinstance(dataset, TaskDataModule)
    assert dataset.name == plan.task and (data in NEEDED or plan.task == data)
    model = build.build_model(plan, build.build_backbone(plan), num_classes=3)
    assert sorted(model.methods) == plan.methods
    measures_first = ("spt_lora", "gps")
    assert bool(model.owned()) == (name not in ("linear_probe", *measures_first))


@pytest.mark.parametrize(
    "override, near",
    [
        ("lora_p_x.rank=1000000000", "would train"),
        ("lora_p_x.rank=1000000000000000000", "expected at most 2,147,483,647"),
        ("convpass.dim=2000000000", "impossible sizes: got 2000000000"),  # of a product with itself
    ],
)
def test_sizes_beyond_all_memory_are_refused(override, near):
    plan = plan_of(f"method={override.partition('.')[0]}", f"method.{override}", *runs.SMALL_BACKBONE)
    with pytest.raises(UserError, match=near):
        build.build_model(plan, build.build_backbone(plan), num_classes=3)


def test_an_error_of_pytorchs_with_possible_sizes_is_not_the_users(monkeypatch):
    def fail(*_):
        raise RuntimeError("Storage size calculation overflowed")

    plan = plan_of("method=lora_p_x", *runs.SMALL_BACKBONE)
    monkeypatch.setattr(build, "adapt", fail)
    with pytest.raises(RuntimeError, match="overflowed"):
        build.build_model(plan, build.build_backbone(plan), num_classes=3)


@pytest.mark.parametrize("name", [name for name in options("experiment") if name != "pretrain"])
def test_experiment(name):
    plan = plan_of(f"experiment={name}")
    dataset = build.build_dataset(plan)
    build.build_logger(plan)
    backbone, _ = build.build_backbone_offline(plan)
    assert build.build_model(plan, backbone, dataset.num_classes).counts()["trainable"] > 0


@pytest.mark.parametrize("choice", [*(f"pretrain={name}" for name in options("pretrain")), "experiment=pretrain"])
def test_pretraining(choice):
    given = ["pretrain.sources.mine.path=somewhere"] if choice in ("pretrain=folder", "experiment=pretrain") else []
    config = config_of(runs.compose_train([choice, *given]))
    assert config.sources and config.backbone in registered()


def test_methods_combine_in_any_order():
    plans = [plan_of(f"method=[{names}]") for names in ("lora_in_proj,a", "a,lora_in_proj")]
    assert plans[0].methods == ["a", "lora_in_proj"]
    assert plans[0].fingerprint == plans[1].fingerprint


def test_a_preset_may_change_the_recipe(tmp_path):
    """Presets that are `@package _global_` come after trainer, so they can switch clipping off."""
    preset = "# @package _global_\nmethod:\n  probe: {_target_: mambapeft_vision.methods.linear_probe.LinearProbe}\n"
    write_option(tmp_path, "method/unclipped", preset + "trainer: {clip_norm: null}\n")
    plan = plan_of(f"hydra.searchpath=[file://{tmp_path}]", "method=unclipped")
    assert plan.recipe.clip_norm is None and plan.methods == ["probe"]
    assert plan_of(f"hydra.searchpath=[file://{tmp_path}]", "method=unclipped", "trainer.clip_norm=1").recipe.clip_norm


def test_an_experiment_overrides_the_root():
    plan = plan_of("experiment=demo")
    assert plan.task == "mini/digits" and plan.recipe.picture
    assert plan_of("experiment=demo", "trainer.max_epochs=3").recipe.max_epochs == 3


def test_the_folder_of_a_long_hybrid_fits_a_file_system():
    plan = plan_of("method=[all,hybrid_wo_proj]")
    assert len(plan.method_names) > 255 and len(plan.folder.parent.name) <= 120
    assert plan_of("method=all").folder.parent.name != plan.folder.parent.name


# Misspelt keys


def write_option(folder: Path, option: str, text: str) -> None:
    file = folder / f"{option}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def build_all(plan: RunPlan) -> None:
    dataset = build.build_dataset(plan)
    build.build_logger(plan)
    backbone, _ = build.build_backbone_offline(plan)
    build.build_model(plan, backbone, dataset.num_classes)


def message_of(*overrides: str) -> str:
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as caught:
        build_all(plan_of(*overrides))
    return describe_error(caught.value)


FILES = {
    "root key": ("experiment/bad", "# @package _global_\nsed: 3\n", "sed", "seed"),
    "path": ("experiment/bad", "# @package _global_\npaths: {dta: x}\n", "dta", "data"),
    "trainer in an experiment": ("experiment/bad", "# @package _global_\ntrainer: {max_epoch: 3}\n", "max_epoch", ""),
    "trainer": ("trainer/bad", "defaults: [default, _self_]\nclipnorm: 3\n", "clipnorm", "clip_norm"),
    "dataset": ("dataset/bad", "defaults: [demo/digits@_here_, _self_]\nbatchsize: 3\n", "batchsize", "batch_size"),
    "logger": ("logger/bad", "defaults: [wandb, _self_]\nprojct: x\n", "projct", "project"),
    "method": ("method/bad", "defaults: [lora_p_x, _self_]\nlora_p_x: {rnak: 3}\n", "rnak", "rank"),
    "backbone": ("backbone/bad", "defaults: [vim_pico, _self_]\nembed_dmi: 3\n", "embed_dmi", ""),
}


@pytest.mark.parametrize("option, text, key, near", FILES.values(), ids=FILES)
def test_a_misspelt_key_in_a_file_is_named(tmp_path, option, text, key, near):
    write_option(tmp_path, option, text)
    group = option.partition("/")[0]
    message = message_of(f"hydra.searchpath=[file://{tmp_path}]", f"{group}=bad", *small_unless(group))
    assert key in message and near in message
    assert "Traceback" not in message


def small_unless(group: str) -> list[str]:
    return [] if group == "backbone" else ["backbone=vim_pico"]


@pytest.mark.parametrize(
    "override, near",
    [
        ("sed=3", "seed"),
        ("+sed=3", "seed"),
        ("paths.dta=x", "data"),
        ("+paths.dta=x", "data"),
        ("trainer.max_epoch=3", "max_epochs"),
        ("+trainer.max_epoch=3", "max_epochs"),
        ("dataset.batchsize=3", "batch_size"),
        ("+dataset.batchsize=3", "batch_size"),
        ("method.lora_p_x.rnak=3", "rank"),
        ("+method.lora_p_x.rnak=3", "rank"),
        ("method.lora_px.rank=3", "lora_p_x"),
        ("+logger.projct=x", "NoLogger"),
        ("backbone.wieghts=random", "weights"),
        ("+backbone.embed_dmi=3", "embed_dmi"),
        ("method=lora_px", "lora_p_x"),
        ("dataset=vtab/cifra", "--help"),
        ("trainer.max_epochs=many", "Integer"),
        ("method=[]", "method"),
        ("~method.lora_p_x", "linear_probe"),
        ("dataset.name=../elsewhere", "dataset.name"),
        ("+method.lora_p_x._target_=os.system", "_target_"),
        ("method.lora_p_x._target_=os.system", "mambapeft_vision.methods"),
        ("dataset._target_=os.system", "mambapeft_vision"),
        ("dataset._target_=mambapeft_vision.data.TaskDatModule", "TaskDatModule"),
        ("method.lora_p_x=3", "method.lora_p_x"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(override, near):
    message = message_of("backbone=vim_pico", override)
    key = override.lstrip("+~").partition("=")[0].partition(".")[0]
    assert near in message
    assert key in message or override.partition("=")[2] in message


def test_evaluate_is_strict_too():
    with pytest.raises(HydraException) as caught:
        runs.compose_root("evaluate", ["rnu=x"])
    assert "did you mean run?" in describe_error(caught.value)
    with pytest.raises(OmegaConfBaseException, match="run"):
        evaluate(runs.compose_root("evaluate", []))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:x"])
def test_devices_that_are_not_there_are_refused(device):
    with pytest.raises(UserError, match=r"device="):
        resolve_device(device)


def test_an_unknown_kernel_is_refused():
    plan = plan_of(*runs.SMALL_BACKBONE)
    with pytest.raises(UserError, match="kernel='fast' is unknown"):
        build.set_kernel(build.build_backbone(plan), "fast", resolve_device("cpu"))


def test_schema_holds_no_values():
    """Values live in the yaml files alone. No section `pretrain` is what recorded runs mean that lack it."""
    from mambapeft_vision.run.config import EvaluateConfig, TrainConfig

    for schema in (TrainConfig, EvaluateConfig):
        structured = OmegaConf.structured(schema)
        assert all(OmegaConf.is_missing(structured, key) for key in structured if key != "pretrain")
