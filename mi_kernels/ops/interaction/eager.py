"""The commonest calls, straight to the rules: rows [B, X] and [B, Z] with nothing to broadcast.

Checks that word an error, and layouts of leading dimensions, took several times as long as the kernel of a
small call. Each function here returns None for a call of any other kind, and for one with anything wrong: the
public function then goes its general way.
"""

import torch
from torch import Tensor

from ..checks import all_fit
from ..rules import Maybe, is_watched, transformed
from . import linear, plain, shared


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
    """y [(B,) O] of x [(B,) X] and z [(B,) Z], else None. ``backend``: that of `backends.eager_cpu`."""
    if backend is None:
        return None
    weights = weight, weight_z, weight_x, bias
    if fits(x, z, *weights):
        return plain.forward(backend, x, z, *weights, packed_weight)
    if not (is_vector(x) and is_vector(z)):
        return None
    x, z = x.unsqueeze(0), z.unsqueeze(0)
    if not fits(x, z, *weights):
        return None
    return plain.forward(backend, x, z, *weights, packed_weight).squeeze(0)


def is_vector(tensor: object) -> bool:
    """Whether it is a dense tensor of one dimension."""
    return isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.dim() == 1


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
    """W' [(B,) O, X] and b' [(B,) O] of z [(B,) Z], else None; only where both are results of products."""
    if backend is None or weight is None or (weight_z is None and bias is not None):
        return None
    try:
        *rows, context = z.shape
        out, _, width = weight.shape
    except (AttributeError, RuntimeError, ValueError):
        return None
    shapes = (*rows, context), (out, context, width), (out, context), (out, width), (out,)
    tensors = z, weight, weight_z, weight_x, bias
    if len(rows) > 1 or not all_fit(z.dtype, tensors, shapes):
        return None
    alone = not transformed() and not is_watched()  # it changes what it returns in place
    if alone and weight.is_contiguous() and linear.is_plain(*tensors):
        return linear.generate(backend, *tensors)
    if not rows:
        return None
    generated, offset = shared.generate(backend, z, weight, weight_z, weight_x, bias)
    assert generated is not None
    return generated, offset


def apply_generated(backend: str | None, x: Tensor, weight: Tensor, bias: Maybe) -> Maybe:
    """y of x [B, X] and W' [B, O, X], x [B, T, X] and W' [B, 1, O, X], x [(B,) X] and one W'; else None."""
    if backend is None:
        return None
    try:
        *lead, width = x.shape
        *contexts, out, _ = weight.shape
    except (AttributeError, RuntimeError, ValueError):
        return None
    shapes = (*lead, width), (*contexts, out, width), (*contexts, out)
    if len(lead) > 2 or not all_fit(x.dtype, (x, weight, bias), shapes):
        return None
    if len(lead) == 2 and contexts == [lead[0], 1] and lead[0] > 1:
        return shared.linear(backend, x, weight.squeeze(1), None if bias is None else bias.squeeze(1))
    if len(lead) == 2 or contexts not in ([], lead):
        return None
    if transformed() or not linear.is_plain(x, weight, bias):
        return shared.linear(backend, x, weight, bias) if lead and not contexts else None
    return linear.apply_generated(x, weight, bias)
