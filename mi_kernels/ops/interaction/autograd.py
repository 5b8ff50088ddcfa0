"""Derivative rules of the dense interaction: three primitives, closed under differentiation.

With L(g, x, z, W, U, V, c) = sum_b g . (z^T W x + U z + V x + c) the primitives are

    forward       dL/dg
    input_grads   dL/dx, dL/dz
    weight_grads  dL/dW, dL/dU, dL/dV, dL/dc

L is linear in each argument, so a cotangent or a tangent replaces its argument, and every rule below is a sum
of calls of the same three functions. These are differentiable themselves, which is all that reverse mode,
forward mode and higher orders need (docs/mathematics.md derives each line). Terms with an absent factor are
dropped, never multiplied by 0.
"""

from typing import Any

import torch
from torch import Tensor

from .. import counts
from ..library import overloads, traceable
from ..rules import (
    Fold,
    Maybe,
    Rule,
    add,
    constant,
    differentiating,
    nestable,
    primals,
    scatter,
    sees_values,
    select,
    unbatched,
    wanted,
    without_features,
)
from . import (
    memory_order,
    schema,  # noqa: F401  (defines the operations)
)
from .by_segment import BySegment, Primitives

_FORWARD = Primitives("interaction", "interaction_by_segment")
_PACKED_FORWARD = overloads("interaction_packed")
_INPUT_GRADS = Primitives("interaction_input_grads", "interaction_by_segment_input_grads")
_WEIGHT_GRADS = Primitives("interaction_weight_grads", "interaction_by_segment_weight_grads")
Where = str | BySegment  # a backend, or one with the weights of each row's group


@traceable(
    "differentiable_interaction_rows",
    "(str backend, Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x, Tensor? bias,"
    " Tensor? packed_weight=None) -> Tensor",
)
def forward(
    backend: str,
    x: Tensor,  # [(G,) B, X]
    z: Tensor,  # [(G,) B, Z]
    weight: Maybe,  # [(G,) O, Z, X]
    weight_z: Maybe,  # [(G,) O, Z]
    weight_x: Maybe,  # [(G,) O, X]
    bias: Maybe,  # [(G,) O]
    packed_weight: Maybe = None,
) -> Tensor:
    """y = z^T W x + U z + V x + c, differentiable. The caller has checked the arguments.

    ``packed_weight``: W packed by packed_weight.py; used if nothing is differentiated.
    """
    return _run(backend, x, z, weight, weight_z, weight_x, bias, packed_weight)


@traceable(
    "differentiable_interaction_by_segment",
    "(str backend, Tensor row_index, Tensor offsets, Tensor x, Tensor z, Tensor? weight, Tensor? weight_z,"
    " Tensor? weight_x, Tensor? bias) -> Tensor",
)
def forward_by_segment(
    backend: str,
    row_index: Tensor,  # [N]
    offsets: Tensor,  # [G + 1]
    x: Tensor,  # [N, X]
    z: Tensor,  # [N, Z]
    weight: Maybe,  # [G, O, Z, X]
    weight_z: Maybe,  # [G, O, Z]
    weight_x: Maybe,  # [G, O, X]
    bias: Maybe,  # [G, O]
) -> Tensor:
    """The same with the weights of group g for the rows row_index[offsets[g] : offsets[g + 1]]."""
    return _run(BySegment(backend, row_index, offsets), x, z, weight, weight_z, weight_x, bias)


def _run(
    backend: Where,
    x: Tensor,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
    packed_weight: Maybe = None,
) -> Tensor:
    by_rule = differentiating((x, z, weight, weight_z, weight_x, bias))
    if (by_rule or packed_weight is None) and weight is not None and memory_order.is_n_major(weight):
        x, z, weight, weight_z, weight_x = z, x, weight.transpose(-1, -2), weight_x, weight_z
    if by_rule:
        # Detach arguments of no term: compiled autograd would add their gradient of None to others.
        if weight is None:
            x = constant(x) if weight_x is None else x
            z = constant(z) if weight_z is None else z
        return InteractionRule.call(backend, x, z, weight, weight_z, weight_x, bias)
    if packed_weight is not None:
        assert isinstance(backend, str), "no packed weights by segment"
        return _PACKED_FORWARD[backend](x, z, weight, packed_weight, weight_z, weight_x, bias)
    return _FORWARD[backend](x, z, weight, weight_z, weight_x, bias)


def _forward(backend: Where, x: Tensor, z: Tensor, *weights: Maybe) -> Tensor:
    if isinstance(backend, str):
        return forward(backend, x, z, *weights)
    return forward_by_segment(*backend, x, z, *weights)


