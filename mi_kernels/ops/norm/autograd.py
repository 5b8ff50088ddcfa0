"""Derivative rules of normalisation with modulation and a gated residual.

    x_new = x + gate h,   n = (x_new - mean) rstd,   y = (n w + b) F + shift,   F = act(scale) + s

The backward pass is one operation. Where it is differentiated itself, or mapped, it is composed of the rules
of modulation for each product, and of

    J(u) = rstd (u - m(u) - n m(u n))                                    (rms: without m(u))

for n, with m the mean over a set. J is symmetric: its own derivative by u is J, and that of <c, J(u)> by x is

    -rstd (n m(J(u) c) + J(u) m(c n) + J(c) m(u n)),

three modulations with factors of the size of rstd, whose derivative along t is -rstd^2 m(n t). So derivatives
of all orders are composed of what is here and of modulation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_tensors
from ..dtypes import FLOATING
from ..library import traceable
from ..modulate import autograd as elementwise
from ..modulate.autograd import dim_first
from ..rules import Maybe, Rule, add, differentiating, nestable, primals, transformed, wanted
from . import terms
from .terms import IDENTITY, Form, Kept

_WORK = 1  # all gradients come of one pass: one that is not wanted costs little more than its stores
_NAMES = ("x", "h", "gate", "scale", "shift", "weight", "bias")


def _check(backend, x, h, gate, scale, shift, weight, bias, *_):
    check_tensors("norm_modulate", _NAMES, (x, h, gate, scale, shift, weight, bias), 1, FLOATING)


@traceable(
    "differentiable_norm_modulate",
    "(str backend, Tensor x, Tensor? h, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight,"
    " Tensor? bias, int dim, int groups, bool center, float eps, str activation, float scale_offset)"
    " -> (Tensor, Tensor)",
    _check,
)
def norm_modulate(
    backend: str,
    x: Tensor,
    h: Maybe,  # as x
    gate: Maybe,  # the contexts have one size, with 1 behind dim
    scale: Maybe,
    shift: Maybe,
    weight: Maybe,  # C, and 1 elsewhere
    bias: Maybe,
    dim: int,
    groups: int,
    center: bool,
    eps: float,
    activation: str,  # elementwise
    scale_offset: float,
) -> tuple[Tensor, Tensor]:
    """y and x_new, which without h has no elements; differentiable. The caller has checked the arguments."""
    form = Form(dim, groups, center, eps, activation, scale_offset)
    return _applied(backend, form, x, h, gate, scale, shift, weight, bias)[:2]


def _applied(backend: str, form: Form, *tensors: Maybe) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x_new, mean and rstd."""
    if differentiating(tensors):
        return NormModulateRule.call(backend, form, *tensors)
    return terms.kernel(backend, form, *tensors)


def _normalized(backend: str, form: Form, x: Tensor) -> Tensor:
    """n of x, differentiable."""
    return _applied(backend, form.plain, x, None, None, None, None, None, None)[0]


