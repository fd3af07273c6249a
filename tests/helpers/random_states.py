"""State dicts of random values, and how far two tensors are apart."""

import torch


def values(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {n: 0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    for name in state:
        if name.endswith(".m") or "norm" in name:
            state[name] = state[name].abs() + 0.5
    return state


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    scale = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / (scale if scale > 1e-14 else 1.0)
