"""S^2 of the error rule (errors.py) for results with an activation in them.

S^2 is the variance of a result, in units of rounding, whose terms are each rounded by one unit. A sum of
products t has S^2 = sum t^2. The activation f of a sum p with S_p^2 rounds the terms of its own formula, and
passes on what p brings: f'(p)^2 S_p^2; its derivative likewise with f''. The functions here take float64.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.activations import ELEMENTWISE
from ..ops.interaction.reference import interaction

Maybe = Tensor | None


def _terms(name: str, p: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the squared terms of f(p) and of f'(p)."""
    value, first, _ = (function(p) for function in ELEMENTWISE[name])
    if name == "sigmoid":
        return value**2, value**2 + value**4
    if name == "tanh":
        return value**2, 1 + value**4
    if name == "gelu":
        erf, density = torch.erf(p * 0.5**0.5), torch.exp(-0.5 * p * p) * 0.4
        return 0.25 * p**2 * (1 + erf**2), 0.25 * (1 + erf**2) + (p * density) ** 2
    if name == "gelu_tanh":
        tanh, slope = torch.tanh(0.8 * (p + 0.0447 * p**3)), 0.8 * (1 + 0.134 * p**2)
        return 0.25 * p**2 * (1 + tanh**2), 0.25 * (1 + tanh**2) + (0.5 * p * (1 - tanh**2) * slope) ** 2
    if name == "silu":
        s = torch.sigmoid(p)
        return value**2, s**2 * (1 + (p * (1 - s)) ** 2)
    if name == "quick_gelu":
        s = torch.sigmoid(1.702 * p)
        return value**2, s**2 * (1 + (1.702 * p * (1 - s)) ** 2)
    if name == "mish":
        h = value / torch.where(p == 0, torch.ones_like(p), p)
        return value**2, h**2 + (first - h) ** 2
    if name == "hardsigmoid":
        return torch.where(p.abs() < 3, (p**2 + 9) / 36, value**2), first**2
    if name == "hardswish":
        return torch.where(p.abs() < 3, p**2 * (p**2 + 9) / 36, value**2), p.square() / 9 + 0.25
    return value**2, first**2


# What f' jumps by at a kink, which a rounded p may cross.
_JUMPS = {"relu": 1.0, "hardsigmoid": 1 / 6, "hardswish": 0.5}


def _activated(name: str, p: Tensor, p2: Tensor | float) -> tuple[Tensor, Tensor]:
    """S^2 of f(p) and of f'(p), elementwise f."""
    _, first, second = (function(p) for function in ELEMENTWISE[name])
    value_terms, first_terms = _terms(name, p)
    slope = first**2
    if name in _JUMPS:
        slope = first_terms = torch.full_like(p, _JUMPS[name] ** 2)
    return value_terms + slope * p2, first_terms + second**2 * p2


def _softmax(p: Tensor, p2: Tensor | float) -> tuple[Tensor, Tensor]:
    """S^2 of f = softmax(p), and its square relative to f."""
    f = torch.softmax(p, -1)
    spread = p2 + (f**2 * p2).sum(-1, keepdim=True)
    return f**2 * (1 + spread), 1 + spread


def gate_value(name: str, offset: float, x: Tensor, p: Tensor, p2: Tensor | float) -> Tensor:
    """S^2 of (f(p) + s) * x."""
    f2 = _softmax(p, p2)[0] if name == "softmax" else _activated(name, p, p2)[0]
    return (f2 + offset**2) * x**2


def gate_slope(name: str, p: Tensor, p2: Tensor | float, h: Tensor, h2: Tensor) -> Tensor:
    """S^2 of the derivative by p, where h is that by f(p) and h2 its S^2."""
    if name != "softmax":
        return _activated(name, p, p2)[1] * h2
    f, (_, relative) = torch.softmax(p, -1), _softmax(p, p2)
    own = f**2 * (h2 + (f**2 * h2).sum(-1, keepdim=True))
    slope = f * (h - (f * h).sum(-1, keepdim=True))
    return own + relative * slope**2 + f**2 * (f**2 * relative * h**2).sum(-1, keepdim=True)


