"""`ss2d` on fused kernels: one autograd node made of two `torch.library` ops.

Forward: one product for the projections of all directions, the scans, their sum. Backward: the scans' adjoints, and one
kernel that adds up the parts of u's gradient. Only tensors that require a gradient get one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, plain_gradients
from mambapeft_kernels.matmul import product
from mambapeft_kernels.ss2d import naive
from mambapeft_kernels.ss2d.api import DIRECTIONS, SS2DWeights


def ss2d(u: Tensor, weights: SS2DWeights, backend: str) -> Tensor:
    """See `mambapeft_kernels.ss2d`; backend: cuda or triton."""
    if u.numel() == 0:
        return torch.zeros_like(u) + 0 * u  # no place or no sample: an empty result that keeps its graph
    weights = padded(u, weights, backend)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (u, *weights))
    return torch.ops.mambapeft.ss2d(u, *weights, backend, save)[0]


def padded(u: Tensor, weights: SS2DWeights, backend: str) -> SS2DWeights:
    """The weights as both ops want them: in CUDA C++, each direction's rows of x_proj end at 16 bytes."""
    missing = _pitch(u, weights, backend) - weights.x_proj_weight.shape[1]
    if not missing:
        return weights
    return weights._replace(x_proj_weight=F.pad(weights.x_proj_weight, (0, 0, 0, missing)))


_WEIGHTS = (
    "Tensor x_proj_weight, Tensor dt_projs_weight, Tensor dt_projs_bias, Tensor A_logs, Tensor Ds, "
    "Tensor? initial_states, Tensor? state_offset"
)


