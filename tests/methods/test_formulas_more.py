"""Methods on single weights against their formulas, written out densely or entry by entry in float64."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import CLASSES, IMAGES, ON_VIT, move, pooled, tiny_backbone
from helpers.one_linear import OneLinear, attached, tensors
from torch import Tensor

from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.methods.boft import BOFT
from mambapeft_vision.methods.c3a import C3A
from mambapeft_vision.methods.cdvft import CDVFT
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
from mambapeft_vision.utils.errors import UserError

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def check(model: OneLinear, expected: Tensor) -> None:
    torch.testing.assert_close(model.present, expected, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(model.present, model.proj.weight)


# -- additive ------------------------------------------------------------------------------------------------------


def test_vera():
    method = VeRA(targets="in_proj", rank=3)
    model = attached(method, 8, 12)
    own = tensors(method)
    A, B = method.random_down, method.random_up
    check(model, model.proj.weight + torch.diag(own["b"]) @ B @ torch.diag(own["d"]) @ A)
    assert set(method.saved()) == {"proj.weight.b", "proj.weight.d", "random_down", "random_up"}


def test_vera_shares_its_random_matrices_between_weights_of_all_sizes():
    """The smaller weight uses the first rows and columns."""
    method = VeRA(targets=["in_proj", "out_proj"], rank=3)
    backbone = adapt(tiny_backbone(), {"m": method}, CLASSES).backbone
    assert method.random_down.shape == (3, 64) and method.random_up.shape == (128, 3)
    with torch.no_grad():
        for p in method.owned().values():
            p += 0.5
    for name, (out_features, in_features) in {"in_proj": (128, 32), "out_proj": (32, 64)}.items():
        for layer in range(2):
            module = getattr(backbone.layers[layer].mixer, name)
            expected = 0.5 * 0.6 * method.random_up[:out_features] @ method.random_down[:, :in_features]
            torch.testing.assert_close(module.read("weight") - module.weight, expected, rtol=1e-10, atol=1e-12)


def test_loha():
    method = LoHa(targets="in_proj", rank=2, scale=0.7)
    model = attached(method, 8, 12)
    own = tensors(method)
    first, second = own["up_1"] @ own["down_1"], own["up_2"] @ own["down_2"]
    check(model, model.proj.weight + 0.7 * first * second)
    assert torch.linalg.matrix_rank(model.present - model.proj.weight) == 4  # r²


@pytest.mark.parametrize(("rank", "shapes"), [(1, {(2, 3), (1, 4), (4, 1)}), (2, {(2, 3), (4, 4)})])
def test_lokr(rank, shapes):
    method = LoKr(targets="in_proj", rank=rank, scale=0.7)
    model = attached(method, 8, 12)
    own = tensors(method)
    assert {tuple(p.shape) for p in own.values()} == shapes
    second = own["second"] if rank == 2 else own["up"] @ own["down"]
    check(model, model.proj.weight + 0.7 * torch.kron(own["first"], second))


@pytest.mark.parametrize("rank", [4, 5])  # 5 does not divide 12
def test_miss_sums_the_input_over_groups(rank):
    method = MiSS(targets="in_proj", rank=rank)
    model = attached(method, 8, 12)
    sums = torch.zeros(5, rank, dtype=torch.float64)
    for j in range(12):
        sums[:, j % rank] += X[:, j]
    expected = F.linear(X, model.proj.weight, model.proj.bias) + sums @ tensors(method)["block"].T
    torch.testing.assert_close(model(X), expected, rtol=1e-11, atol=1e-12)


def test_hira():
    method = HiRA(targets="in_proj", rank=2)
    model = attached(method, 8, 12)
    own = tensors(method)
    check(model, model.proj.weight * (1 + own["up"] @ own["down"]))


@pytest.mark.parametrize(("block_size", "taken"), [(4, 4), (3, 2), (1, 1), (99, 4)])
def test_c3a_entry_by_entry(block_size, taken):
    """The block size is the largest common divisor of 8 and 12 up to the one that is asked for."""
    method = C3A(targets="in_proj", block_size=block_size)
    model = attached(method, 8, 12)
    kernels, b = tensors(method)["kernels"], taken
    assert kernels.shape == (8 // b, 12 // b, b)
    expected = model.proj.weight.clone()
    for o in range(8):
        for i in range(12):
            expected[o, i] += kernels[o // b, i // b, (i % b - o % b) % b] / 12
    check(model, expected)


def test_cdvft():
    method = CDVFT(targets="in_proj", scale=0.7)
    model = attached(method, 8, 12)
    own = tensors(method)
    circulant = torch.zeros(8, 12, dtype=torch.float64)
    for o in range(8):
        for i in range(12):
            circulant[o, i] = own["kernels"][o // 4, i // 4, (i - o) % 4]
    check(model, model.proj.weight + 0.7 * torch.diag(own["outputs"]) @ circulant @ torch.diag(own["inputs"]))
    assert sum(p.numel() for p in own.values()) == math.lcm(8, 12) + 8 + 12


def test_fourierft_entry_by_entry():
    method = FourierFT(targets="in_proj", n_frequency=5, scale=30.0)
    model = attached(method, 4, 6)
    expected = model.proj.weight.clone()
    for place, c in zip(method.places_4x6.tolist(), tensors(method)["spectrum"]):
        u, v = divmod(place, 6)
        for o in range(4):
            for i in range(6):
                expected[o, i] += 30 / 24 * c * cmath.exp(2j * math.pi * (u * o / 4 + v * i / 6)).real
    check(model, expected)
    assert method.index_limits() == {"places_4x6": 24}


def test_fourierft_shares_places_between_weights_of_one_shape():
    method = FourierFT(targets=["in_proj", "out_proj"], n_frequency=50)
    adapt(tiny_backbone(), {"m": method}, CLASSES)
    places = {name: tensor for name, tensor in method.saved().items() if "spectrum" not in name}
    assert set(places) == {"places_128x32", "places_32x64"}
    assert all(tensor.unique().numel() == 50 for tensor in places.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda i: C3A(targets="in_proj", block_size=4, init=i),
        lambda i: FourierFT(targets="in_proj", n_frequency=20, init=i),
    ],
    ids=["c3a", "fourierft"],
)
def test_starts_as_published_or_at_zero(make):
    published, zero = make("published"), make("zero")
    moved, still = attached(published, 8, 12, move=0), attached(zero, 8, 12, move=0)
    assert not published.identity_at_init and zero.identity_at_init
    assert not torch.equal(moved.present, moved.proj.weight) and torch.equal(still.present, still.proj.weight)
    still(X).square().sum().backward()
    assert all(p.grad.all() for p in zero.owned().values())  # it leaves zero


def test_published_starts():
    """C3A: Xavier-uniform in the sides of the weight; FourierFT: normal."""
    c3a, fourier = C3A(targets="in_proj", block_size=32), FourierFT(targets="in_proj", n_frequency=2000)
    attached(c3a, 64, 96, move=0), attached(fourier, 64, 96, move=0)
    bound = math.sqrt(6 / (64 + 96))
    kernels = tensors(c3a)["kernels"]
    assert 0.97 * bound < kernels.abs().max() <= bound and abs(kernels.mean()) < 0.2 * bound
    assert 0.9 < tensors(fourier)["spectrum"].std() < 1.1


# -- multiplicative ------------------------------------------------------------------------------------------------


def test_ia3_scales_outputs_and_the_bias():
    method = IA3(targets="in_proj")
    model = attached(method, 8, 12)
    expected = tensors(method)["scale"] * F.linear(X, model.proj.weight, model.proj.bias)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_ia3_on_rows_leaves_the_other_outputs_alone():
    method = IA3(targets="in_proj", rows="z")
    model = attached(method, 8, 12)
    expected = F.linear(X, model.proj.weight, model.proj.bias)
    torch.testing.assert_close(model(X)[:, :4], expected[:, :4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(X)[:, 4:], tensors(method)["scale"] * expected[:, 4:], rtol=1e-12, atol=1e-12)


def test_ia3_scales_inputs():
    method = IA3(targets="in_proj", side="inputs")
    model = attached(method, 8, 12)
    expected = F.linear(X * tensors(method)["scale"], model.proj.weight, model.proj.bias)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: IA3(targets="in_proj"), lambda: BOFT(targets="in_proj")], ids=["ia3", "boft"])
def test_scales_have_no_weight_decay(make):
    method = make()
    attached(method, 8, 12)
    decay = {id(p): group["decay_mult"] for group in method.param_groups() for p in group["params"]}
    assert {name: decay[id(p)] for name, p in tensors(method).items()} == {
        name: 0.0 if name == "scale" else 1.0 for name in tensors(method)
    }


@pytest.mark.parametrize("rank", [1, 2, 5, 6])
def test_hra_is_a_product_of_reflections(rank):
    method = HRA(targets="in_proj", rank=rank)
    model = attached(method, 8, 12)
    expected = model.proj.weight
    for u in tensors(method)["u"]:
        expected = expected @ (torch.eye(12, dtype=torch.float64) - 2 * torch.outer(u, u) / u.square().sum())
    check(model, expected)


@pytest.mark.parametrize("rank", [5, 6])
def test_reflections_cancel_at_the_start_where_they_pair_up(rank):
    method = HRA(targets="in_proj", rank=rank)
    model = attached(method, 8, 12, move=0)
    assert method.identity_at_init == (rank == 6)
    assert torch.allclose(model.present, model.proj.weight, rtol=0, atol=1e-13) == method.identity_at_init
    assert len(tensors(method)["u"].unique(dim=0)) == (3 if rank == 6 else 5)


def rotation(entries: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Q with `entries` above its diagonal, row by row, and (1 + Q)(1 - Q)^-1."""
    Q = torch.zeros(size, size, dtype=torch.float64)
    above = [(i, j) for i in range(size) for j in range(i + 1, size)]
    for (i, j), entry in zip(above, entries, strict=True):
        Q[i, j], Q[j, i] = entry, -entry
    one = torch.eye(size, dtype=torch.float64)
    return Q, (one + Q) @ torch.linalg.inv(one - Q)