def modulate(
    name: str, offset: float, x: Tensor, scale: Tensor, shift: Maybe, factor: float = 1.0
) -> list[Tensor]:
    """S^2 of y."""
    y = gate_value(name, offset / factor, factor * x, scale, 0.0)
    return [y if shift is None else y + shift**2]


def modulate_grads(
    name: str, offset: float, grad: Tensor, x: Tensor, scale: Tensor, shift: Maybe, factor: float = 1.0
) -> list[Tensor]:
    """S^2 of dx, dscale and, where there is a shift, dshift."""
    dx = gate_value(name, offset / factor, factor * grad, scale, 0.0).sum_to_size(x.shape)
    result = [dx, _by_scale(name, factor * grad * x, scale)]
    return result if shift is None else [*result, grad.square().sum_to_size(shift.shape)]


def _by_scale(name: str, terms: Tensor, scale: Tensor) -> Tensor:
    size = scale.shape
    return gate_slope(name, scale, 0.0, terms.sum_to_size(size), terms.square().sum_to_size(size))


def mix(name: str, a: Tensor, b: Tensor, gate: Tensor) -> list[Tensor]:
    """S^2 of y, whose terms are f(gate) (a - b) and b."""
    return [gate_value(name, 0.0, a - b, gate, 0.0) + b**2]


