"""Methods on weights in groups, and on backbones with other tokens than Vim's, without any backbone of the project.

The backbone here has two directions whose weights lie in one tensor each (x_proj [2, R + 2N, E], dt_proj [2, E, R],
A_log [2E, N]), and no class token: features are the mean over the patches. Its twin has a tensor for each direction.
"""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones.contract import AffixPort, InputPort, Port, Ported, TapPort, TokenLayout
from mambapeft_vision.methods.additional_scan import AdditionalScan
from mambapeft_vision.methods.boft import BOFT
from mambapeft_vision.methods.c3a import C3A
from mambapeft_vision.methods.cdvft import CDVFT
from mambapeft_vision.methods.dora import DoRA
from mambapeft_vision.methods.fourierft import FourierFT
from mambapeft_vision.methods.hira import HiRA
from mambapeft_vision.methods.hra import HRA
from mambapeft_vision.methods.ia3 import IA3
from mambapeft_vision.methods.loha import LoHa
from mambapeft_vision.methods.lokr import LoKr
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.miss import MiSS
from mambapeft_vision.methods.offset import Offset
from mambapeft_vision.methods.oft import OFT
from mambapeft_vision.methods.prodial import ProDiaL
from mambapeft_vision.methods.prompt import Prompt
from mambapeft_vision.methods.sdt import SDT
from mambapeft_vision.methods.spt import SPT
from mambapeft_vision.methods.vera import VeRA
from mambapeft_vision.utils.errors import UserError

E, N, R, K, L = 6, 3, 2, 2, 4  # channels, states, rank of Δ, directions, patches


