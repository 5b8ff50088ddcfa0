"""Modulation and mixtures of a few elements by PyTorch's own operations, whose derivatives are in C++.

A call of a kernel, and a rule in Python, cost more than two passes over a few thousand elements. Where
`takes` says so, `auto` runs the formula of reference.py instead. Its bits do not depend on the number of
threads either: PyTorch shares out 32768 elements and more.
"""

from typing import Any

import torch
from torch import Tensor

from .. import activations
from ..checks import all_fit, broadcast, is_coefficient
from ..rules import gradients_wanted
from . import reference

# Elements up to which PyTorch's operations take less time, forward and backward (docs/performance.md).
MAX_ELEMENTS = 1 << 14
ALGORITHM = "torch"
_DTYPES = (torch.float32, torch.float64)  # 16 bits are rounded after each operation, the kernel rounds once
# PyTorch has no second derivative of hardsigmoid, may have none of hardswish, and NaN for gelu of infinity.
NAMES = tuple(name for name in activations.NAMES if not name.startswith(("hard", "gelu")))
PLAIN = (Tensor, torch.nn.Parameter)  # DTensor has rules for the operations of this package


def modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None, activation: str, scale_offset: float, scale_factor: float
) -> Tensor:
    """y of a call that `takes` accepts."""
    factor = reference.gate(scale, activation, scale_offset, scale_factor)
    if shift is None:
        return factor * x
    if any(gradients_wanted((x, scale, shift))):  # the derivative of addcmul is slower
        return factor * x + shift
    return torch.addcmul(shift, factor, x)


def mix(a: Tensor, b: Tensor, gate: Tensor, activation: str) -> Tensor:
    """y of a call that `takes` accepts, with a, gate and b in the places of x, scale and shift."""
    if any(gradients_wanted((a, b, gate))):
        return reference.mix(a, b, gate, activation=activation)
    return torch.addcmul(b, activations.value(activation, gate), a - b)  # lerp makes NaN of Inf


def fits(x: Any, scale: Any, shift: Any, activation: Any, scale_offset: Any, scale_factor: Any = 1.0) -> bool:
    """Whether the arguments are right, and y has the shape of x."""
    try:
        shape, of_scale = x.shape, scale.shape
        of_shift = shape if shift is None else shift.shape
    except (AttributeError, RuntimeError):
        return False
    return (
        len(shape) > 0
        and (of_scale == shape or broadcast(shape, of_scale) == shape)
        and (of_shift == shape or broadcast(shape, of_shift) == shape)
        and activation in activations.NAMES
        and is_coefficient(scale_offset)
        and is_coefficient(scale_factor)
        and all_fit(x.dtype, (x, scale, shift), (shape, of_scale, of_shift))
    )


def takes(
    x: Any, scale: Any, shift: Any, activation: Any, scale_offset: Any, scale_factor: Any = 1.0
) -> bool:
    """Whether the arguments are right and PyTorch's operations their plan. Each query is 5 % of a call."""
    try:
        shape, dtype = x.shape, x.dtype
        if dtype not in _DTYPES or not 0 < x.numel() <= MAX_ELEMENTS or not _alike(x, dtype):
            return False
        if not _alike(scale, dtype) or (scale.shape != shape and broadcast(shape, scale.shape) != shape):
            return False
        if shift is not None:
            if not _alike(shift, dtype) or (shift.shape != shape and broadcast(shape, shift.shape) != shape):
                return False
    except (AttributeError, RuntimeError):  # no tensor, or a nested one
        return False
    # A transform maps over more elements than are seen here.
    return (
        activation in NAMES
        and is_coefficient(scale_offset)
        and is_coefficient(scale_factor)
        and len(shape) > 0
        and not torch._C._are_functorch_transforms_active()
    )


def _alike(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Of this dtype, dense, on the CPU, contiguous: then y has the memory format of x."""
    return (
        type(tensor) in PLAIN
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
    )
