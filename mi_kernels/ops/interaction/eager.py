"""The commonest calls, straight to the rules: rows [B, X] and [B, Z] with nothing to broadcast.

Checks that word an error, and layouts of leading dimensions, took several times as long as the kernel of a
small call. Each function here returns None for a call of any other kind, and for one with anything wrong: the
public function then goes its general way.
"""

from torch import Tensor

from mi_kernels.ops.checks import all_fit
from mi_kernels.ops.interaction import autograd, shared
from mi_kernels.ops.rules import Maybe, without_features


def interaction(
    backend: str | None,
    packed_weight: Maybe,
    x: Tensor,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> Maybe:
    """y [B, O] of x [B, X] and z [B, Z], else None. ``backend``: what `backends.eager_cpu` has found."""
    if backend is None or not fits(x, z, weight, weight_z, weight_x, bias):
        return None
    return autograd.forward(backend, x, z, weight, weight_z, weight_x, bias, packed_weight)


def fits(
    x: Tensor,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
    like: Maybe = None,
) -> bool:
    """Whether the arguments of an interaction are right, and x and z alike; y is as ``like [B, O]``."""
    tensors = x, z, weight, weight_z, weight_x, bias
    try:
        rows, width = x.shape
        context = z.shape[1]
        first = next(weight for weight in tensors[2:] if weight is not None)
        out = first.shape[0] if like is None else like.shape[1]
    except (AttributeError, IndexError, RuntimeError, StopIteration, ValueError):
        return False
    shapes = (rows, width), (rows, context), (out, context, width), (out, context), (out, width), (out,)
    return all_fit(x.dtype, tensors, shapes)


def generate(
    backend: str | None, z: Tensor, weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> tuple[Tensor, Maybe] | None:
    """W' [B, O, X] and b' [B, O] of z [B, Z], else None; only where both are results of products."""
    if backend is None or weight is None or (weight_z is None and bias is not None):
        return None
    try:
        rows, context = z.shape
        out, _, width = weight.shape
    except (AttributeError, RuntimeError, ValueError):
        return None
    shapes = (rows, context), (out, context, width), (out, context), (out, width), (out,)
    if not all_fit(z.dtype, (z, weight, weight_z, weight_x, bias), shapes):
        return None
    generated, offset = shared.generate(backend, z, weight, weight_z, weight_x, bias)
    assert generated is not None
    return generated, offset


def apply_generated(backend: str | None, x: Tensor, weight: Tensor, bias: Maybe) -> Maybe:
    """y of x [B, X] and W' [B, O, X], or of rows x [B, X] and one W' [O, X]; else None."""
    if backend is None:
        return None
    try:
        rows, width = x.shape
        *lead, out, _ = weight.shape
    except (AttributeError, RuntimeError, ValueError):
        return None
    if lead and lead != [rows]:
        return None
    if not all_fit(x.dtype, (x, weight, bias), ((rows, width), (*lead, out, width), (*lead, out))):
        return None
    if not lead:
        return autograd.forward(backend, x, without_features(x), None, None, weight, bias)
    return shared.linear(backend, x.unsqueeze(1), weight, bias).squeeze(1)
