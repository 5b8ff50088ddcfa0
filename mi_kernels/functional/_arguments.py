"""Shared by the public functions: autocast, broadcasting, normalisation of biases."""

from typing import Any

import torch
from torch import Tensor

from mi_kernels.ops.autocast import dtype_in_force, lower


def autocast(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments cast as autocast does for a matrix product."""
    device = next((tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)), None)
    if device is None or (dtype := dtype_in_force(device)) is None:
        return tensors
    return tuple(
        lower(tensor, autocast_dtype(tensor, device, dtype)) if isinstance(tensor, Tensor) else tensor
        for tensor in tensors
    )


def autocast_dtype(tensor: Tensor, device: str, dtype: torch.dtype | None) -> torch.dtype:
    # The rule of autocast's own lower-precision list: floating point on its device, but not float64.
    if dtype is None or tensor.device.type != device or not tensor.is_floating_point():
        return tensor.dtype
    return tensor.dtype if tensor.dtype == torch.float64 else dtype


def promote(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments cast as autocast does for an elementwise operation: to the widest of their dtypes."""
    present = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    if not present:
        return tensors
    device = present[0].device.type
    if dtype_in_force(device) is None:
        return tensors
    dtype = present[0].dtype
    for tensor in present:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.device.type == device else t
        for t in tensors
    )


def same_rank(tensor: Tensor, rank: int) -> Tensor:
    missing = rank - tensor.dim()
    return tensor if missing == 0 else tensor[(None,) * missing]


def expand_bias(bias: Any, *weights: Any) -> Any:
    """A scalar bias, or one of shape [1, O], as [O]; O is the first size of the first given weight.

    A bias that does not fit is returned unchanged for the checks to reject.
    """
    if bias is None:
        return bias
    out = None
    for weight in weights:
        if isinstance(weight, Tensor) and not weight.is_nested and weight.dim() > 0:
            out = weight.shape[0]
            break
    return expand_bias_to(out, bias)


def expand_bias_to(out: int | None, bias: Any) -> Any:
    """The same for O outputs; None if O is not known."""
    if not isinstance(bias, Tensor) or bias.is_nested:
        return bias
    shape = bias.shape
    if len(shape) == 1 and (out is None or shape[0] == out):  # fast path
        return bias
    last = shape[-1] if shape else 1
    fits = len(shape) < 2 or (len(shape) == 2 and shape[0] == 1)
    if not fits or bias.layout is not torch.strided or (out is not None and last not in (1, out)):
        return bias
    return bias.reshape(last).expand(last if out is None else out)