@torch.library.custom_op(
    "mambapeft::ss2d",
    mutates_args=(),
    schema=f"(Tensor u, {_WEIGHTS}, str backend, bool save) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    u: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    initial_states: Tensor | None,
    state_offset: Tensor | None,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, H, W, E]; and, if `save`, the projections [B, L, 4 P] and the states entering each chunk."""
    from mambapeft_kernels.ss2d import triton_kernels as triton

    w = SS2DWeights(x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset)
    u = u.contiguous()
    with torch.cuda.device_of(u):
        proj = u.flatten(1, 2) @ _x_proj(u, w).T
        scans = _scans(u, proj, w, backend)
        y, ckpt = scans.forward(save)
        complete = len(y) == 1 and scans.adds_skip
        out = y.view_as(u) if complete else triton.merge(y, u, None if scans.adds_skip else _skip(w), None, None)
    return out, proj if save else proj.new_empty(0), ckpt


@_forward.register_fake
def _(u, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset, backend, save):
    w = SS2DWeights(x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset)
    if not save:
        return u.new_empty(u.shape), u.new_empty(0), u.new_empty(0)
    proj = u.new_empty(u.shape[0], u.shape[1] * u.shape[2], DIRECTIONS * x_proj_weight.shape[1])
    return u.new_empty(u.shape), proj, u.new_empty(_scans(u, proj, w, backend).checkpoint_shape)


@torch.library.custom_op(
    "mambapeft::ss2d_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor u, {_WEIGHTS}, Tensor proj, Tensor ckpt, str backend, bool[] need) -> Tensor[]",
)
def _backward(
    dout: Tensor,
    u: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    initial_states: Tensor | None,
    state_offset: Tensor | None,
    proj: Tensor,
    ckpt: Tensor,
    backend: str,
    need: list[bool],
) -> list[Tensor]:
    """The gradients of u (in its dtype) and of each weight (float32); empty where not asked for."""
    from mambapeft_kernels.ss2d import triton_kernels as triton

    w = SS2DWeights(x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset)
    need_u, *rest = need
    asked = dict(zip(SS2DWeights._fields, rest))
    u, dout = u.contiguous(), dout.contiguous()
    grads = {name: u.new_empty(0, dtype=torch.float32) for name in SS2DWeights._fields}
    du = u.new_empty(0)
    with torch.cuda.device_of(u):
        wanted = {
            "u": need_u,
            "proj": need_u or asked["x_proj_weight"],
            "weight": asked["dt_projs_weight"],
            "bias": asked["dt_projs_bias"],
            "A": asked["A_logs"],
            "first": asked["initial_states"],
            "offset": asked["state_offset"],
        }
        if any(wanted.values()):
            scans = _scans(u, proj, w, backend)
            found = scans.backward(dout, ckpt, wanted)
            if need_u:
                parts, weight = found["u"], _x_proj(u, w)
                if len(parts) == 1 and scans.adds_skip:
                    du = parts.view_as(u)
                    du.flatten(0, 2).addmm_(found["proj"].flatten(0, 1), weight)
                else:
                    skip = None if scans.adds_skip else _skip(w)
                    du = triton.merge(parts, dout, skip, found["proj"], weight)
            if asked["x_proj_weight"]:
                rows = product(found["proj"].flatten(0, 1).T, u.flatten(0, 2), torch.float32)
                grads["x_proj_weight"] = rows.view(x_proj_weight.shape)
            grads["dt_projs_weight"], grads["dt_projs_bias"] = found["weight"], found["bias"]
            if asked["A_logs"]:
                A = -torch.exp(A_logs.float())
                grads["A_logs"] = found["A"].mT.reshape(A.shape) * A
            if asked["initial_states"]:
                grads["initial_states"] = found["first"].mT.contiguous()
            if asked["state_offset"]:
                grads["state_offset"] = found["offset"].mT.contiguous()
        if asked["Ds"]:
            grads["Ds"] = triton.channel_products(dout, u).repeat(DIRECTIONS)
    return [du, *grads.values()]


@_backward.register_fake
def _(
    dout, u, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset, proj, ckpt,
    backend, need,
):  # fmt: skip
    weights = x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset
    du = u.new_empty(u.shape if need[0] else (0,))
    shapes = [t.shape if t is not None and asked else (0,) for t, asked in zip(weights, need[1:])]
    return [du, *(u.new_empty(shape, dtype=torch.float32) for shape in shapes)]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.backend, _ = inputs
    _, proj, ckpt = output
    ctx.save_for_backward(*tensors, proj, ckpt)
    ctx.mark_non_differentiable(proj, ckpt)
    ctx.set_materialize_grads(False)  # no zeros for the gradients of what is only kept


def _differentiate(ctx, dout, *_):
    need = list(ctx.needs_input_grad[:-2])
    tensors = ctx.saved_tensors
    if differentiated_again(dout):
        return *plain_gradients(_definition, tensors[: len(need)], need, dout), None, None
    grads = torch.ops.mambapeft.ss2d_backward(dout, *tensors, ctx.backend, need)
    return *(g.to(t.dtype) if asked else None for g, t, asked in zip(grads, tensors, need)), None, None


def _definition(u: Tensor, *weights: Tensor | None) -> Tensor:
    w = SS2DWeights(*weights)  # type: ignore[arg-type]  # the first five are never None
    rows = w.dt_projs_weight.shape[2] + 2 * w.A_logs.shape[1]  # without the padding
    return naive.ss2d(u, w._replace(x_proj_weight=w.x_proj_weight[:, :rows]))


torch.library.register_autograd("mambapeft::ss2d", _differentiate, setup_context=_setup_context)


def _in_cuda(u: Tensor, w: SS2DWeights, backend: str) -> bool:
    """Whether the kernels in CUDA C++ run, which are for VMamba's one state."""
    if backend != "cuda":
        return False
    from mambapeft_kernels.ss2d import cuda_kernels

    return cuda_kernels.takes(u, w.A_logs.shape[1], w.dt_projs_weight.shape[2])


def _pitch(u: Tensor, w: SS2DWeights, backend: str) -> int:
    """Elements of a direction in a row of the projections."""
    if not _in_cuda(u, w, backend):
        return w.x_proj_weight.shape[1]
    from mambapeft_kernels.ss2d import cuda_kernels

    return cuda_kernels.pitch(w.dt_projs_weight.shape[2])


def _scans(u: Tensor, proj: Tensor, w: SS2DWeights, backend: str):
    if _in_cuda(u, w, backend):
        from mambapeft_kernels.ss2d import cuda_kernels

        return cuda_kernels.Scans(u, proj, w)
    from mambapeft_kernels.ss2d import triton_kernels

    return triton_kernels.Scans(u, proj, w)


def _x_proj(u: Tensor, w: SS2DWeights) -> Tensor:
    """The projections of all directions as one matrix [4 P, E] in u's dtype."""
    return w.x_proj_weight.to(u.dtype).flatten(0, 1).contiguous()


def _skip(w: SS2DWeights) -> Tensor:
    """Every direction adds its D u at the same place: only the sum counts."""
    return w.Ds.float().view(DIRECTIONS, -1).sum(0)
