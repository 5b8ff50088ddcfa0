"""The formulas of the adaptive-norm block, plainly, in any dtype."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modulate import reference as modulate

Maybe = Tensor | None


def normalize(x: Tensor, norm: str, weight: Maybe, bias: Maybe, groups: int | None, eps: float) -> Tensor:
    """norm(x) * weight + bias by PyTorch's own functions, which have statistics of 16 bits in float32."""
    if norm == "group":
        assert groups is not None
        return torch.group_norm(x, groups, weight, bias, eps)  # F.group_norm refuses sets of one element
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def norm_modulate(
    x: Tensor,
    scale: Maybe,
    shift: Maybe = None,
    *,
    norm: str = "layer",
    weight: Maybe = None,
    bias: Maybe = None,
    groups: int | None = None,
    eps: float = 1e-5,
    scale_offset: float = 1.0,
    activation: str = "identity",
) -> Tensor:
    """y = (norm(x) w + b) (act(scale) + s) + shift."""
    y = normalize(x, norm, weight, bias, groups, eps)
    if scale is None:
        return y if shift is None else y + shift
    return modulate.modulate(y, scale, shift, activation=activation, scale_offset=scale_offset)


def gated_residual(x: Tensor, h: Tensor, gate: Maybe = None) -> Tensor:
    """x + gate h."""
    return x + h if gate is None else torch.addcmul(x, gate, h)


def gated_residual_norm_modulate(
    x: Tensor, h: Tensor, gate: Maybe, scale: Maybe, shift: Maybe, **options: Any
) -> tuple[Tensor, Tensor]:
    """x_new = x + gate h, and y of x_new."""
    x_new = gated_residual(x, h, gate)
    return x_new, norm_modulate(x_new, scale, shift, **options)