def input_grads(
    backend: Where,
    want: tuple[bool, bool],
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
) -> tuple[Maybe, ...]:
    """(dL/dx, dL/dz), each None where it is not wanted or vanishes identically. Differentiable."""
    want = (
        want[0] and (weight is not None or weight_x is not None),
        want[1] and (weight is not None or weight_z is not None),
    )
    if not any(want):
        return None, None
    if weight is not None and memory_order.is_n_major(weight):
        weight = weight.transpose(-1, -2)
        dz, dx = input_grads(backend, (want[1], want[0]), grad, z, x, weight, weight_x, weight_z)
        return dx, dz
    if differentiating((grad, x, z, weight, weight_z, weight_x)):
        results = InteractionInputGradsRule.call(backend, want, grad, x, z, weight, weight_z, weight_x)
        return tuple(scatter(results, want))
    results = _INPUT_GRADS[backend](grad, x, z, weight, weight_z, weight_x, *want)
    return tuple(result if wanted else None for result, wanted in zip(results, want, strict=True))


def weight_grads(
    backend: Where,
    want: tuple[bool, bool, bool, bool],
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    like: tuple[Maybe, Maybe, Maybe] = (None, None, None),
) -> tuple[Maybe, ...]:
    """(dL/dW, dL/dU, dL/dV, dL/dc), each None where it is not wanted. Differentiable.

    ``like``: W, U and V, whose memory orders the results have; None for contiguous results.
    """
    if not any(want):
        return None, None, None, None
    ordered = _in_order(backend, want, grad, x, z, like)
    rest = tuple(wanted and result is None for wanted, result in zip(want, ordered, strict=True))
    if not any(rest):
        return tuple(ordered)
    if differentiating((grad, x, z)):
        results = scatter(InteractionWeightGradsRule.call(backend, rest, grad, x, z), rest)
    else:
        results = _WEIGHT_GRADS[backend](grad, x, z, *rest)
    found = zip(ordered, results, rest, strict=True)
    return tuple(result if wanted else other for other, result, wanted in found)


def _in_order(
    backend: Where,
    want: tuple[bool, bool, bool, bool],
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    like: tuple[Maybe, Maybe, Maybe],
) -> list[Maybe]:
    """Those of the results of weight_grads that are not to be contiguous.

    dW = sum_b g z x is the same sum in any order of its factors, which is the order of its axes in memory.
    """
    results: list[Maybe] = [None] * 4
    order = memory_order.order(like[0])
    if want[0] and order != memory_order.CONTIGUOUS:
        factors = grad, z, x
        outer, middle, inner = (factors[axis] for axis in order)
        dw = weight_grads(backend, (True, False, False, False), outer, inner, middle)[0]
        assert dw is not None
        results[0] = memory_order.restored(dw, order)
    for index, features in ((1, z), (2, x)):
        if want[index] and memory_order.is_n_major(like[index]):
            dv = weight_grads(backend, (False, False, True, False), features, grad, z)[2]
            assert dv is not None
            results[index] = dv.transpose(-1, -2)
    return results


def work(grad: Tensor, x: Tensor, z: Tensor, weight: Maybe) -> int:
    """An upper bound of the multiplications in a product of these; ``weight``: W or its cotangent."""
    features = x.shape[-1] + z.shape[-1]
    return grad.numel() * (features if weight is None else features + x.shape[-1] * z.shape[-1])


def _forward_or_none(backend: Where, x: Any, z: Any, *weights: Maybe) -> Maybe:
    if all(weight is None for weight in weights):
        return None
    return _forward(backend, x, z, *weights)


def _folded(info: Any, backend: Where, like: Tensor, dim: int | None) -> tuple[Fold, Where, Where]:
    """The fold of a mapped dimension, and where its calls run if it is folded into rows, or into groups."""
    if isinstance(backend, str):
        return Fold(info.batch_size, like, dim), backend, backend
    size = info.batch_size
    fold = Fold(size, like, dim, by_segment=True)
    return fold, backend.with_more_rows(size), backend.with_more_groups(size)


def _pairs(
    backend: Where, grad: Tensor, x: Tensor, z: Tensor, weight: Maybe, x_c: Tensor, z_c: Tensor
) -> Maybe:
    """Q = z x' + z' x [B, Z X] for two products of the double backward in place of four; None: not held.

    W has to be a matrix [O, Z X] as it lies. Q is, in groups b, the gradient of a matrix [Z, X] by two rows.
    """
    if not isinstance(backend, str) or weight is None or weight.dim() != 3 or not weight.is_cpu:
        return None
    if not sees_values():
        return None
    sizes = grad.shape[0], z.shape[1], x.shape[1], grad.shape[1]
    if not all(type(size) is int for size in sizes):  # comparing symbolic sizes would add a guard
        return None
    if not counts.holds_pairs(*sizes, x.dtype) or weight.stride(1) != x.shape[1] * weight.stride(2):
        return None
    # Where Q leaves the range of its dtype, y and dW might not.
    largest = [float(tensor.detach().abs().max()) for tensor in (z, x_c, z_c, x)]
    if not largest[0] * largest[1] + largest[2] * largest[3] < torch.finfo(x.dtype).max:
        return None
    left, right = torch.stack((z, z_c), 1), torch.stack((x_c, x), 1)
    want = False, False, True, False
    pairs = weight_grads(backend, want, left, right, without_features(right))[2]
    return None if pairs is None else pairs.flatten(1)


