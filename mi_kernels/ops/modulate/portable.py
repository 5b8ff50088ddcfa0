"""Modulation and its gradients in pure PyTorch, on any device."""

import torch
from torch import Tensor

from mi_kernels.ops import activations
from mi_kernels.ops.modulate import reference

Maybe = Tensor | None


def modulate(x: Tensor, scale: Tensor, shift: Maybe, activation: str, scale_offset: float) -> Tensor:
    """y of ``mi_kernels::modulate``; shapes as in schema.py."""
    y = reference.modulate(x, scale, shift, activation=activation, scale_offset=scale_offset)
    if y.is_contiguous() and x.is_contiguous():
        return y
    out = torch.empty_like(x)
    return y if y.stride() == out.stride() else out.copy_(y)


def modulate_grads(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift_size: list[int],
    activation: str,
    scale_offset: float,
    want_x: bool,
    want_scale: bool,
    want_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale and dshift of ``mi_kernels::modulate_grads``."""
    dx, dscale, dshift = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if want_x:
        dx = torch.empty_like(x)
        gate = activations.ELEMENTWISE[activation].value(scale)
        torch.mul(grad, gate + scale_offset if scale_offset != 0 else gate, out=dx)
    if want_scale:
        dscale = torch.empty_like(scale, memory_format=torch.contiguous_format)
        dscale.copy_(activations.tangent(activation, scale, (grad * x).sum_to_size(scale.shape)))
    if want_shift:
        dshift = grad.sum_to_size(shift_size).clone(memory_format=torch.contiguous_format)
    return dx, dscale, dshift
