"""A second opinion: the reference's behaviour written down densely, from its description, for any configuration.

Everything is a sum of dense weights and plain sequences, one direction after the other, reversed by flipping. It
shares no code with the package. `state_shapes` says which tensors a configuration has.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = (("", "A_log", "D"), ("_b", "A_b_log", "D_b"))
ROW_BLOCKS = ("d", "B", "C")


def scan(xz: Tensor, conv: tuple, x_proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """One direction in its own order: [B, L, 2E] → gated output [B, L, E]."""
    x, z = xz.chunk(2, -1)
    taps = conv[0].shape[-1]
    padded = F.conv1d(x.transpose(1, 2), *conv, padding=taps - 1, groups=x.shape[-1])
    u = F.silu(padded[..., : x.shape[1]].transpose(1, 2))
    dt, B, C = (u @ x_proj.T).split([dt_weight.shape[1], A.shape[1], A.shape[1]], -1)
    delta = F.softplus(dt @ dt_weight.T + dt_bias)
    h, out = torch.zeros(len(x), *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * u[:, t, :, None] * B[:, t, None]
        out.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(out, 1) * F.silu(z)


def low_rank(p: dict, name: str, weight: Tensor, scale: float, dora: bool) -> Tensor:
    product = scale * p[f"{name}.adapter_up.weight"] @ p[f"{name}.adapter_down.weight"]
    if not dora:
        return product
    moved = weight + product
    return p[f"{name}.m"] * moved / moved.norm(dim=0, keepdim=True).detach() - weight


def on_rows(delta: Tensor, rows: slice, like: Tensor) -> Tensor:
    full = torch.zeros_like(like)
    return full.index_put((torch.arange(len(like))[rows],), delta)


def tokens_of(p: dict, name: str, projection: bool) -> Tensor:
    table = p[f"{name}.embedding.weight"]
    if not projection:
        return table
    hidden = torch.tanh(table @ p[f"{name}.transform.0.weight"].T + p[f"{name}.transform.0.bias"])
    return hidden @ p[f"{name}.transform.2.weight"].T + p[f"{name}.transform.2.bias"]


def offset(p: dict, k: dict, switch: str, name: str, tensor: Tensor) -> Tensor:
    return tensor + p[name] if k[f"learnable_{switch}"] and k[f"learnable_{switch}_v2"] else tensor


def interleave(sequence: Tensor, tokens: Tensor) -> tuple[Tensor, list[int]]:
    """Tokens between the parts of torch.tensor_split, and where the sequence's own elements are."""
    pieces, keep, length = [], [], 0
    for i, part in enumerate(torch.tensor_split(sequence, tokens.shape[1] + 1, 1)):
        keep += range(length, length + part.shape[1])
        length += part.shape[1]
        pieces.append(part)
        if i < tokens.shape[1]:
            pieces.append(tokens[:, i : i + 1])
            length += 1
    return torch.cat(pieces, 1), keep


def sequences(kind: str | None, xz: Tensor, own: Tensor | None, n: int):
    """(forward sequence, positions kept), (backward sequence in its own order, positions kept)."""
    length = xz.shape[1]
    flipped, plain = xz.flip(1), list(range(length))
    if kind is None:
        return (xz, plain), (flipped, plain)
    if kind == "outer_single_prefix":
        return (xz, plain[n:]), (flipped, plain[: length - n])
    if kind == "outer_dual_prefix":
        return (xz, plain[n : length - n]), (flipped, plain[n : length - n])
    forward, backward = (own, own) if "single" in kind else own.chunk(2, -1)
    if kind.endswith("prefix"):
        keep = list(range(n, n + length))
        return (torch.cat([forward, xz], 1), keep), (torch.cat([backward, flipped], 1), keep)
    joined, keep = interleave(xz, forward)
    if kind == "inner_single_infix":
        return (joined, keep), (joined.flip(1), [joined.shape[1] - 1 - i for i in reversed(keep)])
    return (joined, keep), interleave(flipped, backward)


