"""Derivative rules of modulation and of mixtures: primitives that are closed under differentiation.

    modulate        y = F(scale) x + shift, F = c f + s
    modulate_grads  dx = F(scale) g,  dscale = F'(scale) R[x g],  dshift = R[g]
    mix             y = F(scale) (x - shift) + shift, F = f
    mix_grads       dx = F(scale) g,  dscale = F'(scale) R[(x - shift) g],  dshift = (1 - F(scale)) g

R sums over the dimensions in which an operand has size 1. One pair of rules serves both pairs of
primitives: what is linear in x and shift is a mixture of their cotangents or tangents and, where one of them
is missing, modulation of the other by F or 1 - F. Derivatives of the gradients need R[a b] of other pairs,
which is dscale with f the identity, and products with tensors of the size of scale, which are ``modulate``
with f the identity. f' and f'' are differentiable PyTorch code (ops/activations.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import activations
from ..checks import check_tensors
from ..dtypes import FLOATING, accumulation_dtype
from ..library import overloads, traceable
from ..rules import (
    Maybe,
    Rule,
    add,
    differentiating,
    is_distributed,
    nestable,
    primals,
    scatter,
    select,
    wanted,
)
from . import schema  # noqa: F401  (defines the operations)

_WORK = 32  # multiplications in the time to load one element from memory
_MODULATE = overloads("modulate")
_MODULATE_GRADS = overloads("modulate_grads")
_MIX = overloads("mix")
_MIX_GRADS = overloads("mix_grads")


class Form(NamedTuple):
    """F = factor * activation + offset, and whether F mixes x and shift; then it is the activation alone."""

    activation: str
    offset: float = 0.0
    factor: float = 1.0
    mixes: bool = False

    def of(self, x: Maybe, shift: Maybe) -> tuple[Any, Maybe, Maybe]:
        """What is linear in x and shift, where one of a mixture may be missing: a form of two tensors."""
        if not self.mixes or (x is not None and shift is not None):
            return self, x, shift
        if x is None:
            return Form(self.activation, 1 - self.offset, -self.factor), shift, None
        return self._replace(mixes=False), x, None


_IDENTITY = Form("identity")


def _check(backend, x, scale, shift, activation, scale_offset, scale_factor=1.0):
    check_tensors("modulate", ("x", "scale", "shift"), (x, scale, shift), 2, FLOATING)


def _check_mix(backend, a, b, gate, activation):
    check_tensors("mix", ("a", "b", "gate"), (a, b, gate), 3, FLOATING)


@traceable(
    "differentiable_modulate",
    "(str backend, Tensor x, Tensor scale, Tensor? shift, str activation, float scale_offset,"
    " float scale_factor=1.0) -> Tensor",
    _check,
)
def modulate(
    backend: str,
    x: Tensor,
    scale: Tensor,  # as many dimensions as x, each of its size or 1
    shift: Maybe,  # the same
    activation: str,
    scale_offset: float,
    scale_factor: float = 1.0,
) -> Tensor:
    """y = (c act(scale) + s) * x + shift, differentiable. Its arguments were checked by the caller."""
    return _applied(backend, Form(activation, scale_offset, scale_factor), x, scale, shift)


@traceable(
    "differentiable_mix",
    "(str backend, Tensor a, Tensor b, Tensor gate, str activation) -> Tensor",
    _check_mix,
)
def mix(
    backend: str,
    a: Tensor,
    b: Tensor,  # of the size of a
    gate: Tensor,  # as many dimensions, each of this size or 1
    activation: str,
) -> Tensor:
    """y = b + act(gate) * (a - b), differentiable. Its arguments were checked by the caller."""
    return _applied(backend, Form(activation, mixes=True), a, gate, b)


def _applied(backend: str, form: Form, x: Tensor, scale: Tensor, shift: Maybe) -> Tensor:
    if form.activation == "softmax":
        scale, form = torch.softmax(scale, -1), form._replace(activation="identity")
    if differentiating((x, scale, shift)):
        return (MixRule if form.mixes else ModulateRule).call(backend, form, x, scale, shift)
    return _value(backend, form, x, scale, shift)


def _value(backend: str, form: Form, x: Tensor, scale: Tensor, shift: Maybe) -> Tensor:
    if form.mixes:
        return _MIX[backend](x, shift, scale, form.activation)
    return _MODULATE[backend](x, scale, shift, form.activation, form.offset, form.factor)


def _gradients(
    backend: str,
    want: Sequence[bool],
    form: Form,
    shift_size: Sequence[int],
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    other: Maybe,
) -> tuple[Tensor, Tensor, Tensor]:
    if form.mixes:
        want_x, want_scale, want_other = want
        wants = want_x, want_other, want_scale
        dx, dother, dscale = _MIX_GRADS[backend](grad, x, other, scale, form.activation, *wants)
        return dx, dscale, dother
    rule = (form.activation, form.offset, *want, form.factor)
    return _MODULATE_GRADS[backend](grad, x, scale, shift_size, *rule)


def modulate_grads(
    backend: str,
    want: Sequence[bool],
    activation: str,
    scale_offset: float,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift_size: Sequence[int],
    scale_factor: float = 1.0,
) -> tuple[Maybe, ...]:
    """(dx, dscale, dshift) of (c act(scale) + s) * x + shift, as `_grads`."""
    form = Form(activation, scale_offset, scale_factor)
    return _grads(backend, want, form, grad, x, scale, shift_size)


def tangent(
    backend: str,
    form: Form,
    x: Tensor,
    scale: Tensor,
    other: Maybe,  # the shift of a mixture
    x_t: Maybe,
    scale_t: Maybe,
    shift_t: Maybe,
) -> Maybe:
    """The tangent of y along those of its arguments; it broadcasts to y, None without any. Differentiable."""
    by_scale = None
    if scale_t is not None:
        direction = activations.tangent(form.activation, scale, scale_t)
        if other is not None:
            by_scale = _times(backend, x - other, direction, form.factor)
        else:
            by_scale = modulate(backend, x, direction, shift_t, "identity", 0.0, form.factor)
            shift_t = None
    found = add(_along(backend, form, x_t, scale, shift_t), by_scale)
    return shift_t if found is None else found


def _grads(
    backend: str,
    want: Sequence[bool],
    form: Form,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift_size: Sequence[int],
    other: Maybe = None,  # the shift of a mixture
) -> tuple[Maybe, ...]:
    """(dx, dscale, dshift), each None where it is not wanted. Differentiable; not for softmax."""
    if want[2] and not form.mixes and tuple(shift_size) == tuple(grad.shape):
        return *_grads(backend, (*want[:2], False), form, grad, x, scale, ())[:2], grad
    if want[2] and not form.mixes and is_distributed(grad):  # the operation would need the size of each part
        summed = [dim for dim, size in enumerate(shift_size) if size != grad.shape[dim]]
        others = _grads(backend, (*want[:2], False), form, grad, x, scale, ())[:2]
        return *others, grad.sum(summed, keepdim=True)
    want = tuple(want)
    if not any(want):
        return None, None, None
    if differentiating((grad, x, scale, other)):
        rule = MixGradsRule if form.mixes else ModulateGradsRule
        results = rule.call(backend, want, form, shift_size, grad, x, scale, other)
        return tuple(scatter(results, want))
    results = _gradients(backend, want, form, shift_size, grad, x, scale, other)
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
        dx, dgate, _ = modulate_grads(backend, (*want, False), activation, scale_offset, grad, x, gate, ())
        return dx, dgate
    wide = torch.softmax(gate, -1, dtype=accumulation_dtype(gate.dtype))
    p = wide.to(gate.dtype)
    dx, dp, _ = modulate_grads(backend, (*want, False), "identity", scale_offset, grad, x, p, ())
    return dx, None if dp is None else activations.through_softmax(wide, dp)


def _along(backend: str, form: Form, x_c: Maybe, scale: Tensor, shift_c: Maybe) -> Maybe:
    """y of other x and shift; None without one to multiply."""
    form, x, shift = form.of(x_c, shift_c)
    return None if x is None else _applied(backend, form, x, scale, shift)


def _scale_grad(backend: str, form: Form, grad: Tensor, x_c: Maybe, scale: Tensor, shift_c: Maybe) -> Maybe:
    """dscale of other x and shift."""
    form, x, shift = form.of(x_c, shift_c)
    if x is None:
        return None
    other = shift if form.mixes else None
    return _grads(backend, (False, True, False), form, grad, x, scale, (), other)[1]


def _times(backend: str, x: Tensor, factor: Tensor, number: float) -> Tensor:
    return modulate(backend, x, factor, None, "identity", 0.0, number)


def _curvature(
    backend: str, form: Form, grad: Tensor, x: Tensor, scale: Tensor, other: Maybe, direction: Tensor
) -> Any:
    """F''(scale) times the direction and R[(x - other) g]."""
    rule = Form("identity", 0.0, form.factor, form.mixes)
    reduced: Any = _scale_grad(backend, rule, grad, x, scale, other)
    return activations.curvature(form.activation, scale, direction, reduced)


class ModulateRule(Rule):
    @staticmethod
    def forward(backend, form, x, scale, shift):
        return _value(backend, form, x, scale, shift)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.form, x, scale, shift = inputs
        ctx.shift_size = () if shift is None else shift.shape
        Rule.save(ctx, x, scale, shift if ctx.form.mixes else None)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 5
        x, scale, other = ctx.saved_tensors
        want, size = wanted(ctx, _WORK * grad.numel())[2:], ctx.shift_size
        return (None, None, *_grads(ctx.backend, want, ctx.form, grad, x, scale, size, other))

    @staticmethod
    @nestable
    def jvp(ctx, _, __, x_t, scale_t, shift_t):
        x, scale, other = primals(ctx)
        found = tangent(ctx.backend, ctx.form, x, scale, other, x_t, scale_t, shift_t)
        if found is None:
            return torch.zeros_like(x)
        return torch.zeros_like(x) + found if found is shift_t else found

    @staticmethod
    def vmap(info, in_dims, backend, form, x, scale, shift):
        x = dim_first(x, in_dims[2], info.batch_size)
        scale = dim_first(scale, in_dims[3], 1)
        shift = dim_first(shift, in_dims[4], info.batch_size if form.mixes else 1)
        return _applied(backend, form, x, scale, shift), 0


class ModulateGradsRule(Rule):
    @staticmethod
    def forward(backend, want, form, shift_size, grad, x, scale, other):
        return select(_gradients(backend, want, form, shift_size, grad, x, scale, other), want)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.want, ctx.form, ctx.shift_size, *tensors = inputs
        Rule.save(ctx, *tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        x_c, scale_c, shift_c = scatter(cotangents, ctx.want)
        grad, x, scale, other = ctx.saved_tensors
        need = wanted(ctx, _WORK * grad.numel())[4:]
        backend, form = ctx.backend, ctx.form
        slope = None  # f'(scale) scale_c, of the size of scale
        if scale_c is not None and (need[0] or need[1] or need[3]):
            slope = activations.tangent(form.activation, scale, scale_c)
        by_grad = by_x = by_scale = None
        if need[0]:
            along = _along(backend, form, x_c, scale, shift_c)
            if along is None and shift_c is not None:
                along = shift_c.expand(grad.shape)
            difference = x if other is None else x - other
            by_grad = add(None if slope is None else _times(backend, difference, slope, form.factor), along)
        if (need[1] or need[3]) and slope is not None:
            by_x = _times(backend, grad, slope, form.factor)
        if need[2]:
            terms = [_scale_grad(backend, form, grad, x_c, scale, shift_c)]
            if scale_c is not None and form.activation != "identity":
                terms.append(_curvature(backend, form, grad, x, scale, other, scale_c))
            by_scale = add(*terms)
        by_other = -by_x if need[3] and by_x is not None else None
        return None, None, None, None, by_grad, by_x, by_scale, by_other

    @staticmethod
    @nestable
    def jvp(ctx, _, __, ___, ____, grad_t, x_t, scale_t, other_t):
        grad, x, scale, other = primals(ctx)
        backend, form, (want_x, want_scale, want_shift) = ctx.backend, ctx.form, ctx.want
        zero = (x.new_zeros(x.shape), scale.new_zeros(scale.shape), grad.new_zeros(ctx.shift_size))
        terms: list[tuple[Maybe, ...]] = [(None, None, None)]
        if grad_t is not None:
            terms.append(_grads(backend, ctx.want, form, grad_t, x, scale, ctx.shift_size, other))
        if want_scale:
            terms.append((None, _scale_grad(backend, form, grad, x_t, scale, other_t), None))
        if scale_t is not None:
            by_x = by_scale = by_other = None
            if want_x or (want_shift and form.mixes):
                slope = activations.tangent(form.activation, scale, scale_t)
                by_x = _times(backend, grad, slope, form.factor)
                by_other = -by_x if form.mixes else None
            if want_scale and form.activation != "identity":
                by_scale = _curvature(backend, form, grad, x, scale, other, scale_t)
            terms.append((by_x, by_scale, by_other))
        tangents = [add(*parts) for parts in zip(*terms, strict=True)]
        return select([z if t is None else t for z, t in zip(zero, tangents, strict=True)], ctx.want)

    @staticmethod
    def vmap(info, in_dims, backend, want, form, shift_size, *tensors):
        size = info.batch_size
        grad, x, scale, other = (dim_first(t, d, size) for t, d in zip(tensors, in_dims[4:], strict=True))
        shift_size = (size, *shift_size) if want[2] else shift_size
        results = _grads(backend, want, form, grad, x, scale, shift_size, other)
        results = select(results, want)
        return results, (0,) * len(results)


class MixRule(ModulateRule):
    pass


class MixGradsRule(ModulateGradsRule):
    pass


def dim_first(tensor: Maybe, dim: int | None, size: int) -> Any:
    """The dimension that vmap maps over first; a tensor that is not mapped is expanded to ``size``."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
