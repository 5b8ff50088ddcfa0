"""The commonest calls, straight to the rules: rows [B, X] and [B, Z] with nothing to broadcast.

Checks and broadcasting took several times as long as the kernel of a small call. The registered operations check
every argument themselves, so each function here tries the call, and returns None where it is of another kind
or where the operation refuses it. The public function then goes its general way, whose checks word the error.
"""

from torch import Tensor

from mi_kernels.ops.interaction import autograd, shared
from mi_kernels.ops.rules import Maybe

REFUSED = (AttributeError, RuntimeError, TypeError, ValueError)


def interaction(
    backend: str | None,
    x: Tensor,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
    packed_weight: Maybe = None,
) -> Maybe:
    """y [B, O] of x [B, X] and z [B, Z], else None. ``backend``: as `backends.eager_cpu` found it."""
    if backend is None:
        return None
    try:
        if x.dim() != 2 or z.dim() != 2 or x.size(0) != z.size(0):
            return None
        return autograd.forward(backend, x, z, weight, weight_z, weight_x, bias, packed_weight)
    except REFUSED:
        return None


def generate(
    backend: str | None, z: Tensor, weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> tuple[Tensor, Maybe] | None:
    """W' [B, O, X] and b' [B, O] of z [B, Z], else None; only where both are results of products."""
    if backend is None or weight is None or (weight_z is None and bias is not None):
        return None
    try:
        if z.dim() != 2 or weight.dim() != 3:
            return None
        generated, offset = shared.generate(backend, z, weight, weight_z, weight_x, bias)
    except REFUSED:
        return None
    assert generated is not None
    return generated, offset


def apply_generated(backend: str | None, x: Tensor, weight: Tensor, bias: Maybe) -> Maybe:
    """y of x [B, X] and W' [B, O, X], or of rows x [B, X] and one W' [O, X]; else None."""
    if backend is None:
        return None
    try:
        if x.dim() != 2 or (bias is not None and bias.dim() != weight.dim() - 1):
            return None
        if weight.dim() == 2:
            return shared.linear(backend, x, weight, bias)
        if weight.dim() != 3 or weight.size(0) != x.size(0):
            return None
        return shared.linear(backend, x.unsqueeze(1), weight, bias).squeeze(1)
    except REFUSED:
        return None
