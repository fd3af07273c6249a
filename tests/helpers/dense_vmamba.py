"""MambaPEFT's VMamba recomputed from its formulas: dense, in float64, with the reference's names of tensors.

Sources: VMamba, arXiv 2401.10166; MambaPEFT, arXiv 2411.03855. One step of the scan at a time; no shared code.
"""

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]
WEIGHTS = ("x_proj", "d", "B", "C", "dt")  # the grouped LoRAs, each with one pair a direction


def sizes(module: dict, stage: int) -> tuple[int, int, int, int]:
    """Width, inner width, rank of dt and states of a stage's blocks."""
    dim = module["dims"][stage]
    rank = module.get("ssm_dt_rank", "auto")
    return dim, int(module["ssm_ratio"] * dim), -(-dim // 16) if rank == "auto" else rank, module["ssm_d_state"]


def rows_of(key: str, rank: int, states: int) -> slice:
    """Rows of x_proj that a LoRA is on."""
    starts = {"x_proj": 0, "d": 0, "B": rank, "C": rank + states}
    ends = {"x_proj": rank + 2 * states, "d": rank, "B": rank + states, "C": rank + 2 * states}
    return slice(starts[key], ends[key])


def state_shapes(peft: dict, module: dict, classes: int) -> dict[str, tuple[int, ...]]:
    dims, half = module["dims"], module["dims"][0] // 2
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (classes, dims[-1]), "head.bias": (classes,)}
    backbone: dict[str, tuple[int, ...]] = {"classifier.norm.weight": (dims[-1],), "classifier.norm.bias": (dims[-1],)}
    chans, kernel = module["in_chans"], module["patch_size"] // 2 + 1
    backbone |= {"patch_embed.0.weight": (half, chans, kernel, kernel), "patch_embed.0.bias": (half,)}
    backbone |= {"patch_embed.2.weight": (half,), "patch_embed.2.bias": (half,)}
    backbone |= {"patch_embed.5.weight": (dims[0], half, kernel, kernel), "patch_embed.5.bias": (dims[0],)}
    backbone |= {"patch_embed.7.weight": (dims[0],), "patch_embed.7.bias": (dims[0],)}
    columns, inners = 0, []
    for stage, depth in enumerate(module["depths"]):
        dim, inner, *_ = sizes(module, stage)
        inners.append(inner)
        for block in range(depth):
            columns += 4 * inner
            own = {f"{n}.{p}": (dim,) for n in ("norm", "norm2") for p in ("weight", "bias")}
            own |= {f"op.{n}": shape for n, shape in _op_shapes(peft, module, stage).items()}
            hidden = int(module["mlp_ratio"] * dim)
            own |= {"mlp.fc1.weight": (hidden, dim), "mlp.fc1.bias": (hidden,)}
            own |= {"mlp.fc2.weight": (dim, hidden), "mlp.fc2.bias": (dim,)}
            backbone |= {f"layers.{stage}.blocks.{block}.{n}": shape for n, shape in own.items()}
        if stage < len(dims) - 1:
            wide = dims[stage + 1]
            backbone |= {f"layers.{stage}.downsample.1.weight": (wide, dim, 3, 3)}
            backbone |= {f"layers.{stage}.downsample.{n}": (wide,) for n in ("1.bias", "3.weight", "3.bias")}
    if peft["prefix_tuning"]:
        tokens, mean = peft["num_virtual_tokens"], sum(inners) // len(inners)
        width = mean if peft["prefix_projection"] else columns
        backbone["prefix_encoder.embedding.weight"] = (tokens, width)
        if peft["prefix_projection"]:
            hidden = peft["encoder_hidden_size"] or max(inners)
            backbone |= {
                "prefix_encoder.transform.0.weight": (hidden, mean),
                "prefix_encoder.transform.0.bias": (hidden,),
            }
            backbone |= {"prefix_encoder.transform.2.weight": (columns, hidden)}
            backbone |= {"prefix_encoder.transform.2.bias": (columns,)}
    return shapes | {f"module.{name}": shape for name, shape in backbone.items()}


