"""The dense interaction of few outputs in training: W x + U is kept, so that three products do for four.

    T[b,o,i] = sum_j W[o,i,j] x[b,j] + U[o,i]        y[b,o] = <z[b], T[b,o]> + sum_j V[o,j] x[b,j] + c[o]

    dT = g z        dz = sum_o g T        dx = dT W + g V        dW = dT^T x

dT is elementwise, y and dz read T once; three products with W are left, of which the fused pass has one for
each of dx and dz where there are few outputs. It is `per_x` of cost_model.py with contexts of one row each,
as one node of a graph that is differentiated backwards once. Second derivatives, and whatever transforms or
traces a call, are those of the fused pass.
"""

from typing import Any

import torch
from torch import Tensor

from ..rules import Maybe, Rule, wanted
from . import autograd as dense
from . import linear, memory_order

# Above, with x wanted too, the fused pass makes dx and dz in one product. One thread of a Zen 4 core, time of
# the fused pass by this one's: 1 to 4 outputs 1.1 to 1.4, 8 outputs 1.0 to 1.3, 16 outputs 0.83 to 1.4.
MAX_OUT = 8
# Multiplications of a product below which one less is not worth two more calls: 0.9 at 2^18
# (16 x 128 x 128 -> 1), 1.0 to 1.1 at 2^20 (16 x 256 x 256 -> 1).
MIN_WORK = 1 << 20
# Elements of W below which y and dz, which read T by rows, take longer than the product: 0.4 to 0.7 at 256
# (16 x 16 -> 1), 1.0 to 1.2 at 4096 (64 x 64 -> 1).
MIN_WEIGHT = 1 << 12
# Elements of W above which the fused pass makes dW: dT^T x took 1.2 to 2.4 times as long at 2^23 and 2^24.
MAX_WEIGHT = 1 << 22


def chosen(
    x: Tensor, z: Tensor, weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> tuple[Any, ...] | None:
    """The arguments, x and z perhaps exchanged as in autograd.py, of a call that keeps W x + U; else None.

    The caller has made sure that nothing transforms or traces the call (plain.py).
    """
    if weight is None or x.dim() != 2:
        return None
    if memory_order.is_n_major(weight):
        x, z, weight, weight_z, weight_x = z, x, weight.mT, weight_x, weight_z
    if not z.requires_grad or not pays(x.shape[0], tuple(weight.shape), x.dtype, x.requires_grad):
        return None
    return (x, z, weight, weight_z, weight_x, bias) if weight.is_contiguous() else None


def pays(rows: int, sizes: tuple[int, ...], dtype: torch.dtype, want_x: bool) -> bool:
    """Whether to keep T of W [O, Z, X] (``sizes``), where dz is wanted: it saves a product."""
    out, context, width = sizes
    elements = out * context * width
    if elements < MIN_WEIGHT or rows * elements < MIN_WORK or (want_x and out > MAX_OUT):
        return False
    # T leaves the range of float16 before y does.
    return dtype is not torch.float16 and dtype.is_floating_point and fits(rows, sizes)


def fits(rows: int, sizes: tuple[int, ...]) -> bool:
    """Bounded memory: whether T has at most as many elements as the largest of x, z, y and W [O, Z, X]."""
    out, context, width = sizes
    return rows * out * context <= max(rows * max(context, width, out), out * context * width)


class KeptInteractionRule(Rule):
    """`interaction` of plain tensors in calls that nothing transforms: without jvp and vmap."""

    function = "Interaction"

    @staticmethod
    def forward(x, z, weight, weight_z, weight_x, bias):
        out, context, width = weight.shape
        offset = None if weight_z is None else weight_z.reshape(out * context)
        kept = linear.LINEAR(x, weight.view(out * context, width), offset)
        kept = kept.view(x.shape[0], out, context)
        added = bias
        if weight_x is not None:
            added = linear.LINEAR(x, weight_x, bias)
        elif bias is not None:
            added = bias.expand(x.shape[0], out)
        return linear.LINEAR(z, kept, added), kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:5], output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        x, z, weight, weight_z, weight_x, kept = ctx.saved_tensors
        need = wanted(ctx, kept.numel() * x.shape[1])
        like = weight, weight_z, weight_x
        if not linear.is_direct(linear.BACKEND, grad, x, z, *like):
            dx, dz = dense.input_grads(linear.BACKEND, need[:2], grad, x, z, *like)
            return dx, dz, *dense.weight_grads(linear.BACKEND, need[2:], grad, x, z, like)
        dx = dw = None
        by_kept = need[2] and weight.numel() <= MAX_WEIGHT
        of_kept = need[0] or by_kept
        dz, dt, _ = linear.GRADS(grad, z, kept, need[1], of_kept, False)
        if of_kept:
            out, context, width = weight.shape
            of_rows, matrix = dt.view(x.shape[0], out * context), weight.view(out * context, width)
            dx, dw, _ = linear.GRADS(of_rows, x, matrix, need[0], by_kept, False)
            if need[0] and weight_x is not None:
                dx = linear.ADD(grad, weight_x.mT, dx)
        terms = need[2] and not by_kept, *need[3:]
        of_weight, du, dv, dc = dense.weight_grads(linear.BACKEND, terms, grad, x, z, like)
        dw = dw.view(weight.shape) if dw is not None and by_kept else of_weight
        return dx if need[0] else None, dz if need[1] else None, dw, du, dv, dc
