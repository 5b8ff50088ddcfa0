"""Activations of gates: f, f' and f'' in differentiable PyTorch code.

f is PyTorch's own function, so that extreme values agree with PyTorch. At the kinks of relu and hardsigmoid,
and at NaN, f' is that of PyTorch's backward formulas. The compiled kernels implement f and f' by the same
formulas (``csrc/common/activation_math.h``); f'' exists only here.

Derivatives of 16-bit arguments are computed in float32, as in PyTorch's own kernels: t^2 and t^3 overflow
float16 while f' and f'' are still far from their limits.

softmax is not elementwise; it normalises over the last dimension and its derivative is a matrix.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import accumulation_dtype

ElementwiseName = Literal[
    "identity",
    "sigmoid",
    "tanh",
    "relu",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "mish",
    "softplus",
    "hardsigmoid",
    "hardswish",
]
ActivationName = ElementwiseName | Literal["softmax"]

_ROOT_HALF = math.sqrt(0.5)
_DENSITY = 1 / math.sqrt(2 * math.pi)
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
_QUICK = 1.702
_SOFTPLUS_LIMIT = 20  # PyTorch's, beyond which softplus is the identity


class Activation(NamedTuple):
    """An elementwise function with its first two derivatives."""

    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


def _sigmoid_first(t: Tensor) -> Tensor:
    s = torch.sigmoid(t)
    return (1 - s) * s


def _sigmoid_second(t: Tensor) -> Tensor:
    s = torch.sigmoid(t)
    return (1 - s) * s * (1 - 2 * s)


def _tanh_first(t: Tensor) -> Tensor:
    return 1 - torch.tanh(t).square()


def _tanh_second(t: Tensor) -> Tensor:
    h = torch.tanh(t)
    return -2 * h * (1 - h.square())


def _relu_first(t: Tensor) -> Tensor:
    return torch.where(t <= 0, torch.zeros_like(t), torch.ones_like(t))


def _density(t: Tensor) -> Tensor:
    return _DENSITY * torch.exp(-0.5 * t.square())


def _gelu_first(t: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(t * _ROOT_HALF)) + t * _density(t)


def _gelu_second(t: Tensor) -> Tensor:
    return _density(t) * (2 - t.square())


def _gelu_tanh_parts(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tanh u, its derivative and u'."""
    u = _TANH_SCALE * (t + _TANH_CUBE * t * t * t)
    # 1 - tanh^2 u would lose the digits that the second derivative multiplies by up to t u'^2.
    tanh_slope = 4 * torch.sigmoid(2 * u) * torch.sigmoid(-2 * u)
    return torch.tanh(u), tanh_slope, _TANH_SCALE * (1 + 3 * _TANH_CUBE * t.square())


def _gelu_tanh_first(t: Tensor) -> Tensor:
    h, tanh_slope, slope = _gelu_tanh_parts(t)
    return 0.5 * (1 + h) + 0.5 * t * tanh_slope * slope


def _gelu_tanh_second(t: Tensor) -> Tensor:
    h, tanh_slope, slope = _gelu_tanh_parts(t)
    curvature = 6 * _TANH_SCALE * _TANH_CUBE * t
    return tanh_slope * (slope + 0.5 * t * (curvature - 2 * h * slope.square()))


def _silu_first(t: Tensor) -> Tensor:
    s = torch.sigmoid(t)
    return s * (1 + t * (1 - s))


def _silu_second(t: Tensor) -> Tensor:
    s = torch.sigmoid(t)
    return s * (1 - s) * (2 + t * (1 - 2 * s))


def _quick_gelu(t: Tensor) -> Tensor:
    return t * torch.sigmoid(_QUICK * t)


def _quick_gelu_first(t: Tensor) -> Tensor:
    s = torch.sigmoid(_QUICK * t)
    return s + _QUICK * s * (t * (1 - s))  # 1.702 t may leave the range


def _quick_gelu_second(t: Tensor) -> Tensor:
    s = torch.sigmoid(_QUICK * t)
    return _QUICK * (s * (1 - s) * (2 + _QUICK * t * (1 - 2 * s)))


