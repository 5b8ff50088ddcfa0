"""What the derivative rules of normalisation with modulation are made of.

Calls of both operations, and the modulation and the residual beside them, whose terms may be missing; all but
the calls are differentiable, as the rules of modulation are.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..library import overloads
from ..modulate import autograd as elementwise
from ..rules import Maybe, add
from . import schema  # noqa: F401  (defines the operations)

_NORM_MODULATE = overloads("norm_modulate")
_GRADS = overloads("norm_modulate_grads")
IDENTITY = elementwise.Form("identity")


class Form(NamedTuple):
    """What is normalised (schema.py), and F = activation + offset."""

    dim: int
    groups: int
    center: bool
    eps: float
    activation: str = "identity"
    offset: float = 0.0

    @property
    def factor(self) -> elementwise.Form:
        return elementwise.Form(self.activation, self.offset)

    @property
    def plain(self) -> "Form":
        """Without modulation."""
        return self._replace(activation="identity", offset=0.0)

    def count(self, x: Tensor) -> int:
        """Elements of a set, at least 1."""
        return max(math.prod(x.shape[self.dim :]) // self.groups, 1)

    def sets(self, tensor: Tensor) -> Tensor:
        """[*lead, groups, C / groups, *spatial]; the vmap of ``torch.autograd`` has no unflatten."""
        shape = tensor.shape
        each = shape[self.dim] // self.groups
        return tensor.reshape(*shape[: self.dim], self.groups, each, *shape[self.dim + 1 :])

    def per_set(self, statistic: Tensor, rank: int) -> Tensor:
        """[*lead, groups] as a tensor that broadcasts with `sets` of ``rank`` dimensions of x."""
        return statistic.reshape(*statistic.shape, *(1,) * (rank - self.dim))


class Kept(NamedTuple):
    """What the backward pass is computed from."""

    x: Tensor  # x_new
    h: Maybe
    gate: Maybe
    scale: Maybe
    shift_size: Sequence[int] | None
    weight: Maybe
    bias: Maybe
    mean: Maybe
    rstd: Tensor


def kernel(backend: str, form: Form, *tensors: Maybe) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dim, groups, center, eps, activation, offset = form
    return _NORM_MODULATE[backend](*tensors, dim, groups, center, eps, activation, offset)


def gradients(
    backend: str, form: Form, want: Sequence[bool], grad: Tensor, grad_x: Maybe, kept: Kept
) -> list[Maybe]:
    """The gradients by x, h, the contexts and the weights that are wanted, in one pass."""
    x, h, gate, scale, shift_size, weight, bias, mean, rstd = kept
    # Only the size of a shift is read.
    shift = x.new_empty(()).expand(shift_size) if shift_size is not None and want[4] else None
    h = h if want[2] else None
    if h is None and gate is not None and not want[1]:
        gate = None
    h_beside = x if gate is not None and h is None else h  # a gate is beside some h
    results = _GRADS[backend](
        *(grad, x, grad_x, h_beside, gate, scale, shift, weight, bias, mean, rstd),
        *(form.dim, form.groups, form.center, form.activation, form.offset, *want),
    )
    return [result if wanted else None for result, wanted in zip(results, want, strict=True)]


def modulated(backend: str, factor: elementwise.Form, x: Tensor, scale: Maybe, shift: Maybe) -> Tensor:
    """x F(scale) + shift; F is 1 without a scale."""
    if scale is None:
        return x if shift is None else x + shift
    return elementwise.modulate(backend, x, scale, shift, factor.activation, factor.offset, factor.factor)


def modulated_grads(
    backend: str,
    want: Sequence[bool],
    factor: elementwise.Form,
    grad: Tensor,
    x: Tensor,
    scale: Maybe,
    shift_size: Sequence[int],
) -> tuple[Maybe, ...]:
    """The gradients by x, scale and shift of `modulated`."""
    if scale is None:
        return grad, None, _summed(grad, shift_size) if want[2] else None
    rule = factor.activation, factor.offset
    return elementwise.modulate_grads(backend, want, *rule, grad, x, scale, shift_size, factor.factor)


def modulated_tangent(
    backend: str,
    factor: elementwise.Form,
    x: Tensor,
    scale: Maybe,
    x_t: Maybe,
    scale_t: Maybe,
    shift_t: Maybe,
) -> Maybe:
    if scale is None:
        return add(x_t, shift_t)
    return elementwise.tangent(backend, factor, x, scale, None, x_t, scale_t, shift_t)


def _summed(grad: Tensor, size: Sequence[int]) -> Tensor:
    """The sum over the dimensions in which ``size`` is 1."""
    pairs = enumerate(zip(grad.shape, size, strict=True))
    dims = [dim for dim, (own, wanted) in pairs if wanted == 1 and own != 1]
    return grad.sum(dims, keepdim=True) if dims else grad


def residual_grads(
    backend: str, want: Sequence[bool], grad: Tensor, h: Maybe, gate: Maybe
) -> tuple[Maybe, Maybe, Maybe]:
    """The gradients by x, h and gate of x + gate h, differentiable. That of the gate needs h."""
    dh = dgate = None
    if gate is not None and h is not None:
        rule = backend, (want[1], want[2], False), "identity", 0.0
        dh, dgate, _ = elementwise.modulate_grads(*rule, grad, h, gate, ())
    elif gate is not None and want[1]:
        dh = elementwise.modulate(backend, grad, gate, None, "identity", 0.0)
    return grad, dh, dgate


def mean_of_products(backend: str, form: Form, a: Tensor, b: Tensor, like: Tensor, factor: float) -> Any:
    """factor * m(a b) of the size of ``like``, differentiable."""
    rule = backend, (False, True, False), "identity", 0.0
    number = factor / form.count(a)
    a, b = form.sets(a), form.sets(b)
    return elementwise.modulate_grads(*rule, a, b, like, (), number)[1]
