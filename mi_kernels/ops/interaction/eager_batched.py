"""The commonest calls with weights of each sample, straight to the rules, as in eager.py.

Either each row has its own weights, or each of B contexts meets all of E inputs in one score. The general way
(batched.py) has the same plans; its layouts of leading dimensions took as long as half of such a product.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..checks import all_fit
from ..rules import Maybe, gradients_wanted
from . import autograd, cost_model, shared


def interaction(
    backend: str | None,
    x: Tensor,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> Maybe:
    """y of x [B, X], z [B, Z], W [B, O, Z, X], or of x [1, E, X], z [B, 1, Z], W [B, 1, 1, Z, X], or of x and
    z in each other's place; else None. ``backend``: that of `backends.eager_cpu`."""
    if backend is None or z is None or weight is None:
        return None
    try:
        lead = weight.shape[:-3]
        out, context, width = weight.shape[-3:]
    except (AttributeError, RuntimeError, ValueError):
        return None
    if len(lead) == 1 and lead[0] > 1:
        rows = lead[0]
        shapes = (
            (rows, width),
            (rows, context),
            weight.shape,
            (rows, out, context),
            (rows, out, width),
            (rows, out),
        )
        if not all_fit(x.dtype, (x, z, weight, weight_z, weight_x, bias), shapes):
            return None
        y = autograd.forward(backend, x.unsqueeze(1), z.unsqueeze(1), weight, weight_z, weight_x, bias)
        return y.squeeze(1)
    one_score = len(lead) == 2 and lead[0] > 1 and lead[1] == out == 1
    if one_score and weight_z is None and weight_x is None and bias is None:
        return _scores(backend, x, z, weight)
    return None


def _scores(backend: str, x: Tensor, z: Tensor, weight: Tensor) -> Maybe:
    """y [B, E, 1]: W' [B, X] is generated, and is then the rows of a product with all of x."""
    rows, _, _, context, width = weight.shape
    try:
        if z.shape[0] != rows:  # all z against each x
            x, z, weight, context, width = z, x, weight.mT, width, context
        inputs = x.shape[1]
    except (AttributeError, IndexError, RuntimeError):
        return None
    shapes = (1, inputs, width), (rows, 1, context), weight.shape
    if not all_fit(x.dtype, (x, z, weight), shapes):
        return None
    wanted = tuple(gradients_wanted((x, z, weight)))
    if not _generates(backend, (1, rows, inputs, context, width, 1), wanted, x.dtype):
        return None
    generated = shared.linear(backend, z, weight.flatten(0, 2).mT, None).squeeze(1)
    return shared.linear(backend, generated, x.squeeze(0), None).unsqueeze(-1)


@lru_cache(maxsize=256)
def _generates(backend: str, sizes: tuple[int, ...], wanted: tuple[bool, ...], dtype: torch.dtype) -> bool:
    """Whether the cheapest plan is to generate W'; with one score a call there is no other that shares."""
    how = cost_model.Sizes(*sizes), cost_model.Wanted(*wanted), dtype, backend, "cpu"
    cost = cost_model.shared(cost_model.PER_Z, *how)
    return cost is not None and cost_model.cheapest((cost_model.fused(*how), cost)) is cost
