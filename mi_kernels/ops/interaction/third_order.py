"""The dense interaction of an input with two contexts, y_o = sum_ijk W[o,i,j,k] z1[i] z2[j] x[k] + ...

One operand is contracted first, once for each of its own rows; what is left is the interaction of two
(dispatch.py) with weights of each of these rows:

    z1, z2, x    W'[s,o,j,k] = sum_i W[o,i,j,k] z1[s,i], and likewise      s: the rows of that operand
    product      z1[s,i] z2[s,j] is one context of Z1 Z2 features          s: the rows of both contexts

All are made of calls that are differentiable themselves. No W' or product of contexts is larger than the
largest of the arguments and y: where it would be, the rows are taken in parts.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_rank, check_shape, check_tensors
from ..library import traceable
from ..rules import Maybe
from . import batched, cost_model, dispatch, memory_order, shared
from .arguments import common_lead

Z1, Z2, X, PRODUCT = "z1", "z2", "x", "product"
ORDERS = (Z1, Z2, X, PRODUCT)
NAMES = ("x", "z[0]", "z[1]", "weight", "weight_z[0]", "weight_z[1]", "weight_x", "bias")
_DIRECT = ("x", "first", "second", "weight", "weight_z1", "weight_z2", "weight_x", "bias")


def check_arguments(*tensors: Maybe, names: tuple[str, ...] = NAMES) -> torch.Size:
    """Of x, z1, z2, W, U1, U2, V and c; returns the broadcast leading dimensions."""
    op = "interaction"
    check_tensors(op, names, tensors, 4)
    x, first, second, weight = tensors[:4]
    assert x is not None and first is not None and second is not None and weight is not None
    for name, operand in zip(names, (x, first, second), strict=False):
        check_rank(op, name, operand, 1)
    lead = common_lead(op, names[1], first.shape[:-1], x.shape[:-1])
    lead = common_lead(op, names[2], second.shape[:-1], lead)
    sizes: dict[str, int | None] = {"Z1": first.shape[-1], "Z2": second.shape[-1], "X": x.shape[-1]}
    check_shape(op, names[3], weight, {"O": None, **sizes})
    sizes["O"] = weight.shape[0]
    for name, tensor, axes in zip(names[4:], tensors[4:], _AXES, strict=True):
        check_shape(op, name, tensor, {axis: sizes[axis] for axis in axes})
    return lead


_AXES = (("O", "Z1"), ("O", "Z2"), ("O", "X"), ("O",))


class Call(NamedTuple):
    """The sizes of a call: those of the example in a trace, as only speed and memory depend on them."""

    leads: tuple[tuple[int, ...], ...]  # of x, z1 and z2
    sizes: tuple[int, int, int, int]  # O, Z1, Z2, X

    def rows(self, *operands: int) -> int:
        """How many rows the operands (0 for x, 1, 2) have together."""
        shapes = [torch.Size(self.leads[operand]) for operand in operands]
        return math.prod(batched.leads(*shapes))

    def limit(self) -> int:
        """The elements of the largest argument or result."""
        out, one, two, width = self.sizes
        operands = (self.rows(number) * size for number, size in enumerate((width, one, two)))
        return max(*operands, math.prod(self.sizes), self.rows(0, 1, 2) * out)

    def own(self, order: str) -> tuple[int, ...]:
        """The operands whose rows the intermediate has."""
        return (1, 2) if order == PRODUCT else ({X: 0, Z1: 1, Z2: 2}[order],)

    def intermediate(self, order: str) -> int:
        """The elements of W', or of the product of the contexts."""
        out, one, two, width = self.sizes
        each = {Z1: out * two * width, Z2: out * one * width, X: out * one * two, PRODUCT: one * two}[order]
        return self.rows(*self.own(order)) * each

    def operations(self, order: str) -> int:
        """Of the products with W and with what has come of it, by the best plan of the second one."""
        out, one, two, width = self.sizes
        every, whole = self.rows(0, 1, 2), math.prod(self.sizes)
        if order == PRODUCT:
            contexts, inputs = self.rows(1, 2), self.rows(0)
            return 2 * min(
                every * whole,
                contexts * whole + every * out * width,
                inputs * whole + every * out * one * two,
            )
        (number,) = self.own(order)
        rest = [other for other in range(3) if other != number]
        sizes = (width, one, two)
        left = out * sizes[rest[0]] * sizes[rest[1]]
        shared_rows = (
            self.rows(number, rest[0]) * left + every * out * sizes[rest[1]],
            self.rows(number, rest[1]) * left + every * out * sizes[rest[0]],
        )
        return 2 * (self.rows(number) * whole + min(every * left, *shared_rows))

    def parts(self, order: str) -> int:
        return -(-self.intermediate(order) // max(self.limit(), 1))

    def costs(self, dtype: torch.dtype, device: str) -> tuple[cost_model.Cost, ...]:
        """Of the forward pass: each gradient costs as much as that, whatever the order."""
        found = []
        for order in ORDERS:
            moved = 2 * self.intermediate(order) + math.prod(self.sizes)
            calls = 3 * max(self.parts(order), 1)
            found.append(cost_model.cost_of(order, self.operations(order), moved, calls, dtype, device))
        return tuple(found)


def call_of(x: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Call:
    known = memory_order.of_example
    leads = tuple(tuple(known(size) for size in t.shape[:-1]) for t in (x, first, second))
    out, one, two, width = (known(size) for size in weight.shape)
    return Call(leads, (out, one, two, width))


def _check(backend, x, first, second, weight, weight_z1, weight_z2, weight_x, bias, force):
    weights = weight, weight_z1, weight_z2, weight_x, bias
    check_arguments(x, first, second, *weights, names=_DIRECT)
    if force is not None and force not in ORDERS:
        raise ValueError(f"interaction: force: expected None or one of {', '.join(ORDERS)}, got {force!r}")


@traceable(
    "differentiable_third_order",
    "(str backend, Tensor x, Tensor first, Tensor second, Tensor weight, Tensor? weight_z1,"
    " Tensor? weight_z2, Tensor? weight_x, Tensor? bias, str? force) -> Tensor",
    _check,
)
def interaction(
    backend: str,
    x: Tensor,  # [..., X]
    first: Tensor,  # [..., Z1]
    second: Tensor,  # [..., Z2]
    weight: Tensor,  # [O, Z1, Z2, X]
    weight_z1: Maybe,  # [O, Z1]
    weight_z2: Maybe,  # [O, Z2]
    weight_x: Maybe,  # [O, X]
    bias: Maybe,  # [O]
    force: str | None,  # one of ORDERS, for tests; else the cheapest
) -> Tensor:
    """y [..., O], contiguous and differentiable. The caller has checked the arguments."""
    call = call_of(x, first, second, weight)
    order = force or cost_model.cheapest(call.costs(x.dtype, x.device.type)).plan
    weights = weight_z1, weight_z2, weight_x, bias
    return _in_parts(backend, order, call.limit(), (x, first, second), weight, weights)


def _in_parts(
    backend: str,
    order: str,
    limit: int,
    operands: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    others: tuple[Maybe, Maybe, Maybe, Maybe],
) -> Tensor:
    """`_by`, with parts of the rows at a time where the intermediate has more than ``limit`` elements."""
    call = call_of(*operands, weight)
    size = call.intermediate(order)
    own = batched.leads(*(torch.Size(call.leads[number]) for number in call.own(order)))
    if size <= limit or max(own, default=1) <= 1:
        return _by(backend, order, *operands, weight, *others)
    dim = max(range(len(own)), key=lambda axis: own[axis]) - len(own) - 1  # that of each operand
    step = max(own[dim + 1] * limit // size, 1)
    parts = []
    for start in range(0, own[dim + 1], step):
        length = min(step, own[dim + 1] - start)
        x, first, second = (_narrowed(operand, dim, start, length) for operand in operands)
        parts.append(_in_parts(backend, order, limit, (x, first, second), weight, others))
    return torch.cat(parts, dim)


def _narrowed(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
    """A part along a dimension from the end, where the tensor has it."""
    if tensor.dim() < -dim or tensor.shape[dim] == 1:
        return tensor
    return tensor.narrow(dim, start, length)


def _by(
    backend: str,
    order: str,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    weight_z1: Maybe,
    weight_z2: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> Tensor:
    if order == PRODUCT:
        both = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)
        y = _second_order(backend, x, both, weight.flatten(1, 2), None, weight_x, bias)
        if weight_z1 is None and weight_z2 is None:
            return y
        return y + _second_order(backend, second, first, None, weight_z1, weight_z2, None)
    if order == Z1:
        offset = _offset(backend, first, weight_z1, bias)
        layer = _generated(backend, first, weight.flatten(2)).unflatten(-1, weight.shape[2:])
        return _applied(backend, x, second, layer, weight_z2, weight_x, offset)
    if order == Z2:
        offset = _offset(backend, second, weight_z2, bias)
        layer = _generated(backend, second, weight.flatten(0, 1)).unflatten(-2, weight.shape[:2])
        return _applied(backend, x, first, layer, weight_z1, weight_x, offset)
    offset = _offset(backend, x, weight_x, bias)
    layer = _generated(backend, x, weight.flatten(1, 2).mT).unflatten(-1, weight.shape[1:3])
    return _applied(backend, second, first, layer, weight_z1, weight_z2, offset)


def _applied(
    backend: str, x: Tensor, z: Tensor, layer: Tensor, weight_z: Maybe, weight_x: Maybe, offset: Maybe
) -> Tensor:
    """The interaction with W' [..., O, Z, X]; U and V are those of all rows, whichever their W'.

    Expanded to each W' they would get a gradient for each of these, rounded before it is summed.
    """
    if memory_order.of_example(math.prod(layer.shape[:-3])) == 1:
        return _second_order(backend, x, z, layer, weight_z, weight_x, offset)
    y = _second_order(backend, x, z, layer, None, None, offset)
    if weight_z is None and weight_x is None:
        return y
    return y + _second_order(backend, x, z, None, weight_z, weight_x, None)


def _second_order(
    backend: str, x: Tensor, z: Tensor, weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> Tensor:
    return dispatch.interaction(backend, x, z, weight, weight_z, weight_x, bias, None, None, None, None)


def _offset(backend: str, z: Tensor, weight_z: Maybe, bias: Maybe) -> Maybe:
    """U z + c [..., O]."""
    return bias if weight_z is None else _second_order(backend, z, z, None, None, weight_z, bias)


def _generated(backend: str, z: Tensor, weight: Tensor) -> Tensor:
    """W' [..., O, X] of contexts z [..., Z] and W [O, Z, X]."""
    contexts = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    generated, _ = shared.generate(backend, contexts, weight, None, None, None)
    assert generated is not None
    return generated.unflatten(0, z.shape[:-1]) if z.dim() > 1 else generated.squeeze(0)


def folded(order: str, call: Call) -> str:
    """What an order does, for `explain`."""
    if order == PRODUCT:
        why = "the products of the two contexts are one context of Z1 Z2 features"
    else:
        what = {Z1: "the first context", Z2: "the second context", X: "the input"}[order]
        why = f"W is multiplied by {what} first, once for each of its rows, then by the other two operands"
    parts = call.parts(order)
    return (
        f"{why}; in {parts} parts, as all rows at once would be larger than any tensor" if parts > 1 else why
    )
