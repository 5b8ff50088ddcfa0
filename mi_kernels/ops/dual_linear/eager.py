"""The commonest calls of two linear maps, straight to the rule: rows [B, X], and [B, Z] alike.

As ops/interaction/eager.py: None for a call of any other kind, and for one with anything wrong.
"""

from torch import Tensor

from mi_kernels.ops import activations
from mi_kernels.ops.checks import all_fit
from mi_kernels.ops.dual_linear import autograd
from mi_kernels.ops.rules import Maybe


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
    if backend is None or activation not in activations.ELEMENTWISE or type(gate_first) is not bool:
        return None
    try:
        rows, width = x.shape
        features = weight.shape[0]
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return None
    of_weight, of_bias = (features, width), (features,)
    shapes = (rows, width), of_weight, of_bias, of_weight, of_bias
    if not all_fit(x.dtype, (x, weight, bias, weight_value, bias_value), shapes):
        return None
    packed = weight_value is None
    if (features % 2 != 0 or bias_value is not None) if packed else not gate_first:
        return None
    names = (activation, "identity") if gate_first else ("identity", activation)
    return autograd.dual_linear(backend, *names, 1, x, None, weight, weight_value, bias, bias_value)


def low_rank(
    backend: str | None,
    activation_x: str,
    activation_z: str,
    x: Tensor,
    z: Tensor,
    factor_x: Tensor,
    factor_z: Tensor,
) -> Maybe:
    """f(A x) * h(C z) [B, R] of x [B, X] and z [B, Z], else None."""
    known = activations.ELEMENTWISE
    if backend is None or activation_x not in known or activation_z not in known:
        return None
    try:
        (rows, width), context, rank = x.shape, z.shape[1], factor_x.shape[0]
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return None
    shapes = (rows, width), (rows, context), (rank, width), (rank, context)
    if not all_fit(x.dtype, (x, z, factor_x, factor_z), shapes):
        return None
    return autograd.dual_linear(backend, activation_x, activation_z, 1, x, z, factor_x, factor_z, None, None)