def _mish_parts(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h = tanh(softplus(t)), its derivative and the sigmoid."""
    s = torch.sigmoid(t)
    # Of n = (e^softplus)^2 - 1 = e^t (e^t + 2): 1 - h^2 would lose digits.
    e = torch.exp(t.clamp(max=_SOFTPLUS_LIMIT))
    n = e * (e + 2)
    h = n / (n + 2)
    rest = torch.where(t > _SOFTPLUS_LIMIT, torch.zeros_like(t), 2 / (n + 2))
    return h, rest * (1 + h) * s, s


def _mish_first(t: Tensor) -> Tensor:
    h, slope, _ = _mish_parts(t)
    return h + t * slope


def _mish_second(t: Tensor) -> Tensor:
    h, slope, s = _mish_parts(t)
    return slope * (2 + t * (1 - s - 2 * h * s))


def _softplus_first(t: Tensor) -> Tensor:
    return torch.where(t > _SOFTPLUS_LIMIT, torch.ones_like(t), torch.sigmoid(t))


def _softplus_second(t: Tensor) -> Tensor:
    return torch.where(t > _SOFTPLUS_LIMIT, torch.zeros_like(t), _sigmoid_first(t))


def _hardswish_first(t: Tensor) -> Tensor:
    inside = torch.where(t <= -3, torch.zeros_like(t), t / 3 + 0.5)
    return torch.where(t >= 3, torch.ones_like(t), inside)


def _hardswish_second(t: Tensor) -> Tensor:
    return torch.where((t > -3) & (t < 3), torch.full_like(t, 1 / 3), torch.zeros_like(t))


def _hardsigmoid(t: Tensor) -> Tensor:
    # PyTorch's own derivative in float64 uses 1/6 rounded to float32, an error of 5e-9.
    return F.hardtanh(t, -3, 3) / 6 + 0.5 if t.dtype == torch.float64 else F.hardsigmoid(t)


def _hardsigmoid_first(t: Tensor) -> Tensor:
    return torch.where((t > -3) & (t < 3), torch.full_like(t, 1 / 6), torch.zeros_like(t))


ELEMENTWISE = {
    "identity": Activation(lambda t: t, torch.ones_like, torch.zeros_like),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_first, _sigmoid_second),
    "tanh": Activation(torch.tanh, _tanh_first, _tanh_second),
    "relu": Activation(torch.relu, _relu_first, torch.zeros_like),
    "gelu": Activation(F.gelu, _gelu_first, _gelu_second),
    "gelu_tanh": Activation(lambda t: F.gelu(t, approximate="tanh"), _gelu_tanh_first, _gelu_tanh_second),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_first, _quick_gelu_second),
    "silu": Activation(F.silu, _silu_first, _silu_second),
    "mish": Activation(F.mish, _mish_first, _mish_second),
    "softplus": Activation(F.softplus, _softplus_first, _softplus_second),
    "hardsigmoid": Activation(_hardsigmoid, _hardsigmoid_first, torch.zeros_like),
    "hardswish": Activation(F.hardswish, _hardswish_first, _hardswish_second),
}
NAMES: tuple[ActivationName, ...] = (*get_args(ElementwiseName), "softmax")
# Where f' = 0 the gradient is 0 even for Inf: PyTorch selects, it does not multiply by 0.
MASKED = ("relu", "hardsigmoid", "hardswish")


def value(name: str, t: Tensor) -> Tensor:
    """act(t); softmax over the last dimension."""
    return torch.softmax(t, -1) if name == "softmax" else ELEMENTWISE[name].value(t)


def tangent(name: str, t: Tensor, direction: Tensor) -> Tensor:
    """The derivative of act at t along a direction."""
    if name == "identity":
        return direction
    wide = t.to(accumulation_dtype(t.dtype))
    if name == "softmax":
        return through_softmax(torch.softmax(wide, -1), direction)
    slope = ELEMENTWISE[name].first(wide)
    product = slope * direction
    if name in MASKED:
        product = torch.where(slope == 0, torch.zeros_like(product), product)
    return product.to(t.dtype)


def through_softmax(p: Tensor, direction: Tensor) -> Tensor:
    """The Jacobian of softmax (symmetric) times a direction; p = softmax(t) in the accumulation dtype."""
    wide = direction.to(p.dtype)
    return (p * (wide - (p * wide).sum(-1, keepdim=True))).to(direction.dtype)


def curvature(name: str, t: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The second derivative of an elementwise act at t along two directions."""
    return (ELEMENTWISE[name].second(t.to(accumulation_dtype(t.dtype))) * one * other).to(t.dtype)
