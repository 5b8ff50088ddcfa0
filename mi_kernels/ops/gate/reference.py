"""The gated forms in plain PyTorch: the oracle of every test, differentiated by PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from .. import activations
from ..interaction.reference import interaction
from ..modulate.reference import modulate


def diagonal(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    weight: Tensor,  # [X, Z]
    bias: Tensor | None = None,  # [X]
    shift_weight: Tensor | None = None,  # [X, Z]
    shift_bias: Tensor | None = None,  # [X]
    *,
    weight_x: Tensor | None = None,  # [X, X]
    activation: str = "identity",
    scale_offset: float = 0.0,
) -> Tensor:
    """y = (act(z A^T + x G^T + a) + s) * x + (z C^T + c), term by term."""
    gate = F.linear(z, weight, bias)
    if weight_x is not None:
        gate = gate + F.linear(x, weight_x)
    shift = shift_bias
    if shift_weight is not None:
        shift = F.linear(z, shift_weight, shift_bias)
    return modulate(x, gate, shift, activation=activation, scale_offset=scale_offset)


def gated_interaction(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    weight: Tensor | None,  # [X, Z, X]
    weight_z: Tensor | None = None,  # [X, Z]
    weight_x: Tensor | None = None,  # [X, X]
    bias: Tensor | None = None,  # [X]
    *,
    activation: str = "sigmoid",
) -> Tensor:
    """y = act(z^T W x + U z + V x + c) * x."""
    return activations.value(activation, interaction(x, z, weight, weight_z, weight_x, bias)) * x
