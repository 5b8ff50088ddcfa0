"""Modulation of a few elements: PyTorch's own operations, whose derivatives are in C++.

A call of a kernel, and a rule in Python, cost more than two passes over a few thousand elements. Where `takes`
says so, `auto` runs the formula of reference.py, whose bits do not depend on the number of threads either.
"""

from typing import Any

import torch
from torch import Tensor

from mi_kernels.ops import activations
from mi_kernels.ops.checks import all_fit, broadcast, is_coefficient

# Elements up to which PyTorch's operations take less time, forward and backward (docs/performance.md). They run
# on one thread there: PyTorch shares out 32768 elements and more.
MAX_ELEMENTS = 1 << 14
ALGORITHM = "torch"
_DTYPES = (torch.float32, torch.float64)  # 16 bits round after each operation, where the kernel rounds once


def fits(x: Any, scale: Any, shift: Any, activation: Any, scale_offset: Any) -> bool:
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
        and all_fit(x.dtype, (x, scale, shift), (shape, of_scale, of_shift))
    )


def takes(x: Tensor, scale: Tensor, shift: Tensor | None) -> bool:
    """Whether PyTorch's operations are the plan of arguments that fit. A transform maps over more than they show."""
    return (
        0 < x.numel() <= MAX_ELEMENTS
        and x.dtype in _DTYPES
        and x.is_contiguous()  # the memory format of y
        and scale.is_contiguous()
        and (shift is None or shift.is_contiguous())
        and not torch._C._are_functorch_transforms_active()
    )