def direction_weights(p: dict, k: dict, mixer: str, suffix: str, log: str, skip: str) -> tuple:
    """conv, x_proj, dt weight and bias, A, D of one direction with everything added."""
    A_log, x_proj = p[mixer + log], p[f"{mixer}x_proj{suffix}.weight"]
    dt, states, rank = p[f"{mixer}dt_proj{suffix}.weight"], A_log.shape[1], p[f"{mixer}dt_proj.weight"].shape[1]
    A = -offset(p, k, "A", f"{mixer}learnable_{log}", A_log).exp()
    blocks = dict(zip(ROW_BLOCKS, (slice(0, rank), slice(rank, rank + states), slice(rank + states, None))))
    rows = x_proj
    if k["lora_x_proj"]:
        rows = rows + low_rank(p, f"{mixer}lora_x_proj{suffix}", x_proj, k["s_x_proj"], k["use_dora"])
    for name, block in blocks.items():
        if k[f"lora_{name}"]:
            change = low_rank(p, f"{mixer}lora_{name}{suffix}", x_proj[block], k[f"s_{name}"], k["use_dora"])
            rows = rows + on_rows(change, block, x_proj)
    if k["lora_dt"]:
        dt = dt + low_rank(p, f"{mixer}lora_dt{suffix}", dt, k["s_dt"], k["use_dora"])
    if k["additional_scan"]:
        more = k["scan_addition_num"]
        extra, extra_rows = -p[f"{mixer}{log}_scan_addi"].exp(), p[f"{mixer}x_proj{suffix}_scan_addi.weight"]
        new, old = (extra_rows[:more], extra_rows[more:]), (rows[rank : rank + states], rows[rank + states :])
        after = k["scan_addition_pos"] == "suffix"
        A = torch.cat([A, extra] if after else [extra, A], 1)
        pairs = [(o, n) if after else (n, o) for o, n in zip(old, new)]
        rows = torch.cat([rows[:rank], *pairs[0], *pairs[1]])
    conv = offset(p, k, "conv1d", f"{mixer}learnable_conv1d_weight{suffix}", p[f"{mixer}conv1d{suffix}.weight"])
    bias = offset(p, k, "bias", f"{mixer}learnable_bias{suffix}", p[f"{mixer}dt_proj{suffix}.bias"])
    D = offset(p, k, "D", f"{mixer}learnable_{skip}", p[mixer + skip])
    return (conv, p[f"{mixer}conv1d{suffix}.bias"]), rows, dt, bias, A, D


def mixer_output(p: dict, k: dict, module: dict, mixer: str, h: Tensor, own: Tensor | None) -> Tensor:
    kind = k["prefix_type"] if k["prefix_tuning"] else None
    n = 0 if own is None else own.shape[1]
    if kind == "outer_single_prefix":
        h = torch.cat([own, h], 1)
    elif kind == "outer_dual_prefix":
        first, second = own.chunk(2, -1)
        h = torch.cat([first, h, second], 1)
    weight, dora = p[f"{mixer}in_proj.weight"], k["use_dora"]
    half, total = len(weight) // 2, weight
    for name, rows in (("in_proj", slice(None)), ("X", slice(0, half)), ("Z", slice(half, None))):
        if k[f"lora_{name}"]:
            total = total + on_rows(
                low_rank(p, f"{mixer}lora_{name}", weight[rows], k[f"s_{name}"], dora), rows, weight
            )
    both = sequences(kind, h @ total.T, own, n)
    forward, backward = (
        scan(sequence, *direction_weights(p, k, mixer, *names))[:, keep]
        for names, (sequence, keep) in zip(DIRECTIONS, both)
    )
    y = forward + backward.flip(1)
    y = y / 2 if module["if_devide_out"] else y
    weight = p[f"{mixer}out_proj.weight"]
    out = y @ (weight + low_rank(p, f"{mixer}lora_out_proj", weight, k["s"], dora) if k["lora_out_proj"] else weight).T
    if k["adaptformer"]:
        inner = F.relu(y @ p[f"{mixer}adaptf.adapter_down.weight"].T)
        out = out + k["s_adaptf"] * inner @ p[f"{mixer}adaptf.adapter_up.weight"].T
    return out


def add_prompt(k: dict, x: Tensor, prompt: Tensor, index: int) -> tuple[Tensor, int]:
    if k["prompt_type"] == "prefix":
        return torch.cat([prompt, x], 1), index + prompt.shape[1]
    if k["prompt_type"] == "suffix":
        return torch.cat([x, prompt], 1), index
    first, second = torch.tensor_split(prompt, 2, 1)
    return torch.cat([first, x, second], 1), index + first.shape[1]


def logits(state: dict[str, Tensor], k: dict, module: dict, images: Tensor) -> Tensor:
    """What the reference computes in evaluation mode."""
    p = {name.removeprefix("module."): t for name, t in state.items()}
    stride, batch = module["stride"], len(images)
    x = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=stride)
    if k["lora_patch_embed"]:
        low = F.conv2d(images, p["patch_embed.lora_patch_embed.adapter_down.weight"], stride=stride)
        x = x + k["s_patch_embed"] * F.conv2d(low, p["patch_embed.lora_patch_embed.adapter_up.weight"])
    x = x.flatten(2).transpose(1, 2)
    index = x.shape[1] // 2
    token = offset(p, k, "cls_token", "learnable_cls_token", p["cls_token"]).expand(batch, -1, -1)
    x = torch.cat([x[:, :index], token, x[:, index:]], 1)
    x = offset(p, k, "pos_embed", "learnable_pos_embed", x + p["pos_embed"])
    if k["prompt_tuning"]:
        prompt = tokens_of(p, "prompt_encoder", k["prompt_projection"]).expand(batch, -1, -1)
        x, index = add_prompt(k, x, prompt, index)
    own = [None] * module["depth"]
    if k["prefix_tuning"]:
        table = tokens_of(p, "prefix_encoder", k["prefix_projection"]).expand(batch, -1, -1)
        own = table.chunk(module["depth"], -1)

    def norm(v: Tensor, weight: Tensor) -> Tensor:
        return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + module["norm_epsilon"]) * weight

    residual = x
    for i in range(module["depth"]):
        normed = norm(residual, p[f"layers.{i}.norm.weight"])
        residual = residual + mixer_output(p, k, module, f"layers.{i}.mixer.", normed, own[i])
    return norm(residual, p["norm_f.weight"])[:, index] @ p["head.weight"].T + p["head.bias"]


