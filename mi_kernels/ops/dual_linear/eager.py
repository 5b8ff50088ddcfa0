"""The commonest calls of glu and low_rank, straight to the rules: rows [B, X] and [B, Z] alike.

As ops/interaction/eager.py: None for a call of any other kind, and for one with anything wrong.
"""

from torch import Tensor

from ..activations import ELEMENTWISE
from ..checks import all_fit
from ..rules import Maybe
from . import autograd
from . import low_rank as forms


def glu(
    backend: str | None,
    activation: str,
    gate_first: bool,
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    weight_value: Maybe,
    bias_value: Maybe,
) -> Maybe:
    """y [B, H] of x [B, X], else None. ``backend``: what `backends.eager_cpu` has found."""
    if backend is None or type(gate_first) is not bool or not _is_elementwise(activation):
        return None
    try:
        rows, width = x.shape
        features = weight.shape[0]
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return None
    if (bias_value is not None or features % 2) if weight_value is None else not gate_first:
        return None
    matrix, vector = (features, width), (features,)
    if not all_fit(
        x.dtype, (x, weight, bias, weight_value, bias_value), ((rows, width), matrix, vector, matrix, vector)
    ):
        return None
    return autograd.glu(backend, activation, gate_first, x, weight, bias, weight_value, bias_value)


def low_rank(
    backend: str | None,
    activation_x: str,
    activation_z: str,
    x: Tensor,
    z: Tensor,
    factor_x: Tensor,
    factor_z: Tensor,
    factor_out: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> Maybe:
    """y [B, O] of x [B, X] and z [B, Z], for one term, else None."""
    if backend is None or not (_is_elementwise(activation_x) and _is_elementwise(activation_z)):
        return None
    try:
        rows, width = x.shape
        context = z.shape[1]
        out = rank = factor_x.shape[0]
        if factor_out is not None:
            out = factor_out.shape[0]
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return None
    shapes = (rows, width), (rows, context), (rank, width), (rank, context), (out, rank), (out, context)
    tensors = x, z, factor_x, factor_z, factor_out, weight_z, weight_x, bias
    if factor_z is None or not all_fit(x.dtype, tensors, (*shapes, (out, width), (out,))):
        return None
    return forms.rows(backend, activation_x, activation_z, 1, *tensors)


def _is_elementwise(activation: object) -> bool:
    return type(activation) is str and activation in ELEMENTWISE