def _op_shapes(peft: dict, module: dict, stage: int) -> dict[str, tuple[int, ...]]:
    dim, inner, rank, states = sizes(module, stage)
    rows = rank + 2 * states
    shapes: dict[str, tuple[int, ...]] = {
        "x_proj_weight": (4, rows, inner),
        "A_logs": (4 * inner, states),
        "Ds": (4 * inner,),
        "dt_projs_weight": (4, inner, rank),
        "dt_projs_bias": (4, inner),
        "out_norm.weight": (inner,),
        "out_norm.bias": (inner,),
        "in_proj.weight": (inner, dim),
        "conv2d.weight": (inner, 1, 3, 3),
        "out_proj.weight": (dim, inner),
    }
    if module["ssm_conv_bias"]:
        shapes["conv2d.bias"] = (inner,)
    for name, switch, size, out, into in (
        ("lora_in_proj", "lora_in_proj", "dim_in_proj", inner, dim),
        ("lora_out_proj", "lora_out_proj", "dim", dim, inner),
        ("adaptf", "adaptformer", "dim_adaptf", dim, inner),
    ):
        if peft[switch]:
            shapes |= {f"{name}.adapter_down.weight": (peft[size], into)}
            shapes |= {f"{name}.adapter_up.weight": (out, peft[size])}
    for key in WEIGHTS:
        if peft[f"lora_{key}"]:
            part = rows_of(key, rank, states) if key != "dt" else slice(0, inner)
            shapes[f"lora_{key}.adapter_down_weight"] = (4, peft[f"dim_{key}"], rank if key == "dt" else inner)
            shapes[f"lora_{key}.adapter_up_weight"] = (4, part.stop - part.start, peft[f"dim_{key}"])
    offsets = {"A": "A_logs", "D": "Ds", "conv1d": "conv2d.weight", "bias": "dt_projs_bias"}
    for key, name in zip(offsets, ("learnable_A_logs", "learnable_D", "learnable_conv1d_weight", "learnable_bias")):
        if peft[f"learnable_{key}"] and peft[f"learnable_{key}_v2"]:
            shapes[name] = shapes[offsets[key]]
    if peft["additional_scan"]:
        extra = peft["scan_addition_num"]
        shapes |= {"A_log_scan_addi": (4 * inner, extra), "x_proj_scan_addi": (4, 2 * extra, inner)}
    return shapes


def logits(state: State, peft: dict, module: dict, images: torch.Tensor) -> torch.Tensor:
    s = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    stride = module["patch_size"] // 2
    x = F.conv2d(images, s["patch_embed.0.weight"], s["patch_embed.0.bias"], stride=stride, padding=1)
    x = F.gelu(_norm(s, "patch_embed.2", x))
    x = F.conv2d(x, s["patch_embed.5.weight"], s["patch_embed.5.bias"], stride=stride, padding=1)
    x = _norm(s, "patch_embed.7", x)
    tokens, used = _tokens(s, peft), 0
    for stage, depth in enumerate(module["depths"]):
        inner = sizes(module, stage)[1]
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            own = None if tokens is None else tokens[:, used : used + 4 * inner].reshape(-1, 4, inner)
            used += 4 * inner
            x = x + _ss2d(s, f"{name}.op", peft, sizes(module, stage), _norm(s, f"{name}.norm", x), own)
            hidden = F.gelu(_linear(s, f"{name}.mlp.fc1", _norm(s, f"{name}.norm2", x)))
            x = x + _linear(s, f"{name}.mlp.fc2", hidden)
        down = f"layers.{stage}.downsample"
        if f"{down}.1.weight" in s:
            x = F.conv2d(x, s[f"{down}.1.weight"], s[f"{down}.1.bias"], stride=2, padding=1)
            x = _norm(s, f"{down}.3", x)
    feature = _norm(s, "classifier.norm", x).mean((2, 3))
    return feature @ s["head.weight"].T + s["head.bias"]


def _tokens(s: State, peft: dict) -> torch.Tensor | None:
    """[tokens, 4 E of all blocks]."""
    if not peft["prefix_tuning"]:
        return None
    x = s["prefix_encoder.embedding.weight"]
    if peft["prefix_projection"]:
        for part in ("transform.0", "transform.2"):
            x = x @ s[f"prefix_encoder.{part}.weight"].T + s[f"prefix_encoder.{part}.bias"]
            x = torch.tanh(x) if part == "transform.0" else x
    return x


def _norm(s: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], s[f"{name}.weight"], s[f"{name}.bias"]).movedim(-1, 1)


