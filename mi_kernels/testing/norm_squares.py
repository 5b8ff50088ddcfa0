"""S^2 of the error rule (errors.py) for normalisation with modulation, by the rules of squares.py.

Statistics round as sums do: the mean m of a set by one unit of itself and of its terms, S_m^2 = m^2 +
mean(x_new^2) / count, and with it all elements of the set, and rstd r by one unit of itself. So with S_x^2 of
x_new, which without a residual is an argument and exact,

    S_n^2 = r^2 (S_x^2 + S_m^2) + n^2

whose last term is the rounding of the difference and of r; there is no m of rms. A mean over a set of terms
t, each with its own S_t^2, has mean(S_t^2) / count, and its rounding.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.activations import value
from .norm_samples import Normalization
from .squares import gate_slope, gate_value

Maybe = Tensor | None


class _Parts(NamedTuple):
    x_new: Tensor
    n: Tensor
    v: Tensor
    rstd: Tensor  # as wide as x
    factor: Tensor | float
    x_new2: Tensor  # S^2 of each
    n2: Tensor
    v2: Tensor
    factor2: Tensor | float


class _Sets:
    """Means over the sets of a sample."""

    def __init__(self, sample: Normalization) -> None:
        self.sample = sample

    def mean(self, t: Tensor) -> Tensor:
        """As wide as ``t``."""
        groups = self.sample.groups or 1
        rank, dim = len(self.sample.x), self.sample.channel
        sets = t.unflatten(dim, (groups, t.shape[dim] // groups))
        axes = tuple(range(dim + 1, rank + 1))
        return sets.mean(axes, keepdim=True).expand(sets.shape).reshape(t.shape)

    @property
    def count(self) -> int:
        size = 1
        for each in self.sample.x[self.sample.channel :]:
            size *= each
        return max(size // (self.sample.groups or 1), 1)


def _over_channels(sample: Normalization, t: Maybe) -> Maybe:
    return None if t is None else t.reshape(-1, *(1,) * (len(sample.x) - 1 - sample.channel))


def _parts(sample: Normalization, x: Tensor, h: Maybe, gate: Maybe, scale: Maybe, *affine: Maybe) -> _Parts:
    sets = _Sets(sample)
    weight, bias = (_over_channels(sample, t) for t in affine)
    x_new, x_new2 = x, torch.zeros_like(x)
    if h is not None:
        added = h if gate is None else gate * h
        x_new, x_new2 = x + added, x**2 + added**2
    mean = sets.mean(x_new) if sample.norm != "rms" else torch.zeros_like(x)
    difference = x_new - mean
    rstd = (sets.mean(difference**2) + 1e-5).rsqrt()
    n = difference * rstd
    mean2 = mean**2 + sets.mean(x_new**2) / sets.count if sample.norm != "rms" else mean
    n2 = rstd**2 * (x_new2 + mean2) + n**2
    v, v2 = (n, n2) if weight is None else (n * weight, n2 * weight**2)
    if bias is not None:
        v, v2 = v + bias, v2 + bias**2
    factor: Any = 1.0
    factor2: Any = 0.0
    if scale is not None:
        factor = value(sample.activation, scale) + sample.scale_offset
        ones = torch.ones((), dtype=scale.dtype, device=scale.device)
        factor2 = gate_value(sample.activation, sample.scale_offset, ones, scale, 0.0)
    return _Parts(x_new, n, v, rstd, factor, x_new2, n2, v2, factor2)


def values(sample: Normalization, *tensors: Maybe) -> list[Tensor]:
    """S^2 of y, with that of x_new before it."""
    x, h, gate, scale, shift, weight, bias = tensors
    assert x is not None
    p = _parts(sample, x, h, gate, scale, weight, bias)
    y = p.factor**2 * p.v2 + p.v**2 * p.factor2
    y = y if shift is None else y + shift**2
    return [torch.stack([p.x_new2, y.expand(x.shape)]) if sample.residual else y]


def gradients(sample: Normalization, cotangent: Tensor, *tensors: Maybe) -> list[Tensor]:
    """S^2 of the gradients by the tensors that are there."""
    x, h, gate, scale, shift, weight, bias = tensors
    assert x is not None
    sets, p = _Sets(sample), _parts(sample, x, h, gate, scale, weight, bias)
    grad_x, g = (cotangent[0], cotangent[1]) if sample.residual else (torch.zeros_like(x), cotangent)
    w = _over_channels(sample, weight)
    f, f2 = g * p.factor, g**2 * (p.factor2 + p.factor**2)
    a, a2 = (f, f2) if w is None else (f * w, f2 * w**2)
    by_n, of_a = sets.mean(a * p.n), sets.mean(a) if sample.norm != "rms" else torch.zeros_like(a)
    spread = p.n**2 * sets.mean(a2 * p.n**2 + a**2 * p.n2) / sets.count + p.n2 * by_n**2
    spread = spread + p.n**2 * by_n**2 + of_a**2
    if sample.norm != "rms":
        # All of a set's n are off by the rounding of one mean.
        shifted = p.rstd**2 * sets.mean(p.x_new) ** 2
        spread = spread + sets.mean(a2) / sets.count + p.n**2 * of_a**2 * shifted
    through = p.rstd * (a - of_a - p.n * by_n)
    dx, dx2 = through + grad_x, p.rstd**2 * (a2 + spread) + through**2 + grad_x**2
    found: list[Tensor] = [dx2]
    if h is not None:
        found.append(dx2 if gate is None else dx2 * gate**2)
    if gate is not None:
        assert h is not None
        found.append((h**2 * (dx2 + dx**2)).sum_to_size(gate.shape))
    if scale is not None:
        terms, squared = g * p.v, g**2 * (p.v2 + p.v**2)
        size = scale.shape
        rule = sample.activation, scale, 0.0
        found.append(gate_slope(*rule, terms.sum_to_size(size), squared.sum_to_size(size)))
    if shift is not None:
        found.append((g**2).sum_to_size(shift.shape))
    channels = [d for d in range(len(sample.x)) if d != sample.channel]
    for t, terms2 in ((weight, f2 * p.n**2 + f**2 * p.n2), (bias, f2)):
        if t is not None:
            found.append(terms2.sum(channels) if channels else terms2)
    return found
