"""Adaptive norms of other packages: which norms may be read instead of called, and the call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import norms
from ...functional._call import call
from ...ops.autocast import dtype_in_force
from ...ops.checks import broadcast
from ...ops.dtypes import FLOATING
from ._gated import is_called_only, why_not_tensors

# By exact class; a package adds its own.
NORMS: dict[type[nn.Module], str] = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}


def why_not_norm(norm: Any) -> str | None:
    """Why a norm may not be read instead of calling it; None if it may."""
    if type(norm) not in NORMS:
        return f"a {type(norm).__name__} is where a layer norm or RMS norm was expected"
    if not is_called_only(norm):
        return "a norm of it has hooks or another forward"
    if len(getattr(norm, "normalized_shape", (1,))) != 1:
        return "a norm of it is one over several dimensions"
    if norm.eps is None:
        return "a norm of it has no eps"
    return why_not_tensors(norm.weight, getattr(norm, "bias", None))


def options_of(norm: Any) -> dict[str, Any] | None:
    """The arguments of mi.norm_modulate that a norm stands for; None where it has to be called."""
    if why_not_norm(norm) is not None:
        return None
    bias = getattr(norm, "bias", None)
    return {"norm": NORMS[type(norm)], "weight": norm.weight, "bias": bias, "eps": norm.eps}


def fits(options: dict[str, Any] | None, x: Any, *contexts: Any) -> bool:
    """Whether one call gives what the steps give: the dtype, device and shape of x."""
    if options is None or not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
        return False
    if x.dtype not in FLOATING or dtype_in_force(x.device.type) is not None:
        return False
    given = (options.get("weight"), options.get("bias"), *contexts)
    tensors = [tensor for tensor in given if tensor is not None]
    if any(not isinstance(t, Tensor) or t.dtype != x.dtype or t.device != x.device for t in tensors):
        return False
    shaped = (tensor for tensor in contexts if tensor is not None)
    return all(broadcast(x.shape, tensor.shape) == x.shape for tensor in shaped)


def modulated(
    x: Any,
    norm: Callable[[Any], Any],
    scale: Any,
    shift: Any = None,
    *,
    options: dict[str, Any] | None = None,
) -> Any:
    """norm(x) (1 + scale) + shift in one call, or step by step where its parts have changed or dtypes differ.

    Args:
        options: what the norm stands for, where it is no module.
    """
    options = options_of(norm) if options is None else options
    if options is not None and fits(options, x, scale, shift):
        return call(norms.norm_modulate, x, scale, shift, **options)
    y = norm(x) * (1 + scale)
    return y if shift is None else y + shift
