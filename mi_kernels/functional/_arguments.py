"""Shared by the public functions: autocast, broadcasting, normalisation of biases."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.autocast import dtype_in_force, lower
from ..ops.checks import check_tensors
from ..ops.dtypes import FLOATING


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


def promoted_dtype(
    op: str, names: Sequence[str], tensors: Sequence[Tensor | None], required: int
) -> torch.dtype | None:
    """The dtype of an elementwise operation on floating-point tensors, or None if it is that of all of them.

    It is PyTorch's: the widest of the tensors that have dimensions, and under autocast of all.

    Raises:
        TypeError: dtypes differ, and one of the tensors is none or has no floating-point dtype.
    """
    first = getattr(tensors[0], "dtype", None)
    for tensor in tensors:
        if tensor is not None and getattr(tensor, "dtype", None) != first:
            break
    else:
        return None
    for index, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        plain = isinstance(tensor, Tensor) and tensor.dtype in FLOATING
        if not plain and (tensor is not None or index < required):
            check_tensors(op, (name,), (tensor,), 1, FLOATING)
    given = [tensor for tensor in tensors if tensor is not None]
    if dtype_in_force(given[0].device.type) is None:
        given = [tensor for tensor in given if tensor.dim() > 0] or given
    dtype = given[0].dtype
    for tensor in given:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


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
