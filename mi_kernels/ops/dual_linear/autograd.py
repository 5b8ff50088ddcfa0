"""Derivative rule of two linear maps that are multiplied, y = sum_r f(p_r) * h(q_r).

    p = A x + a,  q = C z + c,  by ranks [R, O]

The compiled kernels compute y in one pass. Where something is differentiated they also return p and q.
Backward makes (dp | dq) of them in one pass; all else is products of the dense interaction, one for both maps
where their weights are one packed tensor. Derivatives of the gradients compute p and q again by
differentiable calls, and are modulation: no rule is written twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import activations
from ..checks import check_shape, check_tensors
from ..dtypes import FLOATING
from ..interaction import autograd as dense
from ..interaction.linear import linear_grads
from ..interaction.shared import linear
from ..library import overloads, traceable
from ..modulate import autograd as elementwise
from ..rules import (
    Fold,
    Maybe,
    Rule,
    add,
    differentiating,
    nestable,
    primals,
    unbatched,
    wanted,
    without_features,
)
from . import schema  # noqa: F401  (defines the operations)

_DUAL_LINEAR = overloads("dual_linear")
_GRADS = overloads("dual_linear_grads")


def _check(backend, activation_x, activation_z, ranks, x, z, weight_x, weight_z, bias_x, bias_z):
    op, names = "dual_linear", ("x", "weight_x", "z", "weight_z", "bias_x", "bias_z")
    check_tensors(op, names, (x, weight_x, z, weight_z, bias_x, bias_z), 2, FLOATING)
    check_shape(op, "x", x, {"B": None, "X": None})
    if weight_z is not None:
        return
    check_shape(op, "weight_x", weight_x, {"2N": None, "X": x.shape[-1]})
    check_shape(op, "bias_x", bias_x, {"2N": weight_x.shape[0]})
    for name, tensor in (("z", z), ("bias_z", bias_z)):
        if tensor is not None:
            raise ValueError(f"{op}: {name}: expected None beside a packed weight_x, got a tensor")


@traceable(
    "differentiable_dual_linear",
    "(str backend, str activation_x, str activation_z, int ranks, Tensor x, Tensor? z, Tensor weight_x,"
    " Tensor? weight_z, Tensor? bias_x, Tensor? bias_z) -> Tensor",
    _check,
)
def dual_linear(
    backend: str,
    activation_x: str,
    activation_z: str,
    ranks: int,
    x: Tensor,  # [B, X]
    z: Maybe,  # [B, Z]; None: it is x
    weight_x: Tensor,  # A [N, X]
    weight_z: Maybe,  # C [N, Z]; None: weight_x is [2N, X], A above C, and bias_x [2N]
    bias_x: Maybe,  # [N]
    bias_z: Maybe,  # [N]
) -> Tensor:
    """y = sum_r f(A_r x + a_r) * h(C_r z + c_r) [B, O], differentiable."""
    rule, tensors = (backend, activation_x, activation_z, ranks), (x, z, weight_x, weight_z, bias_x, bias_z)
    if differentiating(tensors):
        return _rule(z).call(*rule, *tensors)[0]
    return _kernel(*rule, False, *tensors)[0]


def glu(
    backend: str,
    activation: str,
    gate_first: bool,
    x: Tensor,  # [B, X]
    weight: Tensor,  # [2H, X], or [H, X] beside weight_value
    bias: Maybe,
    weight_value: Maybe,  # [H, X]
    bias_value: Maybe,
) -> Tensor:
    """y = act(G x + a) * (V x + c), differentiable. softmax needs whole rows of both maps."""
    if activation == "softmax":
        gate, value = products(backend, x, None, weight, weight_value, bias, bias_value)
        gate, value = (gate, value) if gate_first else (value, gate)
        return elementwise.modulate(backend, value, gate, None, activation, 0.0)
    maps = (activation, "identity") if gate_first else ("identity", activation)  # the product commutes
    return dual_linear(backend, *maps, 1, x, None, weight, weight_value, bias, bias_value)


def _kernel(backend, activation_x, activation_z, ranks, keep, x, z, weight_x, weight_z, bias_x, bias_z):
    if weight_z is None:
        weight_x, weight_z = _halves(weight_x, 0)
        bias_x, bias_z = (None, None) if bias_x is None else _halves(bias_x, 0)
    weights = weight_x, weight_z, bias_x, bias_z
    return _DUAL_LINEAR[backend](x, z, *weights, activation_x, activation_z, ranks, keep)


def _halves(packed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    half = packed.shape[dim] // 2
    return packed.narrow(dim, 0, half), packed.narrow(dim, half, half)


def products(
    backend: str, x: Tensor, z: Maybe, weight_x: Tensor, weight_z: Maybe, bias_x: Maybe, bias_z: Maybe
) -> tuple[Tensor, Tensor]:
    """p and q, differentiable; every tensor may have one more leading dimension of groups."""
    p = linear(backend, x, weight_x, bias_x)
    if weight_z is None:
        return _halves(p, -1)
    return p, linear(backend, x if z is None else z, weight_z, bias_z)


def multiply(backend: str, activation_x: str, activation_z: str, ranks: int, p: Tensor, q: Tensor) -> Tensor:
    """sum_r f(p_r) * h(q_r) of p and q that broadcast, differentiable."""
    shape = torch.broadcast_shapes(p.shape, q.shape)
    if q.shape != shape:  # the operand that need not be expanded
        p, q, activation_x, activation_z = q, p, activation_z, activation_x
    value = _activated(backend, activation_z, q)
    y = elementwise.modulate(backend, value.expand(shape), p, None, activation_x, 0.0)
    return y if ranks == 1 else _by_ranks(y, ranks).sum(-2)


def composed(
    backend: str, activation_x: str, activation_z: str, ranks: int, *tensors: Maybe
) -> tuple[Tensor, Tensor, Tensor]:
    """y, p and q as separate operations."""
    p, q = products(backend, *tensors)  # type: ignore[arg-type]
    return multiply(backend, activation_x, activation_z, ranks, p, q), p, q


def _by_ranks(tensor: Tensor, ranks: int) -> Tensor:
    """[..., N] as [..., R, O]."""
    return tensor.reshape(*tensor.shape[:-1], ranks, tensor.shape[-1] // ranks)


def _ones(like: Tensor) -> Tensor:
    return like.new_ones(()).expand(like.shape)


def _activated(backend: str, activation: str, t: Tensor) -> Tensor:
    if activation == "identity":
        return t
    return elementwise.modulate(backend, _ones(t), t, None, activation, 0.0)


def _grads(
    backend: str, activation_x: str, activation_z: str, ranks: int, grad: Tensor, p: Tensor, q: Tensor
) -> Tensor:
    """(dp | dq), differentiable."""
    if ranks > 1:
        grad = grad.unsqueeze(-2).expand(*grad.shape[:-1], ranks, grad.shape[-1]).reshape(p.shape)
    value = _activated(backend, activation_z, q)
    dq, dp = elementwise.gate_grads(backend, (True, True), activation_x, 0.0, grad, value, p)
    assert dp is not None and dq is not None
    if activation_z != "identity":
        rule = backend, (False, True, False), activation_z, 0.0
        _, dq, _ = elementwise.modulate_grads(*rule, dq, _ones(q), q, ())
        assert dq is not None
    return torch.cat((dp, dq), -1)


class DualLinearRule(Rule):
    @staticmethod
    def forward(backend, activation_x, activation_z, ranks, *tensors):
        return _kernel(backend, activation_x, activation_z, ranks, True, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule, tensors = inputs[:4], inputs[4:]
        ctx.mark_non_differentiable(*output[1:])
        Rule.save(ctx, *tensors, *output[1:])

    @staticmethod
    def backward(ctx, grad, _, __):
        if grad is None:
            return (None,) * 10
        *tensors, p, q = ctx.saved_tensors
        x, z, weight_x, weight_z, *_ = tensors
        backend, activation_x, activation_z, ranks = ctx.rule
        need = wanted(ctx, 2 * p.numel() * x.shape[-1])[4:]
        if differentiating((grad, *tensors)):  # the kept p and q are constants to them
            p, q = products(backend, *tensors)
            d = _grads(backend, activation_x, activation_z, ranks, grad, p, q)
        else:
            d = _GRADS[backend](grad, p, q, activation_x, activation_z, ranks)
        if weight_z is None:
            dx, da, d_bias = linear_grads(backend, (need[0], need[2], need[4]), d, x, weight_x)
            return None, None, None, None, dx, None, da, None, d_bias, None
        dp, dq = _halves(d, -1)
        want_x, want_z = z is not None and need[0], z is not None and need[1]
        by_x, da, d_bias_x = linear_grads(backend, (want_x, need[2], need[4]), dp, x, weight_x)
        of_z = x if z is None else z
        dz, dc, d_bias_z = linear_grads(backend, (want_z, need[3], need[5]), dq, of_z, weight_z)
        if z is None and need[0]:
            # Both terms in one product. Last: before the gradients of the weights, glibc's heap grew by these
            # in each step of a loop, though nothing was kept.
            by_x = dense.forward(backend, dp, dq, None, weight_z.mT, weight_x.mT, None)
        return None, None, None, None, by_x, dz, da, dc, d_bias_x, d_bias_z

    @staticmethod
    @nestable
    def jvp(ctx, _, __, ___, ____, *tangents):
        *tensors, _, _ = primals(ctx)
        backend, activation_x, activation_z, ranks = ctx.rule
        p, q = products(backend, *tensors)
        p_t, q_t = _tangents(backend, tensors, tangents)
        terms = []
        if p_t is not None:
            direction = activations.tangent(activation_x, p, p_t)
            terms.append(multiply(backend, "identity", activation_z, ranks, direction, q))
        if q_t is not None:
            direction = activations.tangent(activation_z, q, q_t)
            terms.append(multiply(backend, activation_x, "identity", ranks, p, direction))
        tangent = add(*terms)
        return p.new_zeros((*p.shape[:-1], p.shape[-1] // ranks)) if tangent is None else tangent, None, None

    @staticmethod
    def vmap(info, in_dims, backend, activation_x, activation_z, ranks, *tensors):
        rule, dims = (backend, activation_x, activation_z, ranks), in_dims[4:]
        fold = Fold(info.batch_size, tensors[0], dims[0])
        if unbatched(dims[2:], tensors[2:]):
            rows = [None if t is None else fold.rows(t, d) for t, d in zip(tensors[:2], dims, strict=False)]
            return fold.all(fold.unrows, _rule(tensors[1]).call(*rule, *rows, *tensors[2:]))
        args = [fold.groups(t, d) for t, d in zip(tensors, dims, strict=True)]
        return fold.all(fold.ungroups, composed(*rule, *args))


class GLURule(DualLinearRule):
    pass


class LowRankRule(DualLinearRule):
    pass


def _rule(z: Maybe) -> type[Rule]:
    return GLURule if z is None else LowRankRule


def _product(backend: str, x: Tensor, weight: Maybe, bias: Maybe) -> Maybe:
    if weight is None and bias is None:
        return None
    return dense.forward(backend, x, without_features(x), None, None, weight, bias)


def _tangents(backend: str, tensors: Sequence[Any], tangents: Sequence[Maybe]) -> tuple[Maybe, Maybe]:
    """The tangents of p and q: of each product, with each factor replaced by its tangent."""
    x, z, weight_x, weight_z, *_ = tensors
    x_t, z_t, weight_x_t, weight_z_t, bias_x_t, bias_z_t = tangents

    def of_map(x: Tensor, x_t: Maybe, weight: Tensor, weight_t: Maybe, bias_t: Maybe) -> Maybe:
        by_x = None if x_t is None else linear(backend, x_t, weight, None)
        return add(by_x, _product(backend, x, weight_t, bias_t))

    p_t = of_map(x, x_t, weight_x, weight_x_t, bias_x_t)
    if weight_z is None:
        return (None, None) if p_t is None else _halves(p_t, -1)
    z, z_t = (x, x_t) if z is None else (z, z_t)
    return p_t, of_map(z, z_t, weight_z, weight_z_t, bias_z_t)
