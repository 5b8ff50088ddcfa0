"""Generation of weights as one node of the graph: W' [B, O, X] and b' [B, O] of z [B, Z], or of one z [Z].

shared.py composes it of products and views, each a node of the backward pass, which costs more than a small
product. Here the same products are inside of one Function; their derivatives are those of autograd.py.
"""

from torch import Tensor

from mi_kernels.ops.interaction import autograd as dense
from mi_kernels.ops.rules import Maybe, Rule, add, wanted, without_features


def products(
    backend: str, z: Tensor, weight: Tensor, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> tuple[Tensor, Maybe]:
    """W' and b', none of them a view; W is contiguous."""
    contexts = z if z.dim() == 2 else z.unsqueeze(0)
    rows = contexts.expand(weight.shape[0], *contexts.shape)
    linear = dense.ForwardRule.forward
    generated = linear(backend, rows, without_features(rows), None, None, weight.mT, weight_x).transpose_(0, 1)
    offset = None
    if weight_z is not None:
        offset = linear(backend, contexts, without_features(contexts), None, None, weight_z, bias)
    if z.dim() == 1:
        generated.squeeze_(0)
        offset = None if offset is None else offset.squeeze_(0)
    return generated, offset


class GenerateRule(Rule):
    """For calls that nothing transforms: it has neither jvp nor vmap."""

    @staticmethod
    def forward(backend, z, weight, weight_z, weight_x, bias):
        return products(backend, z, weight, weight_z, weight_x, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, z, weight, weight_z, *_ = inputs
        Rule.save(ctx, z, weight, weight_z)

    @staticmethod
    def backward(ctx, grad, grad_offset):
        z, weight, weight_z = ctx.saved_tensors
        need = wanted(ctx, weight.numel() * (z.numel() // max(z.shape[-1], 1)))[1:]
        contexts = z if z.dim() == 2 else z.unsqueeze(0)
        dz = dw = dv = dz_offset = du = dc = None
        if grad is not None:
            grad = (grad if z.dim() == 2 else grad.unsqueeze(0)).transpose(0, 1)  # [O, B, X]
            rows = contexts.expand(weight.shape[0], *contexts.shape)
            want = need[0], False, False, False, need[1], need[3]
            matrices = None, None, weight.mT
            dz, _, _, _, dw, dv = dense.grads(ctx.backend, want, grad, rows, without_features(rows), *matrices)
            dz = None if dz is None else dz.sum(0)
            dw = None if dw is None else dw.mT
        if grad_offset is not None:
            grad_offset = grad_offset if z.dim() == 2 else grad_offset.unsqueeze(0)
            want = need[0], False, False, False, need[2], need[4]
            rows = contexts, without_features(contexts)
            dz_offset, _, _, _, du, dc = dense.grads(
                ctx.backend, want, grad_offset, *rows, None, None, weight_z
            )
        dz = add(dz, dz_offset)
        return None, dz if dz is None or z.dim() == 2 else dz.squeeze(0), dw, du, dv, dc
