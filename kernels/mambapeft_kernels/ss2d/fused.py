"""`ss2d` on fused kernels: one autograd node made of two `torch.library` ops.

Forward: one product for the projections of all directions, the scans, their sum. Backward: the scans' adjoints, and one
kernel that adds up the parts of u's gradient. Only tensors that require a gradient get one.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, plain_gradients
from mambapeft_kernels.layer_norm.naive import layer_norm
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


def ss2d_norm(
    u: Tensor, weights: SS2DWeights, norm_weight: Tensor, norm_bias: Tensor, eps: float, backend: str
) -> Tensor:
    """See `mambapeft_kernels.ss2d.api.ss2d_norm`, for maps with elements."""
    given = u, *padded(u, weights, backend), norm_weight, norm_bias
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    return torch.ops.mambapeft.ss2d_norm(*given, eps, backend, save)[0]


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
        parts, skip, proj, ckpt = _parts(u, w, backend, save)
        complete = len(parts) == 1 and skip is None
        out = parts.view_as(u) if complete else triton.merge(parts, u, skip, None, None)
    return out, proj, ckpt


def _parts(u: Tensor, w: SS2DWeights, backend: str, save: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The parts of y [planes, B, L, E], the Σ D that they lack, and if `save` the projections and the states."""
    proj = u.flatten(1, 2) @ _x_proj(u, w).T
    scans = _scans(u, proj, w, backend)
    parts, ckpt = scans.forward(save)
    return parts, None if scans.adds_skip else _skip(w), proj if save else proj.new_empty(0), ckpt


@_forward.register_fake
def _fake_forward(
    u, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset, backend, save
):
    w = SS2DWeights(x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset)
    if not save:
        return u.new_empty(u.shape), u.new_empty(0), u.new_empty(0)
    proj = u.new_empty(u.shape[0], u.shape[1] * u.shape[2], DIRECTIONS * x_proj_weight.shape[1])
    return u.new_empty(u.shape), proj, u.new_empty(_scans(u, proj, w, backend).checkpoint_shape)


@torch.library.custom_op(
    "mambapeft::ss2d_norm",
    mutates_args=(),
    schema=f"(Tensor u, {_WEIGHTS}, Tensor norm_weight, Tensor norm_bias, float eps, str backend, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _norm(
    u: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    initial_states: Tensor | None,
    state_offset: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_forward`, and first the norm of y, which adds up what the scans leave apart; y only if `save`."""
    from mambapeft_kernels.layer_norm.triton_kernels import norm_of_sum
    from mambapeft_kernels.ss2d import triton_kernels as triton

    w = SS2DWeights(x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset)
    u = u.contiguous()
    with torch.cuda.device_of(u):
        parts, skip, proj, ckpt = _parts(u, w, backend, save)
        if skip is not None:
            parts = triton.merge(parts, u, skip, None, None)[None]
        normed, y = norm_of_sum(parts, norm_weight, norm_bias, eps, save)
    return normed.view_as(u), y.view_as(u) if save else y, proj, ckpt


@_norm.register_fake
def _(
    u, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset, norm_weight, norm_bias,
    eps, backend, save,
):  # fmt: skip
    weights = x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, initial_states, state_offset
    y, proj, ckpt = _fake_forward(u, *weights, backend, save)
    return u.new_empty(u.shape), y if save else u.new_empty(0), proj, ckpt


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


def _setup_norm_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_norm(ctx, dnormed, *_):
    need = list(ctx.needs_input_grad[:-3])
    *tensors, y, proj, ckpt = ctx.saved_tensors
    if differentiated_again(dnormed):
        grads = plain_gradients(partial(_norm_definition, ctx.eps), tensors, need, dnormed)
        return *grads, None, None, None
    *scanned, norm_weight, _ = tensors
    dy, _, *norm_grads = torch.ops.mambapeft.add_layer_norm_backward(
        dnormed, None, y, norm_weight, None, ctx.eps, y.dtype, [any(need[:-2]), False, *need[-2:]]
    )
    grads = [None] * len(scanned)
    if any(need[:-2]):
        grads = torch.ops.mambapeft.ss2d_backward(dy, *scanned, proj, ckpt, ctx.backend, need[:-2])
    given = (*grads, *norm_grads)
    return *(g.to(t.dtype) if asked else None for g, t, asked in zip(given, tensors, need)), None, None, None


def _norm_definition(eps: float, u: Tensor, *weights: Tensor | None) -> Tensor:
    *scanned, norm_weight, norm_bias = weights
    return layer_norm(_definition(u, *scanned), norm_weight, norm_bias, eps)  # type: ignore[arg-type]  # never None


torch.library.register_autograd("mambapeft::ss2d_norm", _differentiate_norm, setup_context=_setup_norm_context)


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
