"""The public functions of the two-dimensional selective scan, and their argument type."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from mambapeft_kernels.backends import FUSED, backend_for, computes_now
from mambapeft_kernels.layer_norm import layer_norm
from mambapeft_kernels.layer_norm.api import check_shapes as check_norm_shapes

DIRECTIONS = 4


class SS2DWeights(NamedTuple):
    """The tensors of the four directions: E channels, N states, R = dt_rank.

    Row k·E + e of A_logs, and entry k·E + e of Ds, belong to channel e of direction k.
    """

    x_proj_weight: Tensor  # [4, R + 2N, E], rows: dt | B | C
    dt_projs_weight: Tensor  # [4, E, R]
    dt_projs_bias: Tensor  # [4, E]
    A_logs: Tensor  # [4E, N], A = -exp(A_logs)
    Ds: Tensor  # [4E]
    initial_states: Tensor | None = None  # [4, E, N], the state before a direction's first token; None: zero
    state_offset: Tensor | None = None  # [4, E, N], added to the state where C reads it

    def each(self, change: Callable[[Tensor], Tensor]) -> "SS2DWeights":
        """The weights with every tensor changed."""
        changed = [None if t is None else change(t) for t in self]
        return SS2DWeights(*changed)  # type: ignore[arg-type]  # the first five are never None


def ss2d(u: Tensor, weights: SS2DWeights, backend: str = "auto") -> Tensor:
    """Σ_k scan_k(u): the part of a VMamba block between SiLU and out_norm (arXiv 2401.10166, section 4.2).

    Direction 0 reads the map row by row, 1 column by column, 2 and 3 read these sequences backwards. For each:
    [δ | B | C] = u x_projᵀ; Δ = softplus(δ dt_projᵀ + bias); h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t;
    y_t = C_t · (h_t + offset) + D u_t. Every output is added where its token was read.

    Args:
        u: [B, H, W, E], after the convolution and SiLU; any strides.
        weights: weights of all four directions. Only weights that require a gradient get one.
        backend: one of `mambapeft_kernels.BACKENDS` or "auto"; "mamba_ssm" has no such op.
    Returns: [B, H, W, E] in u's dtype, a plain sum. State, Δ, decay and sums are kept in at least float32.
    Raises: ValueError for shapes that do not fit each other or a backend that cannot run here.

    Example:
        >>> weights = SS2DWeights(torch.randn(4, 5, 8), torch.randn(4, 8, 3), torch.randn(4, 8),
        ...                       torch.zeros(32, 1), torch.ones(32))     # E = 8, R = 3, N = 1
        >>> ss2d(torch.randn(2, 14, 10, 8), weights).shape
        torch.Size([2, 14, 10, 8])
    """
    _check_shapes(u, weights)
    chosen = backend_for(backend, u)
    # Imports wait until here: a backend's packages need not exist where another one runs.
    if chosen in FUSED:
        from mambapeft_kernels.ss2d import fused

        return fused.ss2d(u, weights, chosen)
    if chosen == "mamba_ssm":
        raise ValueError("ss2d: got kernel=mamba_ssm, which has no two-dimensional scan; choose auto, triton or torch")
    if chosen == "numba" and not computes_now([u, *weights]):
        chosen = "torch"  # a traced (compiled, exported) program consists of PyTorch's operations
    if chosen == "numba":
        from mambapeft_kernels.ss2d import compiled

        return compiled.ss2d(u, weights)
    if chosen == "torch":
        from mambapeft_kernels.ss2d import vectorised

        return vectorised.ss2d(u, weights)
    from mambapeft_kernels.ss2d import naive

    return naive.ss2d(u, weights)


def ss2d_norm(
    u: Tensor, weights: SS2DWeights, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5, backend: str = "auto"
) -> Tensor:
    """LayerNorm(ss2d(u)) over the channels; in fused kernels the norm adds up what the directions leave apart.

    Args:
        u, weights, backend: as in `ss2d`. norm_weight, norm_bias, eps: as in `layer_norm`.
    Returns: [B, H, W, E] in u's dtype.
    Raises: as `ss2d` and `layer_norm`.
    """
    chosen = backend_for(backend, u)
    if chosen in FUSED and u.numel():
        from mambapeft_kernels.ss2d import fused

        _check_shapes(u, weights)
        check_norm_shapes("ss2d_norm", u, {"weight": (norm_weight, u.shape[-1:]), "bias": (norm_bias, u.shape[-1:])})
        return fused.ss2d_norm(u, weights, norm_weight, norm_bias, eps, chosen)
    return layer_norm(ss2d(u, weights, backend), norm_weight, norm_bias, eps, backend)


def prefix_states(tokens: Tensor, weights: SS2DWeights) -> Tensor:
    """The states after `tokens`: they stand for tokens in front of each direction's sequence (MambaPEFT's affix).

    Args: tokens: [4, n, E], n tokens for each direction, after the convolution and SiLU.
    Returns: [4, E, N], for `SS2DWeights.initial_states`; autograd goes through it.
    Raises: ValueError for tokens of another shape.
    """
    from mambapeft_kernels.ss2d import naive

    channels = weights.dt_projs_bias.shape[-1]
    if tokens.ndim != 3 or tokens.shape[0] != DIRECTIONS or tokens.shape[2] != channels:
        raise ValueError(f"prefix_states: tokens must be [4, n, {channels}], got {tuple(tokens.shape)}")
    return naive.prefix_states(tokens, weights)


def _check_shapes(u: Tensor, weights: SS2DWeights) -> None:
    if u.ndim != 4:
        raise ValueError(f"ss2d: u must be [B, H, W, E], got {tuple(u.shape)}")
    if weights.A_logs.ndim != 2 or weights.dt_projs_weight.ndim != 3:
        raise ValueError(
            "ss2d: expected A_logs [4E, N] and dt_projs_weight [4, E, R], got "
            f"{tuple(weights.A_logs.shape)} and {tuple(weights.dt_projs_weight.shape)}"
        )
    channels, states, rank = u.shape[-1], weights.A_logs.shape[1], weights.dt_projs_weight.shape[2]
    expected = {
        "x_proj_weight": (DIRECTIONS, rank + 2 * states, channels),
        "dt_projs_weight": (DIRECTIONS, channels, rank),
        "dt_projs_bias": (DIRECTIONS, channels),
        "A_logs": (DIRECTIONS * channels, states),
        "Ds": (DIRECTIONS * channels,),
        "initial_states": (DIRECTIONS, channels, states),
        "state_offset": (DIRECTIONS, channels, states),
    }
    for name, shape in expected.items():
        tensor = getattr(weights, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"ss2d: {name} has shape {tuple(tensor.shape)}, expected {shape} for E={channels}")
