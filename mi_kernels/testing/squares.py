"""S^2 of the error rule (errors.py) for results with an activation in them.

S^2 is the variance of a result, in units of rounding, whose terms are each rounded by one unit. A sum of
products t has S^2 = sum t^2. The activation f of a sum p with S_p^2 rounds the terms of its own formula, and
passes on what p brings: f'(p)^2 S_p^2; its derivative likewise with f''. The functions here take float64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

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


def _value(name: str, p: Tensor, p2: Tensor) -> tuple[Tensor, Tensor]:
    """f(p) and its S^2."""
    if name == "softmax":
        return torch.softmax(p, -1), _softmax(p, p2)[0]
    return ELEMENTWISE[name][0](p), _activated(name, p, p2)[0]


class Product:
    """S^2 of f(p) h(q), and of its derivatives, with the S^2 of p and q."""

    def __init__(self, names: tuple[str, str], p: Tensor, p2: Tensor, q: Tensor, q2: Tensor) -> None:
        self.names, self.sums = names, (p, p2, q, q2)
        self.f, self.f2 = _value(names[0], p, p2)
        self.h, self.h2 = _value(names[1], q, q2)
        self.value2 = self.f2 * self.h**2 + self.f**2 * self.h2

    def slopes(self, grad: Tensor, grad2: Tensor) -> tuple[Tensor, Tensor]:
        """S^2 of the gradients by p and q."""
        p, p2, q, q2 = self.sums
        by_f = grad * self.h, grad2 * self.h**2 + grad**2 * self.h2
        by_h = grad * self.f, grad2 * self.f**2 + grad**2 * self.f2
        return gate_slope(self.names[0], p, p2, *by_f), gate_slope(self.names[1], q, q2, *by_h)


def _squares_of(tensors: Sequence[Maybe]) -> list[Maybe]:
    return [None if t is None else t.square() for t in tensors]


def _gradients(value: Callable[..., Tensor], tensors: Sequence[Maybe]) -> list[Tensor]:
    """Of a function of the tensors, by those that there are."""
    present = [t for t in tensors if t is not None]

    def of_present(*present: Tensor) -> Tensor:
        left = iter(present)
        return value(*(None if t is None else next(left) for t in tensors))

    # Of torch.func, so that torch.vmap can map it over draws.
    return list(torch.func.grad(of_present, tuple(range(len(present))))(*present))


def _glu_maps(gate_first: bool, x: Tensor, weight: Tensor, *others: Maybe) -> tuple[Tensor, Tensor]:
    """The gate before its activation, and the value."""
    bias, weight_value, bias_value = others
    p = linear(x, weight, bias)
    if weight_value is not None:
        return p, linear(x, weight_value, bias_value)
    gate, value = p.chunk(2, -1)
    return (gate, value) if gate_first else (value, gate)


def _glu(name: str, gate_first: bool, tensors: Sequence[Any]) -> Product:
    (p, q), (p2, q2) = (_glu_maps(gate_first, *each) for each in (tensors, _squares_of(tensors)))
    return Product((name, "identity"), p, p2, q, q2)


def glu(name: str, gate_first: bool, *tensors: Maybe) -> list[Tensor]:
    """S^2 of f(G x + a) (V x + c)."""
    return [_glu(name, gate_first, tensors).value2]


def glu_grads(name: str, gate_first: bool, grad: Tensor, *tensors: Maybe) -> list[Tensor]:
    """S^2 of its gradients by the tensors that there are."""
    dp2, dq2 = _glu(name, gate_first, tensors).slopes(grad, grad.square())

    def value(*squared: Any) -> Tensor:
        p2, q2 = _glu_maps(gate_first, *squared)
        return (p2 * dp2 + q2 * dq2).sum()

    return _gradients(value, _squares_of(tensors))


def _factor_maps(x: Tensor, z: Tensor, factor_x: Tensor, factor_z: Tensor) -> tuple[Tensor, Tensor]:
    """A x and C z [..., S, R]."""
    p, q = (linear(t, f.reshape(-1, f.shape[-1])) for t, f in ((x, factor_x), (z, factor_z)))
    terms = factor_x.shape[:-1] if factor_x.dim() == 3 else (1, factor_x.shape[0])
    return p.reshape(*p.shape[:-1], *terms), q.reshape(*q.shape[:-1], *terms)


def _low_rank(names: tuple[str, str], tensors: Sequence[Any]) -> Product:
    (p, q), (p2, q2) = (_factor_maps(*each[:4]) for each in (tensors, _squares_of(tensors)))
    return Product(names, p, p2, q, q2)


def _terms_of_low_rank(h: Tensor, x: Tensor, z: Tensor, *weights: Maybe) -> Tensor:
    """P h + U z + V x + c."""
    p, u, v, c = weights
    y = h if p is None else linear(h, p)
    y = y if u is None else y + linear(z, u)
    y = y if v is None else y + linear(x, v)
    return y if c is None else y + c


def low_rank(names: tuple[str, str], *tensors: Any) -> list[Tensor]:
    """S^2 of P sum_s f(A_s x) g(C_s z) + U z + V x + c."""
    squared = _squares_of(tensors)
    h2: Any = _low_rank(names, tensors).value2.sum(-2)
    return [_terms_of_low_rank(h2, *squared[:2], *squared[4:])]  # type: ignore[arg-type]


def low_rank_grads(names: tuple[str, str], grad: Tensor, *tensors: Any) -> list[Tensor]:
    """S^2 of its gradients by the tensors that there are."""
    product, factor_out = _low_rank(names, tensors), tensors[4]
    h2, grad2 = product.value2.sum(-2), grad.square()
    if factor_out is None:
        by_h, by_h2 = grad, grad2
    else:
        by_h, by_h2 = grad @ factor_out, grad2 @ factor_out.square()
    dp2, dq2 = product.slopes(by_h.unsqueeze(-2), by_h2.unsqueeze(-2))

    def value(*squared: Any) -> Tensor:
        p2, q2 = _factor_maps(*squared[:4])
        y2 = _terms_of_low_rank(h2, *squared[:2], *squared[4:])
        return (p2 * dp2).sum() + (q2 * dq2).sum() + (y2 * grad2).sum()

    return _gradients(value, _squares_of(tensors))
