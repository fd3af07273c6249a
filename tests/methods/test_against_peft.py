"""Methods on weights against Hugging Face peft: the same linear map, the same factors, in float64.

Compared: output, gradients of the input and of every factor, and the merged weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers.one_linear import OneLinear, attached
from helpers.stand_ins import no_extension_of_peft
from torch import Tensor, nn

from mambapeft_vision.integrations.peft_forms import FORMS
from mambapeft_vision.methods.boft import BOFT
from mambapeft_vision.methods.c3a import C3A
from mambapeft_vision.methods.fourierft import FourierFT
from mambapeft_vision.methods.hira import HiRA
from mambapeft_vision.methods.hra import HRA
from mambapeft_vision.methods.ia3 import IA3
from mambapeft_vision.methods.loha import LoHa
from mambapeft_vision.methods.lokr import LoKr
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.miss import MiSS
from mambapeft_vision.methods.oft import OFT
from mambapeft_vision.methods.vera import VeRA

OUT, IN = 24, 16
X = torch.randn(7, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
UPSTREAM = torch.randn(7, OUT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Plain(nn.Module):
    """The linear map for peft, which looks for it by its name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.proj = nn.Linear(IN, OUT).double()
        with torch.no_grad():
            self.proj.weight.copy_(linear.weight)
            self.proj.bias.copy_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def same(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT


def column(tensor: Tensor) -> Tensor:
    return tensor[:, None]


@dataclass
class Case:
    """How a method's tensors are called in peft, and how they lie there."""

    method: Callable[[], Method]
    config: Callable[[], Any]
    names: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]


def tensors_of(kind: str, *chosen: str) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Tensors of a method, or the `chosen` ones, as the table for export and import has them."""
    form = FORMS[kind]
    lies = {**dict.fromkeys(form.transposed, transposed), **dict.fromkeys(form.vectors, column)}
    names = {name: form.tensors[name] for name in chosen or form.tensors}
    return {name: (theirs.replace("*", "default"), lies.get(name, same)) for name, theirs in names.items()}


def config(kind: str, **arguments: Any) -> Any:
    return getattr(peft, kind)(target_modules=["proj"], **arguments)


CASES = {
    "lora": Case(
        lambda: LoRA(targets="in_proj", rank=4, scale=0.5),
        lambda: config("LoraConfig", r=4, lora_alpha=2),
        {"down": ("lora_A.default.weight", same), "up": ("lora_B.default.weight", same)},
    ),
    "rslora": Case(
        lambda: LoRA(targets="in_proj", rank=4, scale=3.0, rank_stabilised=True),
        lambda: config("LoraConfig", r=4, lora_alpha=3, use_rslora=True),
        {"down": ("lora_A.default.weight", same), "up": ("lora_B.default.weight", same)},
    ),
    "vera": Case(
        lambda: VeRA(targets="in_proj", rank=4),
        lambda: config("VeraConfig", r=4),
        tensors_of("VeRA"),
    ),
    "loha": Case(
        lambda: LoHa(targets="in_proj", rank=4, scale=0.5),
        lambda: config("LoHaConfig", r=4, alpha=2),
        tensors_of("LoHa"),
    ),
    "lokr": Case(
        lambda: LoKr(targets="in_proj", rank=2, scale=0.5),
        lambda: config("LoKrConfig", r=2, alpha=1),
        tensors_of("LoKr", "first", "up", "down"),
    ),
    "lokr with a whole second factor": Case(
        lambda: LoKr(targets="in_proj", rank=3, scale=0.5),
        lambda: config("LoKrConfig", r=3, alpha=1.5),
        tensors_of("LoKr", "first", "second"),
    ),
    "miss": Case(
        lambda: MiSS(targets="in_proj", rank=4),
        lambda: config("MissConfig", r=4),
        tensors_of("MiSS"),
    ),
    "miss with a shorter last group": Case(
        lambda: MiSS(targets="in_proj", rank=5),
        lambda: config("MissConfig", r=5),
        tensors_of("MiSS"),
    ),
    "hira": Case(
        lambda: HiRA(targets="in_proj", rank=4),
        lambda: config("HiraConfig", r=4),
        tensors_of("HiRA"),
    ),
    "hra": Case(
        lambda: HRA(targets="in_proj", rank=6),
        lambda: config("HRAConfig", r=6),
        tensors_of("HRA"),
    ),
    "oft": Case(
        lambda: OFT(targets="in_proj", block_size=8),
        lambda: config("OFTConfig", r=0, oft_block_size=8),
        tensors_of("OFT"),
    ),
    "oft with the inverse": Case(
        lambda: OFT(targets="in_proj", block_size=8, neumann_terms=None),
        lambda: config("OFTConfig", r=0, oft_block_size=8, use_cayley_neumann=False),
        {"skew": ("oft_R.default.weight", torch.neg)},  # peft's inverse is of the other sign than its series
    ),
    "boft": Case(
        lambda: BOFT(targets="in_proj", block_size=4),
        lambda: config("BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=1),
        tensors_of("BOFT"),
    ),
    "ia3": Case(
        lambda: IA3(targets="in_proj"),
        lambda: config("IA3Config", feedforward_modules=[]),
        tensors_of("IA3"),
    ),
    "ia3 of inputs": Case(
        lambda: IA3(targets="in_proj", side="inputs"),
        lambda: config("IA3Config", feedforward_modules=["proj"]),
        {"scale": ("ia3_l.default", lambda scale: scale[None])},
    ),
}


def theirs_with(case: Case, linear: nn.Linear, own: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """peft's model of the same linear map with our tensors as its factors; and the factors, by our names."""
    model = peft.get_peft_model(Plain(linear), case.config()).double()
    layer = model.base_model.model.proj
    factors = {}
    for name, (path, lie) in case.names.items():
        factor = dict(layer.named_parameters())[path]
        assert factor.shape == lie(own[name]).shape
        with torch.no_grad():
            factor.copy_(lie(own[name]))
        factors[name] = factor
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in factors.values()}, "another parameter trains in peft"
    return model, factors


