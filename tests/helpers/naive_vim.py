"""Vim written out naively, token by token, with places to change it by hand: what methods' formulas are checked on.

Shares nothing with the backbone but the names of its weights. B batch, L tokens, D embed_dim, E channels, N states.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = list[Tensor]  # one tensor [B, C] for each token
NAMES = (
    {"A": "A_log", "D": "D", "suffix": "", "reverse": False},
    {"A": "A_b_log", "D": "D_b", "suffix": "_b", "reverse": True},
)


@dataclass
class Changes:
    """What a method does beside changing weights."""

    # (layer, direction, rows of in_proj's output in reading order) → rows, and where the original ones are in them
    inner: Callable[[int, int, Rows], tuple[Rows, list[int]]] | None = None
    # (layer, direction, rows of hidden states in natural order) → the same
    outer: Callable[[int, int, Rows], tuple[Rows, list[int]]] | None = None
    gate: Callable[[int, Tensor], Tensor] | None = None  # (layer, z [B, L, E]) → z
    state: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (layer, direction) → h' [E, N]
    output: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (layer, direction) → y' [E]
    prompt: Callable[[Rows, int], tuple[Rows, int]] | None = None  # (tokens, class index) → the same


def features(w: dict[str, Tensor], images: Tensor, changes: Changes | None = None) -> Tensor:
    """[B, 3, H, W] → the class token's feature [B, D], for weights by their plain names (8x8 patches)."""
    changes = changes or Changes()
    patches = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    rows = list(patches.flatten(2).unbind(2))
    index = len(rows) // 2
    rows.insert(index, w["cls_token"][0, 0].expand_as(rows[0]))
    rows = [row + w["pos_embed"][0, i] for i, row in enumerate(rows)]
    if changes.prompt:
        rows, index = changes.prompt(rows, index)
    hidden = torch.stack(rows, 1)
    residual = torch.zeros_like(hidden)
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    for i in range(depth):
        residual = residual + hidden
        normed = rms_norm(residual, w[f"layers.{i}.norm.weight"])
        prefix = f"layers.{i}.mixer."
        mine = {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}
        hidden = mixer(i, normed, mine, changes)
    return rms_norm(residual + hidden, w["norm_f.weight"])[:, index]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def mixer(layer: int, h: Tensor, w: dict[str, Tensor], changes: Changes) -> Tensor:
    total = 0
    for direction, names in enumerate(NAMES):
        hidden, at = list(h.unbind(1)), list(range(h.shape[1]))
        if changes.outer:
            hidden, at = changes.outer(layer, direction, hidden)
        x, z = (torch.stack(hidden, 1) @ w["in_proj.weight"].T).chunk(2, dim=-1)
        if changes.gate:
            z = changes.gate(layer, z)
        rows = list(torch.cat((x, z), -1).unbind(1))
        if names["reverse"]:
            rows.reverse()
            at = [len(rows) - 1 - place for place in at]
        if changes.inner:
            order = rows
            rows, places = changes.inner(layer, direction, order)
            at = [places[place] for place in at]
        offsets = changes.state.get((layer, direction)), changes.output.get((layer, direction))
        outputs = scan(rows, w, names, *offsets)
        total = total + torch.stack([outputs[place] for place in at], 1)
    return total / 2 @ w["out_proj.weight"].T


def scan(rows: Rows, w: dict[str, Tensor], names: dict, state: Tensor | None, output: Tensor | None) -> Rows:
    """One direction over rows [B, 2E] in reading order → gated outputs [B, E]."""
    suffix = names["suffix"]
    taps, bias = w[f"conv1d{suffix}.weight"][:, 0], w[f"conv1d{suffix}.bias"]
    A, D = -torch.exp(w[names["A"]]), w[names["D"]]
    channels, states = A.shape
    x_proj, dt_proj = w[f"x_proj{suffix}.weight"], w[f"dt_proj{suffix}.weight"]
    dt_rows = x_proj.shape[0] - 2 * states
    xs = [row[:, :channels] for row in rows]
    h, outputs = 0, []
    for t, row in enumerate(rows):
        window = [xs[t - 3 + k] if t - 3 + k >= 0 else torch.zeros_like(xs[0]) for k in range(4)]
        u = F.silu(sum(window[k] * taps[:, k] for k in range(4)) + bias)
        low, B, C = (u @ x_proj.T).split((dt_rows, states, states), dim=-1)
        delta = F.softplus(low @ dt_proj.T + w[f"dt_proj{suffix}.bias"])
        h = torch.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None]
        read = h if state is None else h + state
        y = (read * C[:, None]).sum(-1) + D * u
        outputs.append((y if output is None else y + output) * F.silu(row[:, channels:]))
    return outputs