def _linear(s: State, name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.einsum("oi,bihw->bohw", s[f"{name}.weight"], x)
    return y + s[f"{name}.bias"][:, None, None] if f"{name}.bias" in s else y


def _branch(s: State, name: str, x: torch.Tensor, scale: float, active: bool = False) -> torch.Tensor:
    down = torch.einsum("ri,bihw->brhw", s[f"{name}.adapter_down.weight"], x)
    down = down.relu() if active else down
    return scale * torch.einsum("or,brhw->bohw", s[f"{name}.adapter_up.weight"], down)


def _ss2d(
    s: State, op: str, peft: dict, size: tuple[int, int, int, int], h: torch.Tensor, tokens: torch.Tensor | None
) -> torch.Tensor:
    u = _linear(s, f"{op}.in_proj", h)
    if peft["lora_in_proj"]:
        u = u + _branch(s, f"{op}.lora_in_proj", h, peft["s_in_proj"])
    weight = s[f"{op}.conv2d.weight"] + s.get(f"{op}.learnable_conv1d_weight", 0.0)
    u = F.silu(F.conv2d(u, weight, s.get(f"{op}.conv2d.bias"), padding=1, groups=u.shape[1]))
    orders = _orders(*u.shape[2:])
    flat, merged = u.flatten(2), torch.zeros_like(u).flatten(2)
    for k, order in enumerate(orders):
        y = _scan(s, op, peft, size, k, flat[:, :, order], None if tokens is None else tokens[:, k])
        merged = merged.index_add(2, order, y)
    y = _norm(s, f"{op}.out_norm", merged.view_as(u))
    out = _linear(s, f"{op}.out_proj", y)
    if peft["lora_out_proj"]:
        out = out + _branch(s, f"{op}.lora_out_proj", y, peft["s"])
    if peft["adaptformer"]:
        out = out + _branch(s, f"{op}.adaptf", y, peft["s_adaptf"], active=True)
    return out


def _orders(height: int, width: int) -> list[torch.Tensor]:
    """For each direction the positions, row by row numbered, in the order in which it reads them."""
    rows = torch.arange(height * width)
    columns = rows.view(height, width).T.flatten()
    return [rows, columns, rows.flip(0), columns.flip(0)]


def _scan(
    s: State, op: str, peft: dict, size: tuple[int, int, int, int], k: int, u: torch.Tensor, tokens: torch.Tensor | None
) -> torch.Tensor:
    """One direction over u [B, E, L]; the outputs of the tokens [n, E] before it are cut off."""
    _, inner, rank, states = size
    x_proj, dt_proj = s[f"{op}.x_proj_weight"][k], s[f"{op}.dt_projs_weight"][k]
    for key in WEIGHTS:
        if peft[f"lora_{key}"]:
            down, up = (s[f"{op}.lora_{key}.adapter_{part}_weight"][k] for part in ("down", "up"))
            update = peft[f"s_{key}"] * up @ down
            if key == "dt":
                dt_proj = dt_proj + update
            else:
                rows = rows_of(key, rank, states)
                x_proj = x_proj + F.pad(update, (0, 0, rows.start, rank + 2 * states - rows.stop))
    a_log = (s[f"{op}.A_logs"] + s.get(f"{op}.learnable_A_logs", 0.0)).view(4, inner, -1)[k]
    skip = (s[f"{op}.Ds"] + s.get(f"{op}.learnable_D", 0.0)).view(4, inner)[k]
    bias = (s[f"{op}.dt_projs_bias"] + s.get(f"{op}.learnable_bias", 0.0)).view(4, inner)[k]
    b_rows, c_rows = x_proj[rank : rank + states], x_proj[rank + states :]
    if peft["additional_scan"]:
        extra = peft["scan_addition_num"]
        more_a = s[f"{op}.A_log_scan_addi"].view(4, inner, extra)[k]
        more_b, more_c = s[f"{op}.x_proj_scan_addi"][k].split(extra)
        a_log, b_rows, c_rows = torch.cat([more_a, a_log], 1), torch.cat([more_b, b_rows]), torch.cat([more_c, c_rows])
    length = u.shape[2]
    if tokens is not None:
        u = torch.cat([tokens.T.expand(len(u), -1, -1), u], 2)
    dt = F.softplus(dt_proj @ (x_proj[:rank] @ u) + bias[:, None])
    b, c, a = b_rows @ u, c_rows @ u, -torch.exp(a_log)
    state, outputs = u.new_zeros(len(u), inner, a.shape[1]), []
    for t in range(u.shape[2]):
        step = dt[:, :, t, None]
        state = torch.exp(step * a) * state + step * u[:, :, t, None] * b[:, None, :, t]
        outputs.append((state * c[:, None, :, t]).sum(2) + skip * u[:, :, t])
    return torch.stack(outputs[-length:], 2)
