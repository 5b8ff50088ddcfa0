"""Derivative rules of the two gated forms, which differ only in the terms of the gate.

    gate   p = z^T W x + U z + V x + c            the dense interaction; the diagonal form has no W
    shift  t = C z + d                            optional
    y = (act(p) + s) * x + t                      O = X

The compiled kernels compute y in one pass. Where something is differentiated they also return p, one tensor
like y: recomputing it would add a seventh product of its size to the six of a training step
(docs/performance.md). Backward uses ``modulate_grads`` for the elementwise part and the primitives of the
dense interaction for the rest: no rule is written twice.
"""

from typing import Any

import torch
from torch import Tensor

from .. import activations
from ..interaction import autograd as dense
from ..interaction.linear import linear_grads
from ..library import overloads, traceable
from ..modulate import autograd as elementwise
from ..rules import (
    Fold,
    Maybe,
    Rule,
    add,
    constant,
    differentiating,
    nestable,
    primals,
    unbatched,
    wanted,
    without_features,
)
from . import schema  # noqa: F401  (defines the operations)

_DIAGONAL = overloads("diagonal")
_GATED = overloads("gated_interaction")


@traceable(
    "differentiable_gate",
    "(str backend, str activation, float scale_offset, Tensor x, Tensor z, Tensor? weight, Tensor? weight_z,"
    " Tensor? weight_x, Tensor? bias, Tensor? shift_weight, Tensor? shift_bias) -> Tensor",
)
def gate(
    backend: str,
    activation: str,
    scale_offset: float,
    x: Tensor,  # [B, X]
    z: Tensor,  # [B, Z]
    weight: Maybe,  # [X, Z, X]
    weight_z: Maybe,  # [X, Z]
    weight_x: Maybe,  # [X, X]
    bias: Maybe,  # [X]
    shift_weight: Maybe,  # [X, Z]
    shift_bias: Maybe,  # [X]
) -> Tensor:
    """y = (act(z^T W x + U z + V x + c) + s) * x + (C z + d), differentiable."""
    tensors = (x, z, weight, weight_z, weight_x, bias, shift_weight, shift_bias)
    if differentiating(tensors):
        if weight is None and weight_z is None and shift_weight is None:
            z = constant(z)  # as in the dense interaction: an argument of no term has no gradient
        tensors = (x, z, weight, weight_z, weight_x, bias, shift_weight, shift_bias)
        return _rule(weight, weight_z).call(backend, activation, scale_offset, *tensors)[0]
    return _kernel(backend, activation, scale_offset, False, *tensors)[0]


def _kernel(
    backend, activation, scale_offset, keep, x, z, weight, weight_z, weight_x, bias, shift_weight, shift_bias
):
    if weight is None and weight_z is not None:
        return _DIAGONAL[backend](
            x, z, weight_z, bias, shift_weight, shift_bias, weight_x, activation, scale_offset, keep
        )
    return _GATED[backend](x, z, weight, weight_z, weight_x, bias, activation, keep)


def _rule(weight: Maybe, weight_z: Maybe) -> type[Rule]:
    return DiagonalRule if weight is None and weight_z is not None else GatedInteractionRule


def _linear(backend: str, z: Tensor, weight: Maybe, bias: Maybe) -> Maybe:
    """C z + d for the rows of z."""
    if weight is None and bias is None:
        return None
    return dense.forward(backend, without_features(z), z, None, weight, None, bias)


def composed(backend: str, activation: str, scale_offset: float, *tensors: Maybe) -> tuple[Tensor, Tensor]:
    """y and p as separate operations; every tensor may have one more leading dimension of groups."""
    x, z, weight, weight_z, weight_x, bias, shift_weight, shift_bias = tensors
    assert x is not None and z is not None
    p = dense.forward(backend, x, z, weight, weight_z, weight_x, bias)
    shift = _linear(backend, z, shift_weight, shift_bias)
    return elementwise.modulate(backend, x, p, shift, activation, scale_offset), p


