"""Inputs, references and the error measure that the kernels' tests and their benchmark share."""

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from mambapeft_kernels import Direction, ssm_mixer
from mambapeft_kernels.selective_scan.naive import selective_scan
from torch import Tensor

FIELDS = Direction._fields[:-1]


def make_directions(
    channels: int,
    states: int = 16,
    rank: int | None = None,
    groups: int = 2,
    offsets: bool = True,
    decay: float = 0.0,
    step: float = -3.0,
    device: str = "cpu",
    seed: int = 0,
) -> list[Direction]:
    """Random weights in float64: `decay` shifts A_log (very negative: long memory), `step` is the mean dt_bias."""
    gen = torch.Generator().manual_seed(seed)
    rank = max(1, channels // 32) if rank is None else rank

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(device)

    ladder = torch.arange(1, states + 1, dtype=torch.float64).log().to(device)  # as Mamba initialises A_log
    return [
        Direction(
            conv_weight=draw(channels, 4) / 2,
            conv_bias=draw(channels) / 2,
            x_proj=draw(rank + 2 * states, channels) / channels**0.5,
            dt_proj=draw(channels, rank) / rank**0.5,
            dt_bias=draw(channels) + step,
            A_log=draw(channels, states) / 2 + ladder + decay,
            D=draw(channels),
            state_offset=draw(channels, states) if offsets else None,
            output_offset=draw(channels) if offsets else None,
            reverse=bool(g % 2),
        )
        for g in range(groups)
    ]


def make_xz(batch: int, length: int, channels: int, device: str = "cpu", seed: int = 1) -> Tensor:
    """[B, L, 2E] float64: x and z are its halves, as in_proj makes them."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 2 * channels, generator=gen, dtype=torch.float64).to(device)


def cast(directions: list[Direction], dtype: torch.dtype, grad: bool = True) -> list[Direction]:
    """Fresh leaves of the directions in `dtype`."""
    return [_with_tensors(direction, lambda t: t.detach().to(dtype).requires_grad_(grad)) for direction in directions]


def _with_tensors(direction: Direction, change: Callable[[Tensor], Tensor]) -> Direction:
    changed = {name: change(t) for name, t in direction._asdict().items() if isinstance(t, Tensor)}
    return Direction(**{**direction._asdict(), **changed})


def plain_mixer(x: Tensor, z: Tensor, directions: list[Direction], scale: float = 0.5) -> Tensor:
    """Plain PyTorch as autocast runs it: products, convolution and activations in x's dtype, the scan in float32."""
    outputs = []
    for d in directions:
        states, rank, taps = d.A_log.shape[1], d.dt_proj.shape[1], d.conv_weight.shape[1]
        w = _with_tensors(d, lambda t: t.to(x.dtype))
        seq = (x.flip(1) if d.reverse else x).transpose(1, 2)
        conv = F.conv1d(seq, w.conv_weight[:, None], w.conv_bias, padding=taps - 1, groups=x.shape[2])
        u = F.silu(conv[..., : x.shape[1]]).transpose(1, 2)
        dt, B, C = F.linear(u, w.x_proj).split([rank, states, states], dim=-1)
        delta = F.softplus(F.linear(dt, w.dt_proj, w.dt_bias))
        wide = torch.promote_types(x.dtype, torch.float32)
        offsets = [t if t is None else t.to(wide) for t in (d.state_offset, d.output_offset)]
        A = -torch.exp(d.A_log.to(wide))
        u, delta, B, C, D = (t.to(wide) for t in (u, delta, B, C, d.D))
        y = selective_scan(u, delta, A, B, C, D, False, *offsets)
        y = y.to(x.dtype)
        outputs.append(y.flip(1) if d.reverse else y)
    return scale * reduce(torch.add, outputs) * F.silu(z)


def results(
    xz: Tensor,
    directions: list[Direction],
    dtype: torch.dtype,
    backend: str,
    weight_dtype: torch.dtype | None = None,
    seed: int = 2,
) -> dict[str, Tensor]:
    """Output and every gradient (xz, each weight) for a fixed random output gradient; "plain" is `plain_mixer`."""
    xz = xz.detach().to(dtype).requires_grad_()
    directions = cast(directions, weight_dtype or dtype)
    if backend == "plain":
        x, z = xz.chunk(2, dim=-1)
        out = plain_mixer(x, z, directions)
    else:
        out = ssm_mixer(xz, directions, backend=backend)
    gen = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(out.device)
    leaves = {"xz": xz}
    for i, d in enumerate(directions):
        leaves |= {f"{name}[{i}]": t for name, t in d._asdict().items() if isinstance(t, Tensor)}
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach(), **{f"d {name}": g for name, g in zip(leaves, grads)}}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value - reference‖ / ‖reference‖ in float64; NaN stays NaN and passes no bar."""
    reference = reference.double()
    difference = (value.double() - reference).norm()
    scale = reference.norm()
    return (difference if scale == 0 else difference / scale).item()


def errors(value: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Name → relative error."""
    return {name: relative_error(value[name], reference[name]) for name in reference}
