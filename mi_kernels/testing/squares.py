"""S^2 of the error rule (errors.py) for results with an activation in them.

S^2 is the variance of a result, in units of rounding, whose terms are each rounded by one unit. A sum of
products t has S^2 = sum t^2. The activation f of a sum p with S_p^2 rounds the terms of its own formula, and
passes on what p brings: f'(p)^2 S_p^2; its derivative likewise with f''. The functions here take float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mi_kernels.ops.activations import ELEMENTWISE
from mi_kernels.ops.interaction.reference import interaction

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


def modulate(name: str, offset: float, x: Tensor, scale: Tensor, shift: Maybe) -> list[Tensor]:
    """S^2 of y."""
    y = gate_value(name, offset, x, scale, 0.0)
    return [y if shift is None else y + shift**2]


def modulate_grads(
    name: str, offset: float, grad: Tensor, x: Tensor, scale: Tensor, shift: Maybe
) -> list[Tensor]:
    """S^2 of dx, dscale and, where there is a shift, dshift."""
    dx = gate_value(name, offset, grad, scale, 0.0).sum_to_size(x.shape)
    h, h2 = (grad * x).sum_to_size(scale.shape), (grad * x).square().sum_to_size(scale.shape)
    result = [dx, gate_slope(name, scale, 0.0, h, h2)]
    return result if shift is None else [*result, grad.square().sum_to_size(shift.shape)]


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