@pytest.mark.parametrize(("block_size", "taken"), [(4, 4), (5, 4), (12, 12)])
def test_oft_with_the_inverse(block_size, taken):
    method = OFT(targets="in_proj", block_size=block_size, neumann_terms=None)
    model = attached(method, 8, 12)
    R = torch.block_diag(*(rotation(entries, taken)[1] for entries in tensors(method)["skew"]))
    torch.testing.assert_close(R @ R.T, torch.eye(12, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    check(model, model.proj.weight @ R.T)


@pytest.mark.parametrize("terms", [3, 5, 7])
def test_oft_as_a_series(terms):
    method = OFT(targets="in_proj", block_size=4, neumann_terms=terms)
    model = attached(method, 8, 12)
    blocks = []
    for entries in tensors(method)["skew"]:
        Q, _ = rotation(entries, 4)
        powers = [torch.linalg.matrix_power(Q, k) for k in range(terms)]
        blocks.append(powers[0] + 2 * sum(powers[1:-1]) + powers[-1])
    check(model, model.proj.weight @ torch.block_diag(*blocks).T)


def test_the_series_of_oft_differs_by_the_fourth_power_of_q():
    """1 + 2 Q + 2 Q² + 2 Q³ + Q⁴ instead of 1 + 2 Q + 2 Q² + …: apart by Q⁴ + 2 Q⁵ + …"""
    methods = [OFT(targets="in_proj", neumann_terms=n) for n in (5, None)]
    series, exact = (attached(method, 8, 12, move=0.01) for method in methods)
    size = torch.linalg.matrix_norm(rotation(tensors(methods[0])["skew"][0], 12)[0], 2)
    most = torch.linalg.matrix_norm(exact.proj.weight, 2) * (size**4 + 2 * size**5 / (1 - size))
    assert most / 100 < torch.linalg.matrix_norm(series.present - exact.present, 2) < most


def butterfly(blocks: Tensor, level: int) -> Tensor:
    """The factor of one level as a dense matrix: block after block, which inputs it mixes and how."""
    count, size, _ = blocks.shape
    half, run = size // 2, 2**level
    dense = torch.zeros(count * size, count * size, dtype=torch.float64)
    for k in range(count):
        first = (k // run) * 2 * run + k % run  # run of size / 2 inputs; its partner lies 2^level runs further on
        inputs = [r * half + h for r in (first, first + run) for h in range(half)]
        S = (blocks[k] - blocks[k].T) / 2
        one = torch.eye(size, dtype=torch.float64)
        dense[torch.tensor(inputs)[:, None], torch.tensor(inputs)] = (one + S) @ torch.linalg.inv(one - S)
    return dense


@pytest.mark.parametrize(("block_size", "factors"), [(4, 1), (2, 1), (2, 2), (2, 3), (4, 2), (4, 3)])
def test_boft(block_size, factors):
    method = BOFT(targets="in_proj", block_size=block_size, factors=factors)
    model = attached(method, 6, 16)
    own = tensors(method)
    product = torch.eye(16, dtype=torch.float64)
    for level in range(factors):
        product = product @ butterfly(own["blocks"][level], level)
    torch.testing.assert_close(product @ product.T, torch.eye(16, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    check(model, torch.diag(own["scale"]) @ model.proj.weight @ product)
    if block_size * 2 ** (factors - 1) == 16:  # enough factors mix every input with every other one
        assert product.all()


def test_boft_takes_the_largest_block_that_fits():
    sizes = {}
    for factors in (1, 2):
        method = BOFT(targets="in_proj", block_size=5, factors=factors)
        attached(method, 6, 12)
        sizes[factors] = tensors(method)["blocks"].shape[-1]
    assert sizes == {1: 4, 2: 2}  # 4 · 2 does not divide 12


# -- options of LoRA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["activation", "weight"])
def test_pissa(space):
    method = LoRA(targets="in_proj", rank=3, scale=0.5, init="pissa", space=space)
    model = attached(method, 8, 12, move=0)
    W, own = model.proj.weight, tensors(method)
    vectors = torch.linalg.eigh(W @ W.T).eigenvectors
    best = vectors[:, -3:] @ vectors[:, -3:].T @ W  # of rank 3, in the Frobenius norm
    torch.testing.assert_close(0.5 * own["up"] @ own["down"], best, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(own["up"].norm(dim=0), own["down"].norm(dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(X), F.linear(X, W, model.proj.bias), rtol=1e-12, atol=1e-12)
    assert {"proj.weight.first_up", "proj.weight.first_down"} < set(method.saved())
    first = {name: p.detach().clone() for name, p in own.items()}
    with torch.no_grad():
        own["up"] += 0.3
        own["down"] -= 0.2
    expected = W - best + 0.5 * (first["up"] + 0.3) @ (first["down"] - 0.2)
    torch.testing.assert_close(model(X), F.linear(X, expected, model.proj.bias), rtol=1e-10, atol=1e-12)
    method.to_weight_space(model)
    torch.testing.assert_close(model.present, expected, rtol=1e-10, atol=1e-12)


def test_pissa_of_the_patch_embedding():
    """A convolution's factors are convolutions."""
    method = LoRA(targets="patch_embed", rank=4, init="pissa")
    model = adapt(tiny_backbone(), {"m": method}, CLASSES).eval()
    torch.testing.assert_close(pooled(model.backbone, IMAGES), pooled(tiny_backbone().eval(), IMAGES))
    expected = move(model)(IMAGES)
    model.merge()
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-10, atol=1e-12)


def test_rslora_scales_with_the_root_of_the_rank():
    plain = attached(LoRA(targets="in_proj", rank=4, scale=0.35), 8, 12)
    stable = attached(LoRA(targets="in_proj", rank=4, scale=0.7, rank_stabilised=True), 8, 12)
    torch.testing.assert_close(stable(X), plain(X), rtol=1e-12, atol=1e-12)


def test_lora_plus_gives_up_its_own_rate():
    method = LoRA(targets="in_proj", rank=4, lr_mult=2.0, up_lr_mult=16.0)
    attached(method, 8, 12)
    rate = {id(p): group["lr_mult"] for group in method.param_groups() for p in group["params"]}
    assert {name: rate[id(p)] for name, p in tensors(method).items()} == {"down": 2.0, "up": 32.0}


# -- all of them ---------------------------------------------------------------------------------------------------

ALL = {
    "vera": lambda **of: VeRA(rank=3, **of),
    "loha": lambda **of: LoHa(rank=2, **of),
    "lokr": lambda **of: LoKr(rank=1, **of),
    "miss": lambda **of: MiSS(rank=4, **of),
    "hira": lambda **of: HiRA(rank=2, **of),
    "c3a": lambda **of: C3A(block_size=4, **of),
    "cdvft": lambda **of: CDVFT(**of),
    "fourierft": lambda **of: FourierFT(n_frequency=9, **of),
    "ia3": lambda **of: IA3(**of),
    "hra": lambda **of: HRA(rank=2, **of),
    "oft": lambda **of: OFT(block_size=4, **of),
    "boft": lambda **of: BOFT(block_size=4, factors=2, **of),
    "pissa": lambda **of: LoRA(rank=3, init="pissa", **of),
}
each = pytest.mark.parametrize("make", ALL.values(), ids=list(ALL))


@each
def test_only_the_named_rows_change(make):
    method: Method = make(targets="in_proj", rows="z")
    model = attached(method, 16, 8)
    method.to_weight_space(model)
    same = torch.isclose(model.present, model.proj.weight, rtol=0, atol=1e-13)
    assert same[:8].all() and not same[8:].all(dim=1).any()


@each
def test_a_convolution_is_a_matrix_of_all_its_inputs(make):
    model = adapt(tiny_backbone(), {"m": make(targets="patch_embed")}, CLASSES).eval()
    before = pooled(model.backbone, IMAGES)
    expected = pooled(move(model).backbone, IMAGES)
    assert not torch.allclose(expected, before)
    assert model.merge() == {}
    torch.testing.assert_close(pooled(model.backbone, IMAGES), expected, rtol=1e-10, atol=1e-12)


@each
def test_on_a_transformer(make):
    """Other roles, maps with biases, and none that reads its weight without a port."""
    row = (ON_VIT,)
    base = pooled(tiny_backbone(row).eval(), IMAGES)
    model = adapt(tiny_backbone(row), {"m": make(targets=["qkv", "attn_out", "mlp_up", "mlp_down"])}, CLASSES).eval()
    if all(method.identity_at_init for method in model.methods.values()):
        torch.testing.assert_close(pooled(model.backbone, IMAGES), base, rtol=1e-11, atol=1e-12)
    expected = pooled(move(model).backbone, IMAGES)
    assert not torch.allclose(expected, base)
    assert model.merge() == {}
    torch.testing.assert_close(pooled(model.backbone, IMAGES), expected, rtol=1e-10, atol=1e-12)


@each
def test_a_vector_is_refused(make):
    with pytest.raises(UserError, match=r"m: norm_f.weight is a vector of 32 numbers"):
        adapt(tiny_backbone(), {"m": make(targets="norm_f.weight")}, CLASSES)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VeRA(targets="in_proj", rank=0), "rank=0"),
        (lambda: HRA(targets="in_proj", rank=-1), "rank=-1"),
        (lambda: C3A(targets="in_proj", block_size=4, init="gaussian"), "'published' or 'zero'"),
        (lambda: FourierFT(targets="in_proj", init="ones"), "'published' or 'zero'"),
        (lambda: OFT(targets="in_proj", neumann_terms=2), "neumann_terms=2"),
        (lambda: BOFT(targets="in_proj", factors=0), "factors=0"),
        (lambda: IA3(targets="in_proj", side="both"), "'outputs' or 'inputs'"),
        (lambda: LoRA(targets="in_proj", rank=2, init="svd"), "'zero' or 'pissa'"),
        (lambda: LoRA(targets="in_proj", rank=2, up_lr_mult=-1.0), "up_lr_mult=-1.0"),
        (lambda: LoRA(targets="in_proj", rank=2, init="pissa", scale=0.0), "scale=0.0"),
    ],
)
def test_wrong_arguments(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (FourierFT(targets="in_proj", n_frequency=97), "proj.weight has 96 entries"),
        (MiSS(targets="in_proj", rank=13), "12 inputs"),
        (OFT(targets="in_proj", block_size=1), "raise block_size"),
        (BOFT(targets="in_proj", block_size=4, factors=4), "lower factors"),
        (LoRA(targets="in_proj", rank=9, init="pissa"), "8 singular values"),
    ],
)
def test_sizes_that_do_not_fit(method, words):
    with pytest.raises(UserError) as error:
        attached(method, 8, 12)
    assert words in str(error.value) and "mine" in str(error.value)
