"""The wrapper of the published kernels: what it hands them and makes of what they return, with stand-ins for them."""

import importlib
import sys
import types

import torch
import torch.nn.functional as F
from helpers.kernel_cases import cast, make_directions, make_xz, relative_error
from mambapeft_kernels import ssm_mixer
from mambapeft_kernels.selective_scan.naive import selective_scan


def causal_conv1d_fn(x, weight, bias=None, activation=None):
    """causal-conv1d's function on [B, E, L], from its documentation."""
    assert activation == "silu"
    assert x.is_contiguous()
    taps = weight.shape[1]
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=x.shape[1])[..., : x.shape[2]])


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """mamba-ssm's function: u, delta [B, E, L]; B, C [B, N, L]; A [E, N] negative."""
    assert delta_softplus
    assert z is None
    delta = F.softplus(delta + delta_bias[:, None])
    y = selective_scan(*(t.transpose(1, 2) for t in (u, delta)), A, B.transpose(1, 2), C.transpose(1, 2), D)
    return y.transpose(1, 2)


def test_wrapper_equals_the_definition(monkeypatch):
    conv, package, ops, interface = (
        types.ModuleType(name)
        for name in ("causal_conv1d", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    )
    conv.causal_conv1d_fn, interface.selective_scan_fn = causal_conv1d_fn, selective_scan_fn
    for module in (conv, package, ops, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "mambapeft_kernels.ssm_mixer.published", raising=False)
    wrapper = importlib.import_module("mambapeft_kernels.ssm_mixer.published")
    directions = cast(make_directions(6, 4, 2), torch.float32, grad=False)
    x, z = make_xz(2, 7, 6).float().chunk(2, -1)
    found = wrapper.ssm_mixer(x, z, tuple(directions), 0.5)
    assert relative_error(found, ssm_mixer(x, directions, backend="naive", z=z)) <= 1e-6
    monkeypatch.delitem(sys.modules, "mambapeft_kernels.ssm_mixer.published")