def state_shapes(k: dict, module: dict, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the reference's state dict."""
    D, depth, patch = module["embed_dim"], module["depth"], module["patch_size"]
    E, R, N = 2 * D, math.ceil(D / 16), (module.get("ssm_cfg") or {}).get("d_state", 16)
    grid = (module["img_size"] - patch) // module["stride"] + 1
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, grid * grid + 1, D), "norm_f.weight": (D,)}
    shapes |= {"patch_embed.proj.weight": (D, 3, patch, patch), "patch_embed.proj.bias": (D,)}

    def learnable(switch: str) -> bool:
        return k[f"learnable_{switch}"] and k[f"learnable_{switch}_v2"]

    def adapter(name: str, inputs: int, outputs: int, rank: int, magnitude: bool = True) -> None:
        shapes[f"{name}.adapter_down.weight"] = (rank, inputs)
        shapes[f"{name}.adapter_up.weight"] = (outputs, rank)
        if k["use_dora"] and magnitude:
            shapes[f"{name}.m"] = (1, inputs)

    def encoder(name: str, n: int, width: int, out: int, projection: bool, hidden: int) -> None:
        shapes[f"{name}.embedding.weight"] = (n, width if projection else out)
        if projection:
            shapes[f"{name}.transform.0.weight"], shapes[f"{name}.transform.0.bias"] = (hidden, width), (hidden,)
            shapes[f"{name}.transform.2.weight"], shapes[f"{name}.transform.2.bias"] = (out, hidden), (out,)

    shapes |= {f"learnable_{s}": shapes[s] for s in ("cls_token", "pos_embed") if learnable(s)}
    if k["lora_patch_embed"]:
        rank = k["dim_patch_embed"]
        shapes["patch_embed.lora_patch_embed.adapter_down.weight"] = (rank, 3, patch, patch)
        shapes["patch_embed.lora_patch_embed.adapter_up.weight"] = (D, rank, 1, 1)
    if k["prefix_tuning"]:
        width = 2 * E if k["prefix_type"].startswith("inner") else D
        out = depth * width * (2 if "dual" in k["prefix_type"] else 1)
        hidden = k["encoder_hidden_size"] or width
        encoder("prefix_encoder", k["num_virtual_tokens"], width, out, k["prefix_projection"], hidden)
    if k["prompt_tuning"]:
        encoder("prompt_encoder", k["prompt_num_tokens"], D, D, k["prompt_projection"], D)
    for i in range(depth):
        m = f"layers.{i}.mixer."
        shapes |= {f"layers.{i}.norm.weight": (D,), f"{m}in_proj.weight": (2 * E, D), f"{m}out_proj.weight": (D, E)}
        for suffix, log, skip in DIRECTIONS:
            shapes |= {m + log: (E, N), m + skip: (E,), f"{m}x_proj{suffix}.weight": (R + 2 * N, E)}
            shapes |= {f"{m}conv1d{suffix}.weight": (E, 1, 4), f"{m}conv1d{suffix}.bias": (E,)}
            shapes |= {f"{m}dt_proj{suffix}.weight": (E, R), f"{m}dt_proj{suffix}.bias": (E,)}
            offsets = {"A": (f"learnable_{log}", (E, N)), "D": (f"learnable_{skip}", (E,))}
            offsets["bias"] = (f"learnable_bias{suffix}", (E,))
            offsets["conv1d"] = (f"learnable_conv1d_weight{suffix}", (E, 1, 4))
            shapes |= {m + name: shape for switch, (name, shape) in offsets.items() if learnable(switch)}
            if k["additional_scan"]:
                shapes[f"{m}{log}_scan_addi"] = (E, k["scan_addition_num"])
                shapes[f"{m}x_proj{suffix}_scan_addi.weight"] = (2 * k["scan_addition_num"], E)
            for name, outputs in (("x_proj", R + 2 * N), ("d", R), ("B", N), ("C", N)):
                if k[f"lora_{name}"]:
                    adapter(f"{m}lora_{name}{suffix}", E, outputs, k[f"dim_{name}"])
            if k["lora_dt"]:
                adapter(f"{m}lora_dt{suffix}", R, E, k["dim_dt"])
        for name, inputs, outputs, rank in (
            ("out_proj", E, D, k["dim"]),
            ("in_proj", D, 2 * E, k["dim_in_proj"]),
            ("X", D, E, k["dim_X"]),
            ("Z", D, E, k["dim_Z"]),
        ):
            if k[f"lora_{name}"]:
                adapter(f"{m}lora_{name}", inputs, outputs, rank)
        if k["adaptformer"]:
            adapter(f"{m}adaptf", E, D, k["dim_adaptf"], magnitude=False)
    named = {f"module.{name}": shape for name, shape in shapes.items()}
    return named | {"head.weight": (classes, D), "head.bias": (classes,)}
