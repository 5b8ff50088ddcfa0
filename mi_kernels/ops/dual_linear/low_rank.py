"""Interactions with a factorised weight, of the primitives of two linear maps and of the dense interaction.

h = sum_s f(A_s x) * g(C_s z)           dual_linear, or modulation where x or z is shared by several rows
y = P h + U z + V x + c                 two terms of one product, and a product more for a third one
"""

import math

import torch
from torch import Tensor

from ..interaction import autograd as dense
from ..interaction.linear import is_direct
from ..interaction.shared import flatten_rows, linear
from ..rules import Maybe, add
from . import autograd as rules


def low_rank(
    backend: str,
    activation_x: str,
    activation_z: str,
    lead: torch.Size,
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    factor_x: Tensor,  # [(S,) R, X]
    factor_z: Tensor,  # [(S,) R, Z]
    factor_out: Maybe,  # [O, R]
    weight_z: Maybe,  # [O, Z]
    weight_x: Maybe,  # [O, X]
    bias: Maybe,  # [O]
) -> Tensor:
    """y [..., O] of checked arguments, differentiable."""
    if factor_x.dim() == 3:
        ranks, factor_x, factor_z = factor_x.shape[0], factor_x.flatten(0, 1), factor_z.flatten(0, 1)
    else:
        ranks = 1
    rule = backend, activation_x, activation_z, ranks
    if is_shared(x, z, lead):
        y = _shared(rule, x, z, factor_x, factor_z)
        y = y if factor_out is None else _linear(backend, y, factor_out, None)
        for tensor, weight in ((z, weight_z), (x, weight_x)):
            if weight is not None:  # once for each row of its own
                y = y + _linear(backend, tensor, weight, None)
        return y if bias is None else y + bias
    x, z = flatten_rows(x, lead), flatten_rows(z, lead)
    y = rows(*rule, x, z, factor_x, factor_z, factor_out, weight_z, weight_x, bias)
    return y if len(lead) == 1 else y.view(*lead, y.shape[-1])


def rows(
    backend: str,
    activation_x: str,
    activation_z: str,
    ranks: int,
    x: Tensor,  # [B, X]
    z: Tensor,  # [B, Z]
    factor_x: Tensor,  # [N, X]
    factor_z: Tensor,  # [N, Z]
    factor_out: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> Tensor:
    """y [B, O] with a context for each row."""
    tensors = x, z, factor_x, factor_z, factor_out, weight_z, weight_x, bias
    if factor_out is not None and is_direct(backend, *tensors) and not torch.jit.is_tracing():
        # h may be larger than all that there is: then a part of the rows at a time.
        largest = max(x.shape[0] * factor_out.shape[0], *(t.numel() for t in tensors if t is not None))
        step = max(largest // max(factor_out.shape[1], 1), 256)
        if step < x.shape[0]:
            y = x.new_empty(x.shape[0], factor_out.shape[0])
            for start in range(0, x.shape[0], step):
                b = slice(start, start + step)
                y[b] = _rows(backend, activation_x, activation_z, ranks, x[b], z[b], *tensors[2:])  # type: ignore[arg-type]
            return y
    return _rows(backend, activation_x, activation_z, ranks, *tensors)


def _rows(
    backend: str,
    activation_x: str,
    activation_z: str,
    ranks: int,
    x: Tensor,
    z: Tensor,
    factor_x: Tensor,
    factor_z: Tensor,
    factor_out: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> Tensor:
    h = rules.dual_linear(backend, activation_x, activation_z, ranks, x, z, factor_x, factor_z, None, None)
    if factor_out is None:
        if weight_z is None and weight_x is None:
            return h if bias is None else h + bias
        return h + dense.forward(backend, x, z, None, weight_z, weight_x, bias)
    if weight_x is None:  # P h and U z
        return dense.forward(backend, h, z, None, weight_z, factor_out, bias)
    y = dense.forward(backend, h, x, None, weight_x, factor_out, bias)
    return y if weight_z is None else add(y, linear(backend, z, weight_z, None))  # type: ignore[return-value]


def is_shared(x: Tensor, z: Tensor, lead: torch.Size) -> bool:
    """Whether a row of x or of z belongs to several rows of y."""
    return x.shape[:-1] != lead or z.shape[:-1] != lead


def _linear(backend: str, x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """V x + c of x [..., X]."""
    lead = x.shape[:-1]
    y = linear(backend, x.reshape(math.prod(lead), x.shape[-1]), weight, bias)
    return y if len(lead) == 1 else y.view(*lead, y.shape[-1])


def _shared(
    rule: tuple[str, str, str, int], x: Tensor, z: Tensor, factor_x: Tensor, factor_z: Tensor
) -> Tensor:
    """h [..., R] of operands whose leading dimensions broadcast: each product once for each of its rows."""
    p, q = _linear(rule[0], x, factor_x, None), _linear(rule[0], z, factor_z, None)
    rank = max(p.dim(), q.dim())
    p, q = (t if t.dim() == rank else t[(None,) * (rank - t.dim())] for t in (p, q))
    return rules.multiply(*rule, p, q)
