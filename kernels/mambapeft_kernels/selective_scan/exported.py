"""The selective scan as one operator of an exported program.

A loop over L tokens would be L copies of its body in the program: hundreds of thousands of nodes for a large model.
PyTorch's `scan` keeps it one node, which ONNX has too (`Scan`). Its body computes the exponentials as well, so that a
program holds one state at a time.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from mambapeft_kernels.derivatives import exporting

# The first release whose ONNX exporter is known to translate the operator; before, the loop is written out.
_HAS_SCAN = TorchVersion(torch.__version__) >= "2.9"


def exported_as_operator(needs_grad: Iterable[bool]) -> bool:
    """Whether a program is being exported whose scans can be operators.

    needs_grad: whether each input needs a gradient; with any gradient the loop is written out.
    """
    return _HAS_SCAN and exporting() and not any(needs_grad)


def scan_outputs(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None = None) -> Tensor:
    """Outputs Σ_n C h (no D skip) of h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t, [L, G, B, E].

    Args:
        u, delta: [L, G, B, E]; A: [G, E, N]; B, C: [L, G, B, N].
        h: [G, B, N, E] before the first step; None: zeros.
    """
    _, groups, batch, channels = u.shape
    start = u.new_zeros(groups, batch, A.shape[-1], channels) if h is None else h

    def step(h: Tensor, u_t: Tensor, delta_t: Tensor, B_t: Tensor, C_t: Tensor, At: Tensor) -> list[Tensor]:
        decay = torch.exp(delta_t.unsqueeze(-2) * At.unsqueeze(1))
        h = decay * h + (delta_t * u_t).unsqueeze(-2) * B_t.unsqueeze(-1)
        return [h, (C_t.unsqueeze(-2) @ h).squeeze(-2)]

    # The operator itself: PyTorch's function around it compiles `step` first, anew for every layer and size.
    operator: Callable[..., Any] = torch.ops.higher_order.scan
    _, y = operator(step, [start], [u, delta, B, C], (A.mT.contiguous(),))
    return y