class Mixer(Ported):
    """Of the scan nothing but a function of all its weights: enough to see whether they arrive."""

    after = mlp_side = None

    def __init__(self, name: str, grouped: bool) -> None:
        super().__init__()
        self.name, self.grouped = name, grouped
        self.d_inner, self.d_state = E, N
        self.affix, self.gate = AffixPort(f"{name}.affix"), Port(f"{name}.gate")
        self.state_offset, self.output_offset = Port(f"{name}.state_offset"), Port(f"{name}.output_offset")
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        x_proj, dt_proj, A_log = draw(K, R + 2 * N, E), draw(K, E, R), draw(K * E, N)
        if grouped:
            self.x_proj_weight, self.dt_projs_weight, self.A_logs = x_proj, dt_proj, A_log
        for k in range(0 if grouped else K):
            setattr(self, f"x_proj_{k}", nn.Parameter(x_proj.detach()[k]))
            setattr(self, f"dt_proj_{k}", nn.Parameter(dt_proj.detach()[k]))
            setattr(self, f"A_log_{k}", nn.Parameter(A_log.detach().chunk(K)[k]))

    @property
    def states(self) -> int:
        return self.read("A_logs" if self.grouped else "A_log_0").shape[1]

    def weights(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.grouped:
            return self.read("x_proj_weight")[k], self.read("dt_projs_weight")[k], self.read("A_logs").chunk(K)[k]
        return self.read(f"x_proj_{k}"), self.read(f"dt_proj_{k}"), self.read(f"A_log_{k}")

    def forward(self, tokens: Tensor) -> Tensor:
        total = tokens
        for k in range(K):
            x_proj, dt_proj, A_log = self.weights(k)
            states = A_log.shape[1]
            dt, b, c = F.linear(tokens, x_proj).split((R, states, states), dim=-1)
            total = total + (k + 1) * torch.tanh(F.linear(dt, dt_proj) + (b * c) @ A_log.exp().T / 10)
        return total


class Backbone(Ported):
    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.embed_dim = self.num_features = E
        self.num_classes, self.default_cfg = 0, {"name": "fake", "architecture": {}}
        self.head: nn.Module = nn.Identity()
        self.layout, self.prompt = self.layout_of((2, 2)), InputPort("prompt")
        self.grouped = grouped
        self.mixer = Mixer("mixer", grouped)
        self.mixers, self.blocks = [self.mixer], []
        self.tap = TapPort("tap")

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        if self.grouped:
            return {
                "x_proj": ("mixer.x_proj_weight",),
                "dt_proj": ("mixer.dt_projs_weight",),
                "A_log": ("mixer.A_logs",),
            }
        return {role: tuple(f"mixer.{role}_{k}" for k in range(K)) for role in ("x_proj", "dt_proj", "A_log")}

    def row_blocks(self, parameter: str) -> dict[str, slice]:
        rows = {"d": slice(0, R), "b": slice(R, R + N), "c": slice(R + N, R + 2 * N)}
        return rows if "x_proj" in parameter else {}

    def layout_of(self, grid: tuple[int, int]) -> TokenLayout:
        return TokenLayout(grid[0] * grid[1], grid)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes, self.head = num_classes, nn.Linear(E, num_classes).double()

    def forward(self, images: Tensor) -> Tensor:
        """images [B, L, E] are their own tokens here."""
        tokens, layout = self.prompt(images, self.layout)
        return self.head(layout.read(self.mixer(tokens)).flatten(1))


def pair(make) -> tuple:
    """The method on the grouped backbone and on its twin, with the same values in every trained tensor."""
    models = [adapt(Backbone(grouped), {"m": make()}, 3).double() for grouped in (True, False)]
    generator = torch.Generator().manual_seed(1)
    grouped, twin = (model.methods["m"] for model in models)
    with torch.no_grad():
        for name, p in grouped.owned().items():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for own, part in zip(counterparts(name, twin), parts_of(name, p, grouped), strict=True):
                own.copy_(part)
        models[1].backbone.head.load_state_dict(models[0].backbone.head.state_dict())
    return models


GROUPED = {"x_proj_weight": "x_proj", "dt_projs_weight": "dt_proj", "A_logs": "A_log"}


def counterparts(name: str, twin: Method) -> list[Tensor]:
    """The twin's tensors for one tensor of the grouped method, direction after direction."""
    for stem, single in GROUPED.items():
        head, found, rest = name.partition(stem)
        if found:
            index, _, tail = rest.removeprefix(".").partition(".")
            if index.isdigit():  # a direction's own tensor already
                own = twin.owned()
                suffix = f".{tail}" if tail else ""
                return [own[f"{head}{single}_{index}{suffix}"]]
            return [twin.owned()[f"{head}{single}_{k}{rest}"] for k in range(K)]
    raise AssertionError(name)


def parts_of(name: str, tensor: Tensor, method: Method) -> Sequence[Tensor]:
    stem = next(stem for stem in GROUPED if stem in name)
    if name.partition(stem)[2].removeprefix(".")[:1].isdigit():
        return [tensor]
    return tensor.chunk(K) if stem == "A_logs" else tensor.unbind()


IMAGES = torch.randn(3, L, E, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
WEIGHTS = ["x_proj", "dt_proj"]
METHODS = {
    "lora": lambda: LoRA(targets=WEIGHTS, rank=2, space="weight"),
    "lora on rows": lambda: LoRA(targets="x_proj", rank=2, rows="b", space="weight"),
    "dora": lambda: DoRA(targets=WEIGHTS, rank=2),
    "dora of rows": lambda: DoRA(targets=WEIGHTS, rank=2, magnitudes="rows"),
    "dora on rows": lambda: DoRA(targets="x_proj", rank=2, rows="d"),
    "offset": lambda: Offset(targets=[*WEIGHTS, "A_log"]),
    "additional scan": lambda: AdditionalScan(states=2),
    "additional scan after": lambda: AdditionalScan(states=1, position="after", init="arange", zero_c=True),
    "vera": lambda: VeRA(targets=WEIGHTS, rank=3),
    "loha": lambda: LoHa(targets=WEIGHTS, rank=2),
    "lokr": lambda: LoKr(targets=WEIGHTS, rank=1),
    "miss": lambda: MiSS(targets=WEIGHTS, rank=2),
    "hira": lambda: HiRA(targets=WEIGHTS, rank=2),
    "c3a": lambda: C3A(targets=WEIGHTS, block_size=4),
    "cdvft on rows": lambda: CDVFT(targets="x_proj", rows="c"),
    "fourierft": lambda: FourierFT(targets=WEIGHTS, n_frequency=5, scale=9.0),
    "ia3": lambda: IA3(targets=WEIGHTS),
    "ia3 of inputs": lambda: IA3(targets="x_proj", side="inputs"),
    "hra": lambda: HRA(targets=WEIGHTS, rank=2),
    "oft": lambda: OFT(targets=WEIGHTS, block_size=4),
    "oft with the inverse": lambda: OFT(targets=WEIGHTS, block_size=4, neumann_terms=None),
    "boft": lambda: BOFT(targets=WEIGHTS, block_size=4),
    "pissa": lambda: LoRA(targets=WEIGHTS, rank=2, space="weight", init="pissa", scale=0.5),
    "sdt": lambda: SDT(targets="dt_proj", warmup_steps=1, f_channels=0.5, f_states=0.5, f_off=0.2),
}


def make(name: str) -> Method:
    method = METHODS[name]()
    if isinstance(method, SDT):  # LoRA of dt_proj has no port on activations
        method.space, method.dropout = "weight", 0.0
    return method


@pytest.mark.parametrize("name", METHODS)
def test_a_grouped_weight_is_as_many_matrices(name):
    """Outputs and gradients are those of a backbone with one tensor for each direction."""
    grouped, twin = pair(lambda: make(name))
    assert grouped.counts() == twin.counts()
    outs = [model(IMAGES) for model in (grouped, twin)]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    for out in outs:
        out.square().sum().backward()
    own, other = grouped.methods["m"], twin.methods["m"]
    for key, p in own.owned().items():
        if p.grad is None:
            continue
        for mine, theirs in zip(parts_of(key, p.grad, own), counterparts(key, other), strict=True):
            torch.testing.assert_close(mine, theirs.grad, rtol=1e-10, atol=1e-12)
    assert any(p.grad is not None and p.grad.any() for p in own.owned().values())
    expected = grouped(IMAGES)
    grouped.merge()
    torch.testing.assert_close(grouped(IMAGES), expected, rtol=1e-10, atol=1e-12)


def test_sdt_selects_in_every_direction_for_itself():
    grouped, twin = pair(lambda: make("sdt"))
    assert grouped.methods["m"].finish_warmup() == twin.methods["m"].finish_warmup()
    sites = grouped.methods["m"].sparse_states, twin.methods["m"].sparse_states
    for mine, theirs in zip(*sites, strict=True):
        assert torch.equal(mine.channels, theirs.channels) and torch.equal(mine.states, theirs.states)
    torch.testing.assert_close(grouped(IMAGES), twin(IMAGES), rtol=1e-12, atol=1e-12)


def test_spt_measures_and_selects_matrix_by_matrix():
    model = adapt(Backbone(True), {"m": SPT(targets="x_proj", budget=20, rank=1)}, 3).double().train()
    method, weight = model.methods["m"], model.backbone.mixer.x_proj_weight
    model(IMAGES).square().sum().backward()
    plain = Backbone(True)
    plain.head = model.backbone.head
    plain(IMAGES).square().sum().backward()
    rows = plain.row_blocks("x_proj")
    expected = {f"mixer/x_proj_weight/{b}/{k}": (rows[b], k) for b in "dbc" for k in range(K)}
    assert list(method.sites) == list(expected)
    for key, (block, k) in expected.items():
        gradient = plain.mixer.x_proj_weight.grad[k, block]
        torch.testing.assert_close(method.sites[key].sensitivity, gradient.square(), rtol=1e-10, atol=1e-14)
    method.finish_warmup()
    assert model.counts()["trainable"] == 20
    with torch.no_grad():
        for p in method.owned().values():
            p += 0.5
    changed = model.backbone.mixer.read("x_proj_weight") - weight
    for key, (block, k) in expected.items():
        site = method.sites[key]
        torch.testing.assert_close(changed[k, block], site.delta(weight[k, block]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_blocks", [2, 3])
def test_prodial_of_grouped_weights(n_blocks):
    """Every group is diag(s) W D_b + (α/r) up · down of its own, written out."""
    method = ProDiaL(targets="x_proj", n_blocks=n_blocks, rank=1, alpha=2.0, dropout=0.0)
    model = adapt(Backbone(True), {"m": method}, 3).double()
    weight = model.backbone.mixer.x_proj_weight
    torch.testing.assert_close(model.backbone.mixer.read("x_proj_weight"), weight, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for p in method.owned().values():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = {key.rpartition(".")[2]: p for key, p in method.owned().items()}
    found = model.backbone.mixer.read("x_proj_weight")
    for k in range(K):
        blocks = [block + torch.eye(len(block)) for block in own["blocks"][k]]
        expected = own["scale"][k][:, None] * weight[k] @ torch.block_diag(*blocks) + 2 * own["up"][k] @ own["down"][k]
        torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match="no port on activations; set dropout: 0"):
        adapt(Backbone(True), {"m": ProDiaL(targets="x_proj", n_blocks=2, rank=1, alpha=1.0)}, 3)


def test_every_group_starts_as_a_linear_map_does():
    """The bound of nn.Linear follows from a matrix' own inputs, not from all groups together."""
    model = adapt(Backbone(True), {"m": LoRA(targets="x_proj", rank=50, space="weight")}, 3)
    down = model.owned()["m.mixer.x_proj_weight.down"]
    assert down.shape == (K, 50, E)
    bound = E**-0.5
    assert 0.9 * bound < down.abs().max() <= bound
    assert not torch.equal(down[0], down[1])


def test_prompts_on_a_backbone_without_a_class_token():
    """The mean is still over the patches alone."""
    model = adapt(Backbone(True), {"m": Prompt(tokens=3)}, 3).double()
    layout = model.backbone.prompt(IMAGES, model.backbone.layout)[1]
    assert layout.prompts == (0, 1, 6) and layout.patches == (2, 3, 4, 5) and layout.readout == "mean"
    plain = Backbone(True)
    plain.head = model.backbone.head
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=1e-12, atol=1e-12)  # no token sees another one here


def test_a_role_that_is_not_there_is_named_with_those_that_are():
    expected = r"mine: Backbone has no 'qkv' \(linear map to queries.*roles: x_proj, dt_proj, A_log"
    with pytest.raises(UserError, match=expected):
        adapt(Backbone(True), {"mine": Offset(targets="qkv")}, 3)