def _weight_grad(backend: Where, grad: Tensor, pairs: Tensor, weight: Tensor) -> Maybe:
    """dW = g^T Q, in the memory order of W."""
    want, like = (False, False, True, False), (None, None, weight.flatten(1))
    dw = weight_grads(backend, want, grad, pairs, without_features(pairs), like)[2]
    return None if dw is None else dw.unflatten(1, weight.shape[1:])


class InteractionRule(Rule):
    @staticmethod
    def forward(backend, x, z, weight, weight_z, weight_x, bias):
        return _FORWARD[backend](x, z, weight, weight_z, weight_x, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, x, z, weight, weight_z, weight_x, _ = inputs
        ctx.out_features = output.shape[-1]
        Rule.save(ctx, x, z, weight, weight_z, weight_x)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 7
        x, z, weight, weight_z, weight_x = ctx.saved_tensors
        need = wanted(ctx, work(grad, x, z, weight))
        return (
            None,
            *input_grads(ctx.backend, need[1:3], grad, x, z, weight, weight_z, weight_x),
            *weight_grads(ctx.backend, need[3:7], grad, x, z, (weight, weight_z, weight_x)),
        )

    @staticmethod
    @nestable
    def jvp(ctx, _, x_t, z_t, weight_t, weight_z_t, weight_x_t, bias_t):
        x, z, weight, weight_z, weight_x = primals(ctx)
        tangent = add(
            None if x_t is None else _forward_or_none(ctx.backend, x_t, z, weight, None, weight_x, None),
            None if z_t is None else _forward_or_none(ctx.backend, x, z_t, weight, weight_z, None, None),
            _forward_or_none(ctx.backend, x, z, weight_t, weight_z_t, weight_x_t, bias_t),
        )
        return x.new_zeros((*x.shape[:-1], ctx.out_features)) if tangent is None else tangent

    @staticmethod
    def vmap(info, in_dims, backend, x, z, weight, weight_z, weight_x, bias):
        fold, more_rows, more_groups = _folded(info, backend, x, in_dims[1])
        weights = (weight, weight_z, weight_x, bias)
        if unbatched(in_dims[3:], weights):
            y = _forward(more_rows, fold.rows(x, in_dims[1]), fold.rows(z, in_dims[2]), *weights)
            return fold.unrows(y)
        args = [fold.groups(t, d) for t, d in zip((x, z, *weights), in_dims[1:], strict=True)]
        return fold.ungroups(_forward(more_groups, *args))


class InteractionInputGradsRule(Rule):
    @staticmethod
    def forward(backend, want, grad, x, z, weight, weight_z, weight_x):
        return select(_INPUT_GRADS[backend](grad, x, z, weight, weight_z, weight_x, *want), want)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.want, *tensors = inputs
        Rule.save(ctx, *tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        x_c, z_c = scatter(cotangents, ctx.want)
        grad, x, z, weight, weight_z, weight_x = ctx.saved_tensors
        need = wanted(ctx, work(grad, x, z, weight))[2:]
        grads: list[Maybe] = [None] * 6
        pairs = None
        if x_c is not None and z_c is not None and (need[0] or need[3]):
            pairs = _pairs(ctx.backend, grad, x, z, weight, x_c, z_c)
        if need[0] and pairs is not None:
            grads[0] = add(
                _forward(ctx.backend, pairs, without_features(pairs), None, None, weight.flatten(1), None),
                _forward_or_none(ctx.backend, x_c, z_c, None, weight_z, weight_x, None),
            )
        elif need[0]:
            grads[0] = add(
                None if x_c is None else _forward(ctx.backend, x_c, z, weight, None, weight_x, None),
                None if z_c is None else _forward(ctx.backend, x, z_c, weight, weight_z, None, None),
            )
        # Each cotangent replaces its argument, so only the derivative by the other argument remains.
        grads[1:3] = input_grads(
            ctx.backend,
            (need[1] and z_c is not None, need[2] and x_c is not None),
            grad,
            x if x_c is None else x_c,
            z if z_c is None else z_c,
            weight,
            None,
            None,
        )
        like = weight, weight_z, weight_x
        by_x: tuple[Maybe, ...] = (None,) * 4
        by_z = by_x
        each = need[3] and pairs is None
        if x_c is not None:
            by_x = weight_grads(ctx.backend, (each, False, need[5], False), grad, x_c, z, like)
        if z_c is not None:
            by_z = weight_grads(ctx.backend, (each, need[4], False, False), grad, x, z_c, like)
        by_pairs = _weight_grad(ctx.backend, grad, pairs, weight) if need[3] and pairs is not None else None
        grads[3:] = add(by_x[0], by_z[0], by_pairs), by_z[1], by_x[2]
        return (None, None, *grads)

    @staticmethod
    @nestable
    def jvp(ctx, _, __, grad_t, x_t, z_t, weight_t, weight_z_t, weight_x_t):
        grad, x, z, weight, weight_z, weight_x = primals(ctx)
        by_grad: tuple[Maybe, ...] = (None, None)
        if grad_t is not None:
            by_grad = input_grads(ctx.backend, ctx.want, grad_t, x, z, weight, weight_z, weight_x)
        by_inputs = input_grads(
            ctx.backend,
            (ctx.want[0] and z_t is not None, ctx.want[1] and x_t is not None),
            grad,
            x if x_t is None else x_t,
            z if z_t is None else z_t,
            weight,
            None,
            None,
        )
        by_weights = input_grads(ctx.backend, ctx.want, grad, x, z, weight_t, weight_z_t, weight_x_t)
        tangents = []
        for like, *terms in zip((x, z), by_grad, by_inputs, by_weights, strict=True):
            tangent = add(*terms)
            tangents.append(torch.zeros_like(like) if tangent is None else tangent)
        return select(tangents, ctx.want)

    @staticmethod
    def vmap(info, in_dims, backend, want, grad, x, z, weight, weight_z, weight_x):
        fold, more_rows, more_groups = _folded(info, backend, grad, in_dims[2])
        weights = (weight, weight_z, weight_x)
        if unbatched(in_dims[5:], weights):
            g, x, z = (fold.rows(t, d) for t, d in zip((grad, x, z), in_dims[2:5], strict=True))
            return fold.all(fold.unrows, select(input_grads(more_rows, want, g, x, z, *weights), want))
        folded = [fold.groups(t, d) for t, d in zip((grad, x, z, *weights), in_dims[2:], strict=True)]
        return fold.all(fold.ungroups, select(input_grads(more_groups, want, *folded), want))


class InteractionWeightGradsRule(Rule):
    @staticmethod
    def forward(backend, want, grad, x, z):
        return select(_WEIGHT_GRADS[backend](grad, x, z, *want), want)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.want, *tensors = inputs
        Rule.save(ctx, *tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        weight_c, weight_z_c, weight_x_c, bias_c = scatter(cotangents, ctx.want)
        grad, x, z = ctx.saved_tensors
        need = wanted(ctx, work(grad, x, z, weight_c))[2:]
        by_grad = None
        if need[0]:
            by_grad = _forward_or_none(ctx.backend, x, z, weight_c, weight_z_c, weight_x_c, bias_c)
        return (
            None,
            None,
            by_grad,
            *input_grads(ctx.backend, need[1:3], grad, x, z, weight_c, weight_z_c, weight_x_c),
        )

    @staticmethod
    @nestable
    def jvp(ctx, _, __, grad_t, x_t, z_t):
        grad, x, z = primals(ctx)
        want_weight, want_weight_z, want_weight_x, _ = ctx.want
        terms = []
        if grad_t is not None:
            terms.append(weight_grads(ctx.backend, ctx.want, grad_t, x, z))
        if x_t is not None:
            want = (want_weight, False, want_weight_x, False)
            terms.append(weight_grads(ctx.backend, want, grad, x_t, z))
        if z_t is not None:
            want = (want_weight, want_weight_z, False, False)
            terms.append(weight_grads(ctx.backend, want, grad, x, z_t))
        groups: tuple[int, ...] = grad.shape[:-2]
        if isinstance(ctx.backend, BySegment):
            groups = (ctx.backend.groups,)
        sizes = grad.shape[-1], z.shape[-1], x.shape[-1]
        shapes = (sizes, sizes[:2], sizes[::2], sizes[:1])
        tangents = []
        for shape, *parts in zip(shapes, *terms, strict=True):
            tangent = add(*parts)
            tangents.append(grad.new_zeros((*groups, *shape)) if tangent is None else tangent)
        return select(tangents, ctx.want)

    @staticmethod
    def vmap(info, in_dims, backend, want, grad, x, z):
        fold, _, more_groups = _folded(info, backend, grad, in_dims[2])
        folded = [fold.groups(t, d) for t, d in zip((grad, x, z), in_dims[2:], strict=True)]
        return fold.all(fold.ungroups, select(weight_grads(more_groups, want, *folded), want))
