"""Methods with a warm-up phase, and a training loop that knows both phases."""

import torch
import torch.nn.functional as F
from helpers.method_cases import CLASSES, IMAGES, LABELS, ON_VIT, PRESETS, tiny_backbone

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.methods.gps import GPS
from mambapeft_vision.methods.sdt import SDT
from mambapeft_vision.methods.spt import SPT

WARMUP, STEPS = 3, 6
KINDS, BUDGETS = ("sdt", "vit", "vim", "gps"), {"vit": 1500, "vim": 1500}
SPT_TARGETS = {"vit": PRESETS["spt_lora"].methods["spt_lora"]["targets"], "vim": ["layers.**", "norm_f.weight"]}


def new_model(kind="sdt"):
    """SDT or GPS on Vim, or SPT on the named backbone."""
    if kind == "sdt":
        method = SDT(warmup_steps=WARMUP, f_channels=0.9, f_states=0.75, f_off=0.25, rank=2, dropout=0.0, lr_mult=2.0)
    elif kind == "gps":
        method = GPS(targets=["in_proj", "conv"], per_neuron=2, warmup_steps=WARMUP)
    else:
        method = SPT(targets=SPT_TARGETS[kind], budget=BUDGETS[kind], warmup_steps=WARMUP, rank=2, scale=0.5)
    return adapt(new_backbone(kind), {"two_phases": method}, CLASSES, seed=1)


def new_backbone(kind="sdt"):
    return tiny_backbone((ON_VIT,) if kind == "vit" else ())


def optimiser_of(model):
    return torch.optim.AdamW(model.param_groups(lr=1e-2, weight_decay=1e-4))


def train(model, first, last, optimiser=None):
    """Steps first … last-1, as a loop does it that knows warmup_steps, warming_up and finish_warmup."""
    optimiser, lines = optimiser or optimiser_of(model), []
    for step in range(first, last):
        for method in model.methods.values():
            if method.warming_up and step == method.warmup_steps:
                lines.append(method.finish_warmup())
                optimiser = optimiser_of(model)
        optimiser.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimiser.step()
    return optimiser, lines
