"""The dense interaction of plain tensors in training, in calls that nothing transforms, traces or watches.

The rule of autograd.py serves transforms, orders of memory and derivatives of derivatives. Asking for each of
these took as long as the kernels of a small step (docs/performance.md), so here it is asked once.
"""

import torch
from torch import Tensor

from ..namespace import OPS
from ..rules import Maybe, Rule, recorded, transformed, wanted
from . import autograd as dense
from . import kept, linear

_FORWARD = OPS.interaction.default
_INPUT_GRADS = OPS.interaction_input_grads.default
_WEIGHT_GRADS = OPS.interaction_weight_grads.default


def forward(
    backend: str,
    x: Tensor,  # [B, X]
    z: Tensor,  # [B, Z]
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
    packed_weight: Maybe = None,
) -> Tensor:
    """`autograd.forward` of checked arguments, by whichever rule is fastest."""
    arguments = x, z, weight, weight_z, weight_x, bias
    if is_plain(backend, *arguments):
        found = kept.chosen(*arguments)
        if found is not None:
            return kept.KeptInteractionRule.record(*found)[0]
        if all(matrix is None or matrix.is_contiguous() for matrix in arguments[2:5]):
            return PlainInteractionRule.record(*arguments)
    return dense.forward(backend, *arguments, packed_weight)


def is_plain(backend: str, x: Tensor, z: Tensor, weight: Maybe, *others: Maybe) -> bool:
    """Whether a call is for the rules of this module and of kept.py."""
    if weight is None or backend != linear.BACKEND or not recorded((x, z, weight, *others)):
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not transformed() and linear.is_plain(x, z, weight, *others)


class PlainInteractionRule(Rule):
    """`autograd.InteractionRule` without jvp and vmap, for contiguous weights."""

    function = "Interaction"

    @staticmethod
    def forward(x, z, weight, weight_z, weight_x, bias):
        return _FORWARD(x, z, weight, weight_z, weight_x, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 6
        x, z, *weights = ctx.saved_tensors
        need = wanted(ctx, dense.work(grad, x, z, weights[0]))
        # What was saved is plain. With grad mode on, it may be differentiated again.
        if torch.is_grad_enabled() or not linear.is_direct(linear.BACKEND, grad):
            return (
                *dense.input_grads(linear.BACKEND, need[:2], grad, x, z, *weights),
                *dense.weight_grads(linear.BACKEND, need[2:], grad, x, z, tuple(weights)),
            )
        want_x, want_z, *want = need
        dx = dz = dw = du = dv = dc = None
        if want_x or want_z:
            dx, dz = _INPUT_GRADS(grad, x, z, *weights, want_x, want_z)
        if True in want:
            dw, du, dv, dc = _WEIGHT_GRADS(grad, x, z, *want)
        found = dx, dz, dw, du, dv, dc
        if False in need:  # what is not wanted comes back as an empty tensor
            return tuple(result if wanted else None for result, wanted in zip(found, need, strict=True))
        return found
