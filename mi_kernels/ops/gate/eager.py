"""The commonest calls of the gated forms, straight to the rules: rows [B, X] and [B, Z] alike.

As ops/interaction/eager.py: None for a call of any other kind, and for one with anything wrong.
"""

from torch import Tensor

from .. import activations
from ..checks import all_fit, is_coefficient
from ..interaction import eager as dense
from ..rules import Maybe
from . import autograd


def diagonal(
    backend: str | None,
    activation: str,
    scale_offset: float,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Maybe,
    shift_weight: Maybe,
    shift_bias: Maybe,
    weight_x: Maybe,
) -> Maybe:
    """y [B, X] of x [B, X] and z [B, Z], else None. ``backend``: what `backends.eager_cpu` has found."""
    if backend is None or weight is None or activation not in activations.NAMES:
        return None
    try:
        rows, width = x.shape
        context = z.shape[1]
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return None
    by_z, by_x = (width, context), (width,)
    shapes = (rows, width), (rows, context), by_z, by_x, by_z, by_x, (width, width)
    tensors = x, z, weight, bias, shift_weight, shift_bias, weight_x
    if not is_coefficient(scale_offset) or not all_fit(x.dtype, tensors, shapes):
        return None
    weights = None, weight, weight_x, bias, shift_weight, shift_bias
    return autograd.gate(backend, activation, float(scale_offset), x, z, *weights)


def gated_interaction(
    backend: str | None,
    activation: str,
    x: Tensor,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> Maybe:
    """y [B, X] of x [B, X] and z [B, Z], else None."""
    if backend is None or activation not in activations.NAMES:
        return None
    if not dense.fits(x, z, weight, weight_z, weight_x, bias, x):
        return None
    return autograd.gate(backend, activation, 0.0, x, z, weight, weight_z, weight_x, bias, None, None)
