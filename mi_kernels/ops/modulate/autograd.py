"""Derivative rules of modulation: two primitives, closed under differentiation.

    modulate        y = (f(scale) + s) * x + shift
    modulate_grads  dx = (f(scale) + s) g,  dscale = f'(scale) R[x g],  dshift = R[g]

R sums over the dimensions in which an operand has size 1. Derivatives of ``modulate_grads`` need R[a b] of
other pairs, which is its dscale with f the identity, and products with tensors of the size of scale, which
are ``modulate`` with f the identity. f' and f'' are differentiable PyTorch code (ops/activations.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mi_kernels.ops import activations
from mi_kernels.ops.checks import check_tensors
from mi_kernels.ops.dtypes import FLOATING, accumulation_dtype
from mi_kernels.ops.library import overloads, traceable
from mi_kernels.ops.modulate import schema  # noqa: F401  (defines the operations)
from mi_kernels.ops.rules import Maybe, Rule, add, differentiating, nestable, primals, scatter, select, wanted

_MODULATE = overloads("modulate")
_WORK = 32  # multiplications in the time to load one element from memory
_MODULATE_GRADS = overloads("modulate_grads")


def _check(backend, x, scale, shift, activation, scale_offset):
    check_tensors("modulate", ("x", "scale", "shift"), (x, scale, shift), 2, FLOATING)


@traceable(
    "differentiable_modulate",
    "(str backend, Tensor x, Tensor scale, Tensor? shift, str activation, float scale_offset) -> Tensor",
    _check,
)
def modulate(
    backend: str,
    x: Tensor,
    scale: Tensor,  # as many dimensions as x, each of its size or 1
    shift: Maybe,  # the same
    activation: str,
    scale_offset: float,
) -> Tensor:
    """y = (act(scale) + s) * x + shift, differentiable. Its arguments were checked by the caller."""
    if activation == "softmax":
        scale, activation = torch.softmax(scale, -1), "identity"
    if differentiating((x, scale, shift)):
        return ModulateRule.call(backend, activation, scale_offset, x, scale, shift)
    return _MODULATE[backend](x, scale, shift, activation, scale_offset)


def modulate_grads(
    backend: str,
    want: Sequence[bool],
    activation: str,
    scale_offset: float,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift_size: Sequence[int],
) -> tuple[Maybe, ...]:
    """(dx, dscale, dshift), each None where it is not wanted. Differentiable; not for softmax."""
    if want[2] and tuple(shift_size) == tuple(grad.shape):
        return *modulate_grads(backend, (*want[:2], False), activation, scale_offset, grad, x, scale, ())[
            :2
        ], grad
    want = tuple(want)
    if not any(want):
        return None, None, None
    if differentiating((grad, x, scale)):
        results = ModulateGradsRule.call(backend, want, activation, scale_offset, shift_size, grad, x, scale)
        return tuple(scatter(results, want))
    results = _MODULATE_GRADS[backend](grad, x, scale, shift_size, activation, scale_offset, *want)
    return tuple(result if wanted else None for result, wanted in zip(results, want, strict=True))


def gate_grads(
    backend: str,
    want: tuple[bool, bool],
    activation: str,
    scale_offset: float,
    grad: Tensor,
    x: Tensor,
    gate: Tensor,  # before the activation, as x
) -> tuple[Maybe, Maybe]:
    """(dx, dgate) of (act(gate) + s) * x, of softmax too. Differentiable."""
    if activation != "softmax":
        rule = (backend, (*want, False), activation, scale_offset)
        dx, dgate, _ = modulate_grads(*rule, grad, x, gate, ())
        return dx, dgate
    wide = torch.softmax(gate, -1, dtype=accumulation_dtype(gate.dtype))
    p = wide.to(gate.dtype)
    dx, dp, _ = modulate_grads(backend, (*want, False), "identity", scale_offset, grad, x, p, ())
    return dx, None if dp is None else activations.through_softmax(wide, dp)


def _times(backend: str, x: Tensor, factor: Tensor) -> Tensor:
    return modulate(backend, x, factor, None, "identity", 0.0)


def _reduced(backend: str, one: Tensor, other: Tensor, like: Tensor) -> Any:
    """R[one * other], of the size of ``like``."""
    return modulate_grads(backend, (False, True, False), "identity", 0.0, one, other, like, ())[1]


class ModulateRule(Rule):
    @staticmethod
    def forward(backend, activation, scale_offset, x, scale, shift):
        return _MODULATE[backend](x, scale, shift, activation, scale_offset)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.activation, ctx.scale_offset, x, scale, shift = inputs
        ctx.shift_size = () if shift is None else shift.shape
        Rule.save(ctx, x, scale)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 6
        x, scale = ctx.saved_tensors
        want, size = wanted(ctx, _WORK * grad.numel())[3:], ctx.shift_size
        rule = (ctx.backend, want, ctx.activation, ctx.scale_offset)
        return (None, None, None, *modulate_grads(*rule, grad, x, scale, size))

    @staticmethod
    @nestable
    def jvp(ctx, _, __, ___, x_t, scale_t, shift_t):
        x, scale = primals(ctx)
        by_scale = None
        if scale_t is not None:
            direction = activations.tangent(ctx.activation, scale, scale_t)
            by_scale = modulate(ctx.backend, x, direction, shift_t, "identity", 0.0)
            shift_t = None
        by_x = None
        if x_t is not None:
            by_x = modulate(ctx.backend, x_t, scale, shift_t, ctx.activation, ctx.scale_offset)
            shift_t = None
        tangent = add(by_x, by_scale)
        if tangent is None:
            tangent = torch.zeros_like(x) if shift_t is None else torch.zeros_like(x) + shift_t
        return tangent

    @staticmethod
    def vmap(info, in_dims, backend, activation, scale_offset, x, scale, shift):
        x = _dim_first(x, in_dims[3], info.batch_size)
        scale, shift = (_dim_first(t, d, 1) for t, d in zip((scale, shift), in_dims[4:], strict=True))
        return modulate(backend, x, scale, shift, activation, scale_offset), 0


class ModulateGradsRule(Rule):
    @staticmethod
    def forward(backend, want, activation, scale_offset, shift_size, grad, x, scale):
        results = _MODULATE_GRADS[backend](grad, x, scale, shift_size, activation, scale_offset, *want)
        return select(results, want)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.want, ctx.activation, ctx.scale_offset, ctx.shift_size, *tensors = inputs
        Rule.save(ctx, *tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        x_c, scale_c, shift_c = scatter(cotangents, ctx.want)
        grad, x, scale = ctx.saved_tensors
        need = wanted(ctx, _WORK * grad.numel())[5:]
        backend = ctx.backend
        slope = None  # f'(scale) scale_c, of the size of scale
        if scale_c is not None and (need[0] or need[1]):
            slope = activations.tangent(ctx.activation, scale, scale_c)
        by_grad = by_x = by_scale = None
        if need[0]:
            terms = [None if slope is None else _times(backend, x, slope)]
            if x_c is not None:
                terms.append(modulate(backend, x_c, scale, shift_c, ctx.activation, ctx.scale_offset))
            elif shift_c is not None:
                terms.append(shift_c.expand(grad.shape))
            by_grad = add(*terms)
        if need[1] and slope is not None:
            by_x = _times(backend, grad, slope)
        if need[2]:
            terms = []
            if x_c is not None:
                rule = (backend, (False, True, False), ctx.activation, ctx.scale_offset)
                terms.append(modulate_grads(*rule, grad, x_c, scale, ())[1])
            if scale_c is not None and ctx.activation != "identity":
                reduced = _reduced(backend, grad, x, scale)
                terms.append(activations.curvature(ctx.activation, scale, scale_c, reduced))
            by_scale = add(*terms)
        return None, None, None, None, None, by_grad, by_x, by_scale

    @staticmethod
    @nestable
    def jvp(ctx, _, __, ___, ____, _____, grad_t, x_t, scale_t):
        grad, x, scale = primals(ctx)
        backend, (want_x, want_scale, _) = ctx.backend, ctx.want
        rule = (ctx.activation, ctx.scale_offset)
        zero = (x.new_zeros(x.shape), scale.new_zeros(scale.shape), grad.new_zeros(ctx.shift_size))
        terms: list[tuple[Maybe, ...]] = [(None, None, None)]
        if grad_t is not None:
            terms.append(modulate_grads(backend, ctx.want, *rule, grad_t, x, scale, ctx.shift_size))
        if x_t is not None and want_scale:
            want = (False, True, False)
            terms.append(modulate_grads(backend, want, *rule, grad, x_t, scale, ()))
        if scale_t is not None:
            by_x = by_scale = None
            if want_x:
                by_x = _times(backend, grad, activations.tangent(ctx.activation, scale, scale_t))
            if want_scale and ctx.activation != "identity":
                reduced = _reduced(backend, grad, x, scale)
                by_scale = activations.curvature(ctx.activation, scale, scale_t, reduced)
            terms.append((by_x, by_scale, None))
        tangents = [add(*parts) for parts in zip(*terms, strict=True)]
        return select([z if t is None else t for z, t in zip(zero, tangents, strict=True)], ctx.want)

    @staticmethod
    def vmap(info, in_dims, backend, want, activation, scale_offset, shift_size, grad, x, scale):
        size = info.batch_size
        grad, x, scale = (_dim_first(t, d, size) for t, d in zip((grad, x, scale), in_dims[5:], strict=True))
        shift_size = (size, *shift_size) if want[2] else shift_size
        results = modulate_grads(backend, want, activation, scale_offset, grad, x, scale, shift_size)
        results = select(results, want)
        return results, (0,) * len(results)


def _dim_first(tensor: Maybe, dim: int | None, size: int) -> Any:
    """The dimension that vmap maps over first; a tensor that is not mapped is expanded to ``size``."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