class GateRule(Rule):
    @staticmethod
    def forward(backend, activation, scale_offset, *tensors):
        return _kernel(backend, activation, scale_offset, True, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.activation, ctx.scale_offset, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        Rule.save(ctx, *tensors, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 11
        *tensors, p = ctx.saved_tensors
        x, z, weight, weight_z, weight_x, bias, shift_weight, _ = tensors
        backend, need = ctx.backend, wanted(ctx, dense.work(grad, x, z, weight))[3:]
        need_gate = need[0] and (weight is not None or weight_x is not None) or any(need[1:6])
        dx = dp = dz = by_gate_x = by_gate_z = None
        weights: Any = [None] * 4
        if need[0] or need_gate:
            if differentiating(tensors):  # the kept p is a constant to them
                p = dense.forward(backend, x, z, weight, weight_z, weight_x, bias)
            rule = (backend, (need[0], need_gate), ctx.activation, ctx.scale_offset)
            dx, dp = elementwise.gate_grads(*rule, grad, x, p)
        two_terms = weight is None and weight_z is not None and shift_weight is not None
        if need[1] and two_terms and dp is not None:  # U dp + C g in one product
            dz = dense.forward(backend, dp, grad, None, shift_weight.mT, weight_z.mT, None)
        need_z = need[1] and dz is None
        if dp is not None and weight is None and weight_x is None:
            of_gate = need_z and weight_z is not None, need[3], need[5]
            by_gate_z, weights[1], weights[3] = linear_grads(backend, of_gate, dp, z, weight_z)
        elif dp is not None:
            matrices = weight, weight_z, weight_x
            by_gate_x, by_gate_z = dense.input_grads(backend, (need[0], need_z), dp, x, z, *matrices)
            weights = dense.weight_grads(backend, (need[2], need[3], need[4], need[5]), dp, x, z, matrices)
        of_shift = need_z and shift_weight is not None, need[6], need[7]
        by_shift_z, dc, dd = linear_grads(backend, of_shift, grad, z, shift_weight)
        dz = add(dz, by_gate_z, by_shift_z)
        return None, None, None, add(dx, by_gate_x), dz, *weights, dc, dd

    @staticmethod
    @nestable
    def jvp(
        ctx, _, __, ___, x_t, z_t, weight_t, weight_z_t, weight_x_t, bias_t, shift_weight_t, shift_bias_t
    ):
        x, z, weight, weight_z, weight_x, bias, shift_weight, shift_bias, _ = primals(ctx)
        backend, rule = ctx.backend, (ctx.activation, ctx.scale_offset)
        p = dense.forward(backend, x, z, weight, weight_z, weight_x, bias)
        p_t = _gate_tangent(
            backend,
            (x, z, weight, weight_z, weight_x),
            (x_t, z_t, weight_t, weight_z_t, weight_x_t, bias_t),
        )
        terms = [
            None if z_t is None else _linear(backend, z_t, shift_weight, None),
            _linear(backend, z, shift_weight_t, shift_bias_t),
        ]
        if p_t is not None:
            direction = activations.tangent(ctx.activation, p, p_t)
            terms.append(elementwise.modulate(backend, x, direction, None, "identity", 0.0))
        if x_t is not None:
            terms.append(elementwise.modulate(backend, x_t, p, None, *rule))
        tangent = add(*terms)
        return torch.zeros_like(x) if tangent is None else tangent, None

    @staticmethod
    def vmap(info, in_dims, backend, activation, scale_offset, x, z, *weights):
        fold = Fold(info.batch_size, x, in_dims[3])
        rule = (backend, activation, scale_offset)
        if unbatched(in_dims[5:], weights):
            rows = fold.rows(x, in_dims[3]), fold.rows(z, in_dims[4])
            return fold.all(fold.unrows, _rule(*weights[:2]).call(*rule, *rows, *weights))
        args = [fold.groups(t, d) for t, d in zip((x, z, *weights), in_dims[3:], strict=True)]
        return fold.all(fold.ungroups, composed(*rule, *args))


class DiagonalRule(GateRule):
    pass


class GatedInteractionRule(GateRule):
    pass


def _gate_tangent(backend: str, tensors: tuple[Maybe, ...], tangents: tuple[Maybe, ...]) -> Maybe:
    """The tangent of p: the sum over its factors of p with that factor replaced."""
    x, z, weight, weight_z, weight_x = tensors
    x_t, z_t, *weights_t = tangents
    assert x is not None and z is not None
    terms: list[Maybe] = []
    if x_t is not None and (weight is not None or weight_x is not None):
        terms.append(dense.forward(backend, x_t, z, weight, None, weight_x, None))
    if z_t is not None and (weight is not None or weight_z is not None):
        terms.append(dense.forward(backend, x, z_t, weight, weight_z, None, None))
    if any(weight is not None for weight in weights_t):
        terms.append(dense.forward(backend, x, z, *weights_t))
    return add(*terms)
