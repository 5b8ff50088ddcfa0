"""Modulation, mixtures and their gradients in pure PyTorch, on any device."""

import torch
from torch import Tensor

from .. import activations
from . import reference

Maybe = Tensor | None


def modulate(
    x: Tensor, scale: Tensor, shift: Maybe, activation: str, scale_offset: float, scale_factor: float = 1.0
) -> Tensor:
    """y of ``mi_kernels::modulate``; shapes as in schema.py."""
    factor = reference.gate(scale, activation, scale_offset, scale_factor)
    return _formatted(factor * x if shift is None else factor * x + shift, x)


def mix(a: Tensor, b: Tensor, gate: Tensor, activation: str) -> Tensor:
    """y of ``mi_kernels::mix``."""
    return _formatted(reference.mix(a, b, gate, activation=activation), a)


def _formatted(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format of x."""
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
    scale_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale and dshift of ``mi_kernels::modulate_grads``."""
    dx, dscale, dshift = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if want_x:
        dx = torch.empty_like(x)
        torch.mul(grad, reference.gate(scale, activation, scale_offset, scale_factor), out=dx)
    if want_scale:
        dscale = _scale_grad(activation, scale, grad * x, scale_factor)
    if want_shift:
        dshift = grad.sum_to_size(shift_size).clone(memory_format=torch.contiguous_format)
    return dx, dscale, dshift


def mix_grads(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor,
    activation: str,
    want_a: bool,
    want_b: bool,
    want_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """da, db and dgate of ``mi_kernels::mix_grads``."""
    da, db, dgate = a.new_empty(0), a.new_empty(0), a.new_empty(0)
    if want_gate:
        dgate = _scale_grad(activation, gate, (a - b).mul_(grad), 1.0)
    if want_a or want_b:
        part = torch.mul(grad, activations.ELEMENTWISE[activation].value(gate), out=torch.empty_like(a))
        db = torch.sub(grad, part, out=torch.empty_like(a)) if want_b else db
        da = part if want_a else da
    return da, db, dgate


def _scale_grad(activation: str, scale: Tensor, products: Tensor, factor: float) -> Tensor:
    total = products.sum_to_size(scale.shape)
    found = torch.empty_like(scale, memory_format=torch.contiguous_format)
    return found.copy_(activations.tangent(activation, scale, total if factor == 1 else total * factor))
