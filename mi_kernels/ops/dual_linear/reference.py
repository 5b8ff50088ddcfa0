"""Gated linear units and low-rank interactions in plain PyTorch: the oracle, differentiated by PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations


def glu(
    x: Tensor,  # [..., X]
    weight: Tensor,  # [2H, X], or [H, X] beside weight_value
    bias: Tensor | None = None,  # [2H] or [H]
    *,
    weight_value: Tensor | None = None,  # [H, X]
    bias_value: Tensor | None = None,  # [H]
    activation: str = "silu",
    gate_first: bool = True,
) -> Tensor:
    """y = act(G x + a) * (V x + c)."""
    p = F.linear(x, weight, bias)
    if weight_value is not None:
        gate, value = p, F.linear(x, weight_value, bias_value)
    else:
        gate, value = p.chunk(2, -1) if gate_first else p.chunk(2, -1)[::-1]
    return activations.value(activation, gate) * value


def low_rank(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    factor_x: Tensor,  # [R, X] or [R, O, X]
    factor_z: Tensor,  # [R, Z] or [R, O, Z]
    factor_out: Tensor | None = None,  # [O, R], or any number of rows of O
    weight_z: Tensor | None = None,  # [O, Z]
    weight_x: Tensor | None = None,  # [O, X]
    bias: Tensor | None = None,  # [O]
    *,
    activation_x: str = "identity",
    activation_z: str = "identity",
) -> Tensor:
    """y = P (f(A x) * h(C z)) + U z + V x + c, where three-dimensional factors are summed over R."""
    if factor_x.dim() == 2:
        p, q = F.linear(x, factor_x), F.linear(z, factor_z)
    else:
        p = torch.einsum("...j,roj->...ro", x, factor_x)
        q = torch.einsum("...i,roi->...ro", z, factor_z)
    y = activations.value(activation_x, p) * activations.value(activation_z, q)
    y = y if factor_x.dim() == 2 else y.sum(-2)
    y = y if factor_out is None else F.linear(y, factor_out)
    y = y if weight_z is None else y + F.linear(z, weight_z)
    y = y if weight_x is None else y + F.linear(x, weight_x)
    return y if bias is None else y + bias
