"""Modulation of tensors of several dtypes by PyTorch's own operations, where nothing is differentiated.

The kernels take one dtype, so x would be copied first. On a GPU addcmul casts in registers; on the CPU the
copy is y here, if it is large. Feature maps with one scale each go to the kernels, as addcmul has no
vectors for them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import broadcast, is_coefficient
from ..rules import differentiating
from . import reference, small

ALGORITHM = "torch, casting"
# Elements from which new pages for a copy cost more than the checks here (docs/performance.md).
MIN_ELEMENTS = 1 << 19


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    activation: str,
    scale_offset: float,
    scale_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """y of a call that `takes` accepts."""
    y = x.to(dtype) if x.is_cpu else torch.empty_like(x, dtype=dtype)
    x = y if x.is_cpu else x
    gate = reference.gate(scale.to(dtype), activation, scale_offset, scale_factor)
    if shift is None:
        return torch.mul(gate, x, out=y)
    return torch.addcmul(shift.to(dtype), gate, x, out=y)


def takes(
    tensors: Sequence[Tensor | None],
    activation: object,
    scale_offset: object,
    scale_factor: object,
    dtype: torch.dtype,
) -> bool:
    """Whether x is not of ``dtype``, to which all are cast, y has its shape, and addcmul is the fastest."""
    x, scale, _ = tensors
    assert x is not None and scale is not None
    if x.dtype == dtype or x.dim() == 0 or 2 * scale.numel() > x.numel() or differentiating(tensors):
        return False
    if x.is_cpu and (x.numel() < MIN_ELEMENTS or scale.shape[-1:] != x.shape[-1:] or not x.is_contiguous()):
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in small.PLAIN
            or tensor.device != x.device
            or broadcast(x.shape, tensor.shape) != x.shape
        ):
            return False
    return activation in small.NAMES and is_coefficient(scale_offset) and is_coefficient(scale_factor)
