"""Modulation in plain PyTorch: the oracle of every test, what torch.compile fuses, and the plan of small calls."""

import torch
from torch import Tensor

from mi_kernels.ops import activations


def modulate(
    x: Tensor,  # [...]
    scale: Tensor,  # broadcasts with x
    shift: Tensor | None = None,  # broadcasts with x
    *,
    activation: str = "identity",
    scale_offset: float = 0.0,
) -> Tensor:
    """y = (act(scale) + s) * x + shift, one operation after the other."""
    gate = activations.value(activation, scale)
    if scale_offset != 0:
        gate = gate + scale_offset
    return gate * x if shift is None else torch.addcmul(shift, gate, x)
