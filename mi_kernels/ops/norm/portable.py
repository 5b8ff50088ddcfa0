"""Normalisation with modulation and its gradients in pure PyTorch, on any device, in chunks of positions."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import activations
from ..dtypes import accumulation_dtype
from .layout import by_sets, per_set, result_like

Maybe = Tensor | None
_CHUNK = 1 << 20  # elements in accumulation dtype at a time


def norm_modulate(
    x: Tensor,
    h: Maybe,
    gate: Maybe,
    scale: Maybe,
    shift: Maybe,
    weight: Maybe,
    bias: Maybe,
    dim: int,
    groups: int,
    center: bool,
    eps: float,
    activation: str,
    scale_offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x_new, mean and rstd of ``mi_kernels::norm_modulate``; shapes as in schema.py."""
    wide = accumulation_dtype(x.dtype)
    size = (*x.shape[:dim], groups)
    y, x_new = result_like(x, dim), result_like(x, dim) if h is not None else x.new_empty(0)
    mean = x.new_empty(size if center else (0,), dtype=wide)
    rstd = x.new_empty(size, dtype=wide)
    for at in _chunks(x, dim):
        part = at(x)
        if h is not None:
            part = torch.add(part, at(h)) if gate is None else torch.addcmul(part, at(gate), at(h))
            at(x_new).copy_(part)
        sets = by_sets(_widened(part, wide), dim, groups)
        axes = tuple(range(dim + 1, sets.dim()))
        if center:
            at(mean).copy_(sets.mean(axes))
            sets = sets - per_set(at(mean), dim, sets.dim())
        at(rstd).copy_(sets.square().mean(axes).add_(eps).rsqrt_())
        value = (sets * per_set(at(rstd), dim, sets.dim())).view(part.shape)
        value = _affine(value, weight, bias)
        if scale is not None:
            value = value * _factor(at(scale), wide, activation, scale_offset)
        at(y).copy_(value if shift is None else value + at(shift))
    return y, x_new, mean, rstd


def norm_modulate_grads(
    grad: Tensor,
    x: Tensor,
    grad_x: Maybe,
    h: Maybe,
    gate: Maybe,
    scale: Maybe,
    shift: Maybe,
    weight: Maybe,
    bias: Maybe,
    mean: Maybe,
    rstd: Tensor,
    dim: int,
    groups: int,
    center: bool,
    activation: str,
    scale_offset: float,
    *want: bool,
) -> tuple[Tensor, ...]:
    """The gradients of ``mi_kernels::norm_modulate_grads``."""
    want_x, want_h, want_gate, want_scale, want_shift, want_weight, want_bias = want
    wide = accumulation_dtype(x.dtype)
    dx = result_like(x, dim) if want_x else x.new_empty(0)
    dh = result_like(x, dim) if want_h else x.new_empty(0)
    tensors = gate, scale, shift, weight, bias
    sums = [
        t.new_zeros(t.shape, dtype=wide) if wanted and t is not None else None
        for t, wanted in zip(tensors, want[2:], strict=True)
    ]
    dgate, dscale, dshift, dweight, dbias = sums
    for at in _chunks(x, dim):

        def collect(total: Maybe, value: Tensor, at: Any = at) -> None:
            if total is not None:
                part = at(total)
                part += value.sum_to_size(part.shape)

        g = _widened(at(grad), wide)
        sets = by_sets(_widened(at(x), wide), dim, groups)
        axes, rank = tuple(range(dim + 1, sets.dim())), sets.dim()
        r = per_set(at(rstd), dim, rank)
        n = (sets - per_set(at(mean), dim, rank) if center and mean is not None else sets) * r
        normed = n.view(g.shape)
        collect(dshift, g)
        if dscale is not None:
            collect(dscale, g * _affine(normed, weight, bias))
        factor = None if scale is None else _factor(at(scale), wide, activation, scale_offset)
        for total, value in ((dbias, g), (dweight, g * normed)):  # F is the same for all rows of a context
            collect(total, value if factor is None else value.sum_to_size(factor.shape) * factor)
        if not (want_x or want_h or want_gate):
            continue
        a = g if factor is None else g * factor
        a = by_sets(a if weight is None else a * weight, dim, groups)
        through = a - n * (a * n).mean(axes, keepdim=True)
        if center:
            through -= a.mean(axes, keepdim=True)
        dnew = (through * r).view(g.shape)
        if grad_x is not None:
            dnew += at(grad_x)
        if want_x:
            at(dx).copy_(dnew)
        if want_h and gate is not None:
            at(dh).copy_(dnew * at(gate))
        if want_gate and h is not None:
            collect(dgate, dnew * at(h))
    if dscale is not None and scale is not None:
        dscale = activations.tangent(activation, scale.to(wide), dscale)
    found = (dgate, dscale, dshift, dweight, dbias)
    return dx, dh, *(x.new_empty(0) if t is None else t.to(x.dtype).contiguous() for t in found)


def _widened(tensor: Tensor, wide: torch.dtype) -> Tensor:
    """Contiguous, too: with the channels last PyTorch's sums over a set have ten times the error."""
    return tensor.to(wide).contiguous()


def _factor(scale: Tensor, wide: torch.dtype, activation: str, offset: float) -> Tensor:
    return activations.value(activation, scale.to(wide)) + offset


def _affine(n: Tensor, weight: Maybe, bias: Maybe) -> Tensor:
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


def _chunks(x: Tensor, dim: int) -> Iterator:
    """Selections of a part of the positions along the largest leading dimension."""
    if dim == 0 or x.numel() <= _CHUNK:
        yield lambda tensor: tensor
        return
    along = max(range(dim), key=lambda d: x.shape[d])
    size = x.shape[along]
    step = max(size * _CHUNK // x.numel(), 1)
    for start in range(0, size, step):

        def at(tensor: Tensor, start: int = start) -> Tensor:
            if tensor.shape[along] == 1 and size != 1:
                return tensor
            return tensor.narrow(along, start, min(step, size - start))

        yield at