def last_names(method: Method) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: p for name, p in method.owned().items()}


def run(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the input; gradients of parameters are left in them."""
    x = X.clone().requires_grad_()
    out = model(x)
    (out * UPSTREAM).sum().backward()
    return out.detach(), x.grad


def close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def merged(method: Method, model: OneLinear) -> tuple[Tensor, Tensor]:
    method.to_weight_space(model)
    model.proj.bake()
    return model.proj.weight, model.proj.bias


@pytest.fixture(autouse=True)
def no_extension(monkeypatch):
    no_extension_of_peft(monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_as_in_peft(name):
    case = CASES[name]
    method = case.method()
    ours = attached(method, OUT, IN, move=0.1)
    own = last_names(method)
    assert own.keys() == case.names.keys()
    theirs, factors = theirs_with(case, ours.proj, own)
    if name == "vera":
        layer = theirs.base_model.model.proj
        layer.vera_A["default"].copy_(method.random_down)
        layer.vera_B["default"].copy_(method.random_up)
    plain = F.linear(X, ours.proj.weight, ours.proj.bias)
    (mine, mine_x), (other, other_x) = run(ours), run(theirs)
    assert not torch.allclose(other, plain)
    close(mine, other)
    close(mine_x, other_x)
    for key, (_, lie) in case.names.items():
        assert own[key].grad.any()
        close(lie(own[key].grad), factors[key].grad)
    final = theirs.merge_and_unload().proj
    weight, bias = merged(method, ours)
    close(weight, final.weight)
    close(bias, final.bias)


def test_pissa_as_in_peft():
    """peft changes the base weight where we take the first factors away; it starts in float32 only."""
    method = LoRA(targets="in_proj", rank=4, scale=0.5, init="pissa")
    ours = attached(method, OUT, IN, move=0)
    plain = Plain(ours.proj).float()
    model = peft.get_peft_model(plain, config("LoraConfig", r=4, lora_alpha=2, init_lora_weights="pissa"))
    layer = model.base_model.model.proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    own = last_names(method)
    signs = torch.sign((own["down"].float() * down).sum(1))  # of the singular vectors, which are free
    for mine, other in ((own["down"], signs[:, None] * down), (own["up"], up * signs)):
        torch.testing.assert_close(mine.float(), other, rtol=1e-4, atol=1e-5)
    residual = ours.present.float()  # without the branch: it runs on activations
    torch.testing.assert_close(residual, layer.base_layer.weight, rtol=1e-4, atol=1e-5)


def test_c3a_as_in_peft():
    """peft's layer computes in float32; the two functions behind it are compared in float64.

    The gradient of the input is that of peft's matrix. The backward pass that peft's convolution has of its own
    (0.21.2) returns another one, which is none of the function: it correlates where it should convolve.
    """
    from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast

    method = C3A(targets="in_proj", block_size=4)
    ours = attached(method, OUT, IN, move=0.5)
    kernels, weight = last_names(method)["kernels"], ours.proj.weight
    twin = kernels.detach().clone().requires_grad_()
    other = F.linear(X, weight, ours.proj.bias) + BlockCircularConvolution.apply(X, twin) / IN
    (other * UPSTREAM).sum().backward()
    out, grad_x = run(ours)
    close(out, other.detach())
    close(kernels.grad, twin.grad)
    expected = weight + get_circulant_fast(twin.detach()) / IN
    close(grad_x, UPSTREAM @ expected)
    close(merged(method, ours)[0], expected)


def test_fourierft_as_in_peft(monkeypatch):
    method = FourierFT(targets="in_proj", n_frequency=20, scale=30.0)
    ours = attached(method, OUT, IN)
    spectrum, places = last_names(method)["spectrum"], method.get_buffer(f"places_{OUT}x{IN}")
    case = Case(
        lambda: method,
        lambda: config("FourierFTConfig", n_frequency=20, scaling=30.0),
        {"spectrum": ("fourierft_spectrum.default", same)},
    )
    theirs, factors = theirs_with(case, ours.proj, {"spectrum": spectrum})
    theirs.base_model.model.proj.indices["default"] = torch.stack((places // IN, places % IN))
    # peft computes this method in float32, by a cast and by the default of new tensors; here both are float64.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        (mine, mine_x), (other, other_x) = run(ours), run(theirs)
        final = theirs.merge_and_unload().proj
    finally:
        torch.set_default_dtype(torch.float32)
    close(mine, other)
    close(mine_x, other_x)
    close(spectrum.grad, factors["spectrum"].grad)
    close(merged(method, ours)[0], final.weight)