def mix_grads(name: str, grad: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> list[Tensor]:
    """S^2 of da, db and dgate."""
    part = gate_value(name, 0.0, grad, gate, 0.0)
    db = (grad**2 + part).sum_to_size(b.shape)
    return [part.sum_to_size(a.shape), db, _by_scale(name, grad * (a - b), gate)]


def gate(
    name: str, offset: float, x: Tensor, z: Tensor, weights: Sequence[Maybe], c: Maybe, d: Maybe
) -> list[Tensor]:
    """S^2 of (f(p) + s) * x + C z + d with p of the dense interaction with ``weights``."""
    p, p2 = interaction(x, z, *weights), _squared(x, z, *weights)
    y = gate_value(name, offset, x, p, p2)
    return [y if c is None and d is None else y + _squared(x, z, None, c, None, d)]


def gate_grads(
    name: str,
    offset: float,
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    weights: Sequence[Maybe],
    c: Maybe,
    d: Maybe,
) -> list[Tensor]:
    """S^2 of the gradients by x, z, W, U, V, c and C, d, those that there are."""
    p, p2 = interaction(x, z, *weights), _squared(x, z, *weights)
    h = grad * x
    dp2 = gate_slope(name, p, p2, h, h.square()).detach()
    tensors = [None if t is None else t.square() for t in (x, z, *weights, c, d)]
    present = [t for t in tensors if t is not None]

    def value(*present: Tensor) -> Tensor:
        left = iter(present)
        x, z, w, u, v, bias, c, d = (None if t is None else next(left) for t in tensors)
        assert x is not None and z is not None
        found = (interaction(x, z, w, u, v, bias) * dp2).sum()
        if c is not None or d is not None:
            found = found + (interaction(x, z, None, c, None, d) * grad**2).sum()
        return found

    # Of torch.func, so that torch.vmap can map it over draws.
    grads = list(torch.func.grad(value, tuple(range(len(present))))(*present))
    grads[0] = grads[0] + gate_value(name, offset, grad, p, p2).sum_to_size(x.shape)
    return grads


def _squared(x: Tensor, z: Tensor, *weights: Maybe) -> Tensor:
    return interaction(x.square(), z.square(), *(None if t is None else t.square() for t in weights))


def _linear(x: Tensor, weight: Tensor, bias: Maybe) -> tuple[Tensor, Tensor]:
    """x A^T + a and its S^2."""
    squared = F.linear(x.square(), weight.square(), None if bias is None else bias.square())
    return F.linear(x, weight, bias), squared


class DualLinear(NamedTuple):
    """y = P sum_r f(A_r x + a_r) * h(C_r z + c_r) + U z + V x + d, A and C one dimension of [R, O]."""

    activation_x: str
    activation_z: str
    ranks: int
    x: Tensor
    z: Tensor
    weights: tuple[Tensor, Tensor, Maybe, Maybe]  # A, C, a, c
    terms: tuple[Maybe, Maybe, Maybe, Maybe]  # P, U, V, d


def _values(name: str, p: Tensor, p2: Tensor) -> tuple[Tensor, Tensor]:
    """f(p) and its S^2."""
    if name == "softmax":
        return torch.softmax(p, -1), _softmax(p, p2)[0]
    return ELEMENTWISE[name].value(p), _activated(name, p, p2)[0]


def _slope(name: str, p: Tensor, p2: Tensor, h: Tensor, h2: Tensor) -> Tensor:
    """`gate_slope` with S^2 of the slope times h^2, and the slope's square times S^2 of h."""
    if name == "softmax":
        return gate_slope(name, p, p2, h, h2)
    return _activated(name, p, p2)[1] * h**2 + ELEMENTWISE[name].first(p) ** 2 * h2


def _summed(t: Tensor, ranks: int) -> Tensor:
    return t if ranks == 1 else t.unflatten(-1, (ranks, -1)).sum(-2)


def _product(call: DualLinear) -> tuple[Tensor, ...]:
    """p and q, f and h of these, each with its S^2; the sum of products over ranks and its S^2."""
    a, c, a_bias, c_bias = call.weights
    p, q = _linear(call.x, a, a_bias), _linear(call.z, c, c_bias)
    f, h = _values(call.activation_x, *p), _values(call.activation_z, *q)
    own = f[1] * h[0] ** 2 + f[0] ** 2 * h[1]
    return *p, *q, *f, *h, _summed(f[0] * h[0], call.ranks), _summed(own, call.ranks)


def dual_linear(call: DualLinear) -> list[Tensor]:
    """S^2 of y."""
    *_, product, own = _product(call)
    out, *linear = call.terms
    if out is not None:
        own = F.linear(product**2 + own, out.square())
    if any(term is not None for term in linear):
        own = own + _through(out, product) ** 2 + _squared(call.x, call.z, None, *linear)
    return [own]


def _through(out: Maybe, product: Tensor) -> Tensor:
    return product if out is None else F.linear(product, out)


def dual_linear_grads(
    make: Callable[..., DualLinear], grad: Tensor, tensors: Sequence[Maybe]
) -> list[Tensor]:
    """S^2 of the gradients by the ``tensors`` that there are; ``make`` turns them into the call."""
    call = make(*tensors)
    p, p2, q, q2, f, f2, h, h2, product, own = _product(call)
    out = call.terms[0]
    g, g2 = (grad, torch.zeros_like(grad)) if out is None else _linear(grad, out.mT, None)
    g, g2 = (t if call.ranks == 1 else t.repeat(*(1,) * (t.dim() - 1), call.ranks) for t in (g, g2))
    dp2 = _slope(call.activation_x, p, p2, g * h, g2 * h**2 + g**2 * h2)
    dq2 = _slope(call.activation_z, q, q2, g * f, g2 * f**2 + g**2 * f2)
    # Of each contraction the sum of the squared terms is that contraction of squares.
    dp2, dq2, left = dp2.detach(), dq2.detach(), (product**2 + own).detach()
    present = [t.square() for t in tensors if t is not None]

    def value(*present: Tensor) -> Tensor:
        given = iter(present)
        squared = make(*(None if t is None else next(given) for t in tensors))
        a, c, a_bias, c_bias = squared.weights
        found = (F.linear(squared.x, a, a_bias) * dp2).sum() + (F.linear(squared.z, c, c_bias) * dq2).sum()
        out, *linear = squared.terms
        if out is not None:
            found = found + (F.linear(left, out) * grad**2).sum()
        if any(term is not None for term in linear):
            found = found + (interaction(squared.x, squared.z, None, *linear) * grad**2).sum()
        return found

    return list(torch.func.grad(value, tuple(range(len(present))))(*present))
