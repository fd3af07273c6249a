"""The shared parts of affix- and prompt-tuning: the generation of learned tokens, and their places in a sequence."""

from typing import Any

import torch
from torch import Tensor, nn

from mambapeft_vision.backbones.contract import TokenLayout, transformed
from mambapeft_vision.utils.kept_tensors import kept_tensors


class TokenGenerator(nn.Module):
    """Learned tokens [n, out]: a table, or (with `hidden`) embedding [n, width] → Linear → Tanh → Linear.

    The projection reparametrises the table for training (prefix-tuning, arXiv 2101.00190) and folds into it after.
    Tables and embeddings start as `nn.Embedding` does, N(0, 1).

    Args:
        n: tokens.
        width: width of the embedding.
        out: width of the generated tokens.
        hidden: width of the projection's hidden layer; None: a plain table.
        table: the name of the plain table among the saved tensors.
        like: gives device and dtype.
    """

    def __init__(self, n: int, width: int, out: int, hidden: int | None, table: str, like: Tensor) -> None:
        super().__init__()
        self.table_name = table
        kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        if hidden is None:
            self.register_parameter(table, nn.Parameter(torch.randn(n, out, **kind)))
            return
        self.embedding = nn.Parameter(torch.randn(n, width, **kind))
        self.fc1 = nn.Linear(width, hidden, **kind)
        self.fc2 = nn.Linear(hidden, out, **kind)

    @property
    def projects(self) -> bool:
        return hasattr(self, "fc1")

    def forward(self) -> Tensor:
        """[n, out]."""
        if not self.projects:
            return getattr(self, self.table_name)
        return self.fc2(torch.tanh(self.fc1(self.embedding)))

    @torch.no_grad()
    def fold(self) -> None:
        """Replaces embedding and projection by the table they generate."""
        if self.projects:
            table = self()
            del self.embedding, self.fc1, self.fc2
            self.register_parameter(self.table_name, nn.Parameter(table))

    def groups(self, lr_mult: float, decay_mult: float, bias_decay_mult: float) -> list[dict[str, Any]]:
        """Optimiser groups: the projection's biases, and all else."""
        biases = [self.fc1.bias, self.fc2.bias] if self.projects else []
        others = [p for p in self.parameters() if not any(p is b for b in biases)]
        return [
            {"params": others, "lr_mult": lr_mult, "decay_mult": decay_mult},
            {"params": biases, "lr_mult": lr_mult, "decay_mult": bias_decay_mult},
        ]


def join(tokens: Tensor, new: Tensor, at: list[int]) -> Tensor:
    """[B, L, C] with `new` [n, C] put in at `at` → [B, L + n, C], in the dtype of `tokens`.

    at: for each new token, the number of tokens in front of it (`TokenLayout.places`).
    """
    new = new.to(tokens.dtype)
    if all(place in (0, tokens.shape[1]) for place in at) and not transformed():
        return _BothEnds.apply(tokens, new, at.count(0))
    new = new.expand(tokens.shape[0], -1, -1)
    pieces, done = [], 0
    for place in sorted(set(at)):
        first, count = at.index(place), at.count(place)
        pieces += [tokens[:, done:place], new[:, first : first + count]]
        done = place
    pieces.append(tokens[:, done:])
    return torch.cat([piece for piece in pieces if piece.shape[1]], dim=1)


class _BothEnds(torch.autograd.Function):
    """[new[:front] | tokens | new[front:]] along the sequence, at full speed (a GPU's `torch.cat` is slow here)."""

    @staticmethod
    def forward(ctx, tokens, new, front):
        batch, length, width = tokens.shape
        ctx.front, ctx.length = front, length
        joined = tokens.new_empty(batch, length + len(new), width)
        joined[:, front : front + length] = tokens
        joined[:, :front] = new[:front]
        joined[:, front + length :] = new[front:]
        return joined

    @staticmethod
    def backward(ctx, grad):
        front, behind = grad[:, : ctx.front], grad[:, ctx.front + ctx.length :]
        new = torch.cat((front, behind), dim=1).sum(0) if ctx.needs_input_grad[1] else None
        return grad[:, ctx.front : ctx.front + ctx.length], new, None


def fill_ends(tokens: Tensor, new: Tensor, front: int) -> Tensor:
    """Puts new[:front] over the first tokens of [B, L, C] and new[front:] over the last, in place.

    These tokens must be zeros that depend on nothing trained (outputs of a linear map without bias), because the
    gradient passes through them unchanged.
    """
    new = new.to(tokens.dtype)
    if transformed():
        first, last = (part.expand(tokens.shape[0], -1, -1) for part in (new[:front], new[front:]))
        return torch.cat((first, tokens[:, front : tokens.shape[1] - (len(new) - front)], last), dim=1)
    return _FilledEnds.apply(tokens, new, front)


class _FilledEnds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, new, front):
        ctx.front, ctx.behind = front, len(new) - front
        ctx.mark_dirty(tokens)
        tokens[:, :front] = new[:front]
        tokens[:, tokens.shape[1] - ctx.behind :] = new[front:]
        return tokens

    @staticmethod
    def backward(ctx, grad):
        ends = grad[:, : ctx.front], grad[:, grad.shape[1] - ctx.behind :]
        return grad, torch.cat(ends, dim=1).sum(0) if ctx.needs_input_grad[1] else None, None


def kept(at: list[int], length: int, device: torch.device) -> slice | Tensor:
    """Where the `length` original tokens are after `join`: a slice if they stay together, else indices [L]."""
    if all(place in (0, length) for place in at):
        return slice(at.count(0), at.count(0) + length)
    return _kept_indices(tuple(at), length, device)


@kept_tensors
def _kept_indices(at: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    return torch.tensor([i + sum(place <= i for place in at) for i in range(length)], device=device)


def patch_mask(layout: TokenLayout, like: Tensor) -> Tensor:
    """[L, 1]: one for the image's patches, zero for all other tokens; on the device and in the dtype of `like`."""
    return _patch_mask(layout, like.device, like.dtype)


@kept_tensors
def _patch_mask(layout: TokenLayout, device: torch.device, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(layout.length, 1, dtype=dtype)
    mask[list(layout.patches)] = 1
    return mask.to(device)


@kept_tensors
def position_tensor(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions of tokens as an index on a device."""
    return torch.tensor(positions, device=device)