class NormModulateRule(Rule):
    @staticmethod
    def forward(backend, form, *tensors):
        return terms.kernel(backend, form, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.form, x, h, gate, scale, shift, weight, bias = inputs
        _, x_new, mean, rstd = output
        ctx.has_h, ctx.shift_size = h is not None, None if shift is None else shift.shape
        differs = transformed() or any(t is not None and t.requires_grad for t in (x, h, gate))
        constants = (mean, rstd) if ctx.has_h and differs else (x_new, mean, rstd)
        ctx.mark_non_differentiable(*constants)
        # What made h may have kept no reference to it, and only the gradient and tangent of the gate read it.
        if gate is None or not (gate.requires_grad or transformed()):
            h = None
        x = x_new if ctx.has_h else x
        Rule.save(ctx, x, h, gate, scale, weight, bias, mean if ctx.form.center else None, rstd)

    @staticmethod
    def backward(ctx, grad, grad_x, *_):
        x, h, gate, scale, weight, bias, mean, rstd = ctx.saved_tensors
        want_x, *want = wanted(ctx, _WORK * x.numel())[2:]
        if not ctx.has_h or grad_x is None or grad_x.numel() != x.numel():
            grad_x = None
        if grad is None and grad_x is None:
            return (None,) * 9
        want_h = want[0]
        through = want_x or (want_h and gate is None)  # dh is dx without a gate
        want = (through, want_h and gate is not None, *want[1:])
        kept = Kept(x, h, gate, scale, ctx.shift_size, weight, bias, mean, rstd)
        found: Sequence[Maybe]
        if grad is None:
            found = (*terms.residual_grads(ctx.backend, want[:3], grad_x, h, gate), *(None,) * 4)
        elif differentiating((grad, grad_x, x, h, gate, scale, weight, bias)):
            found = _composed_grads(ctx.backend, ctx.form, want, grad, grad_x, kept)
        else:
            # A shift of the size of y has its gradient.
            same = want[4] and tuple(ctx.shift_size) == tuple(grad.shape)
            asked = (*want[:4], want[4] and not same, *want[5:])
            found = terms.gradients(ctx.backend, ctx.form, asked, grad, grad_x, kept)
            found = (*found[:4], grad, *found[5:]) if same else found
        dx, dh, *others = found
        dh = dx if want_h and gate is None else dh
        return None, None, dx if want_x else None, dh, *others

    @staticmethod
    @nestable
    def jvp(ctx, _, __, x_t, h_t, gate_t, scale_t, shift_t, weight_t, bias_t):
        x, h, gate, scale, weight, bias, mean, rstd = primals(ctx)
        backend, form = ctx.backend, ctx.form
        if gate is None:
            x_t = add(x_t, h_t)
        elif h is None:  # nothing depends on the gate
            along = None if h_t is None else elementwise.modulate(backend, h_t, gate, None, "identity", 0.0)
            x_t = add(x_t, along)
        else:
            x_t = elementwise.tangent(backend, IDENTITY, h, gate, None, h_t, gate_t, x_t)
        x_t = None if x_t is None else x_t.expand(x.shape)
        n = _normalized(backend, form, x)
        v = terms.modulated(backend, IDENTITY, n, weight, bias)
        n_t = None if x_t is None else _project(backend, form, x_t, x, mean, rstd)
        v_t = terms.modulated_tangent(backend, IDENTITY, n, weight, n_t, weight_t, bias_t)
        v_t = None if v_t is None else v_t.expand(x.shape)
        y_t = terms.modulated_tangent(backend, form.factor, v, scale, v_t, scale_t, shift_t)
        y_t = torch.zeros_like(x) if y_t is None else y_t.expand(x.shape).contiguous()
        if not ctx.has_h:
            return y_t, None, None, None
        return y_t, torch.zeros_like(x) if x_t is None else x_t.contiguous(), None, None

    @staticmethod
    def vmap(info, in_dims, backend, form, *tensors):
        size, dims = info.batch_size, in_dims[2:]
        form = form._replace(dim=form.dim + 1)
        x, h = (dim_first(t, d, size) for t, d in zip(tensors[:2], dims[:2], strict=True))
        # The contexts have one size, so if one of them is mapped all are.
        shared = size if any(d is not None for d in dims[2:5]) else 1
        contexts = [dim_first(t, d, shared) for t, d in zip(tensors[2:5], dims[2:5], strict=True)]
        affine = [dim_first(t, d, 1) for t, d in zip(tensors[5:], dims[5:], strict=True)]
        mapped = any(d is not None for d in dims[5:])
        apply = _composed if mapped else _applied
        results: Any = apply(backend, form, x, h, *contexts, *affine)
        # One without elements has the mapped dimension, too.
        results = tuple(t if t.numel() or t.dim() > 1 else t.new_empty(size, 0) for t in results)
        return results, (0,) * len(results)


def _composed(
    backend: str,
    form: Form,
    x: Tensor,
    h: Maybe,
    gate: Maybe,
    scale: Maybe,
    shift: Maybe,
    weight: Maybe,  # [..., C, ...], of several sizes besides
    bias: Maybe,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_applied` as separate operations, for weights that vary."""
    nothing: tuple[None, ...] = (None,) * 4
    n, x_new, mean, rstd = _applied(backend, form.plain, x, h, gate, *nothing)
    v = terms.modulated(backend, IDENTITY, n, weight, bias)
    return terms.modulated(backend, form.factor, v, scale, shift), x_new, mean, rstd


def _composed_grads(
    backend: str, form: Form, want: Sequence[bool], grad: Tensor, grad_x: Maybe, kept: Kept
) -> list[Maybe]:
    """`gradients` of terms.py by differentiable operations."""
    x, h, gate, scale, shift_size, weight, bias, mean, rstd = kept
    want_x, want_h, want_gate, want_scale, want_shift, want_weight, want_bias = want
    want_new = want_x or want_h or want_gate
    n = v = grad  # where neither is read
    if want_scale or want_weight:
        n = _normalized(backend, form, x)
        v = terms.modulated(backend, IDENTITY, n, weight, bias) if want_scale else n
    wants = want_new or want_weight or want_bias, want_scale, want_shift
    dv, dscale, dshift = terms.modulated_grads(backend, wants, form.factor, grad, v, scale, shift_size or ())
    dn = dweight = dbias = None
    if dv is not None:
        wants, size = (want_new, want_weight, want_bias), () if bias is None else bias.shape
        dn, dweight, dbias = terms.modulated_grads(backend, wants, IDENTITY, dv, n, weight, size)
    dx = dh = dgate = None
    if want_new:
        assert dn is not None
        new: Any = add(_project(backend, form, dn, x, mean, rstd), grad_x)
        dx, dh, dgate = terms.residual_grads(backend, want[:3], new, h, gate)
    return [dx, dh, dgate, dscale, dshift, dweight, dbias]


def _project(backend: str, form: Form, u: Tensor, x: Tensor, mean: Maybe, rstd: Tensor) -> Tensor:
    """J(u) at x, whose statistics are given. Differentiable in u and x."""
    if differentiating((u, x)):
        return NormModulateProjectionRule.call(backend, form.plain, u, x, mean, rstd)
    return _projected(backend, form, u, x, mean, rstd)


def _projected(backend: str, form: Form, u: Tensor, x: Tensor, mean: Maybe, rstd: Tensor) -> Tensor:
    want = (True, *(False,) * 6)
    kept = Kept(x, None, None, None, None, None, None, mean, rstd)
    found = terms.gradients(backend, form.plain, want, u, None, kept)[0]
    assert found is not None
    return found


def _by_x(
    backend: str, form: Form, u: Tensor, x: Tensor, ju: Tensor, c: Tensor, jc: Tensor, rstd: Tensor
) -> Tensor:
    """The derivative of <c, J(u)> by x, or that of J(u) along c: they are the same. Differentiable."""
    n = _normalized(backend, form, x)
    r = _rstd(backend, form, x, rstd)
    result = None
    for tensor, a, b in ((n, ju, c), (ju, c, n), (jc, u, n)):
        factor = r * terms.mean_of_products(backend, form, a, b, r, -1.0)
        result = elementwise.modulate(backend, form.sets(tensor), factor, result, "identity", 0.0)
    assert result is not None
    return result.reshape(x.shape)


class NormModulateProjectionRule(Rule):
    """J(u) at x; mean and rstd are constants here, as the formulas are those of n as a function of x."""

    @staticmethod
    def forward(backend, form, u, x, mean, rstd):
        return _projected(backend, form, u, x, mean, rstd)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.form, *tensors = inputs
        Rule.save(ctx, *tensors, output)

    @staticmethod
    def backward(ctx, c):
        if c is None:
            return (None,) * 6
        u, x, mean, rstd, ju = ctx.saved_tensors
        backend, form = ctx.backend, ctx.form
        want_u, want_x = wanted(ctx, _WORK * x.numel())[2:4]
        jc = _project(backend, form, c, x, mean, rstd)
        dx = _by_x(backend, form, u, x, ju, c, jc, rstd) if want_x else None
        return None, None, jc if want_u else None, dx, None, None

    @staticmethod
    @nestable
    def jvp(ctx, _, __, u_t, x_t, *___):
        u, x, mean, rstd, _ = primals(ctx)
        backend, form, parts = ctx.backend, ctx.form, []
        if u_t is not None:
            parts.append(_project(backend, form, u_t, x, mean, rstd))
        if x_t is not None:
            ju, jx = (_project(backend, form, t, x, mean, rstd) for t in (u, x_t))
            parts.append(_by_x(backend, form, u, x, ju, x_t, jx, rstd))
        tangent = add(*parts)
        return torch.zeros_like(x) if tangent is None else tangent

    @staticmethod
    def vmap(info, in_dims, backend, form, *tensors):
        pairs = zip(tensors, in_dims[2:], strict=True)
        tensors = tuple(dim_first(t, d, info.batch_size) for t, d in pairs)
        return _project(backend, form._replace(dim=form.dim + 1), *tensors), 0


def _rstd(backend: str, form: Form, x: Tensor, rstd: Tensor) -> Tensor:
    """rstd as a function of x, in its dtype, as wide as `Form.sets`. Differentiable."""
    if differentiating((x,)):
        return NormModulateRstdRule.call(backend, form.plain, x, rstd)
    return form.per_set(rstd, x.dim()).to(x.dtype)


class NormModulateRstdRule(Rule):
    @staticmethod
    def forward(backend, form, x, rstd):
        return form.per_set(rstd, x.dim()).to(x.dtype, copy=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.form, *tensors = inputs
        Rule.save(ctx, *tensors)

    @staticmethod
    def backward(ctx, c):
        if c is None:
            return (None,) * 4
        x, rstd = ctx.saved_tensors
        n, r = _normalized(ctx.backend, ctx.form, x), _rstd(ctx.backend, ctx.form, x, rstd)
        slope, number = c * r * r, -1.0 / ctx.form.count(x)
        sets = ctx.form.sets(n)
        dx = elementwise.modulate(ctx.backend, sets, slope, None, "identity", 0.0, number)
        return None, None, dx.reshape(x.shape), None

    @staticmethod
    @nestable
    def jvp(ctx, _, __, x_t, ___):
        x, rstd = primals(ctx)
        n, r = _normalized(ctx.backend, ctx.form, x), _rstd(ctx.backend, ctx.form, x, rstd)
        return r * r * terms.mean_of_products(ctx.backend, ctx.form, n, x_t, r, -1.0)

    @staticmethod
    def vmap(info, in_dims, backend, form, *tensors):
        pairs = zip(tensors, in_dims[2:], strict=True)
        x, rstd = (dim_first(t, d, info.batch_size) for t, d in pairs)
        return _rstd(backend, form._replace(dim=form.dim + 1), x, rstd), 0
