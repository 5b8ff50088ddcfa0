"""The linear head of a generator, in the pieces that the public functions take."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..ops.checks import check_shape, check_tensors

__all__ = ["HeadPart", "Order", "split_head"]

Order = Literal["out,in", "in,out"]
ORDERS: tuple[Order, ...] = ("out,in", "in,out")


class HeadPart(NamedTuple):
    """What a linear head computes one generated tensor from, by :func:`mi_kernels.split_head`.

    Attributes:
        weight: what is multiplied by the context: W of shape ``[O, Z, X]`` for a generated weight, U of shape
            ``[O, Z]`` for a generated bias.
        bias: what is added: V of shape ``[O, X]``, or c of shape ``[O]``. None for a head without a bias.

    Example:
        >>> part, = mi.split_head(torch.ones(20, 3), None, [(4, 5)])
        >>> part.weight.shape, part.bias
        (torch.Size([4, 3, 5]), None)
    """

    weight: Tensor
    bias: Tensor | None


def split_head(
    weight: Tensor,  # [P, Z]
    bias: Tensor | None,  # [P]
    shapes: Sequence[Sequence[int]],
    *,
    order: Order = "out,in",
) -> list[HeadPart]:
    r"""Splits the linear head of a generator into W, U, V and c, which are views of its weight and bias.

    Existing code generates a layer by a linear map of a context, ``F.linear(z, weight, bias)``, and cuts
    the P outputs into the layer's weights and biases: O X of them, as a matrix, are :math:`z W + V`, and O of
    them are :math:`U z + c`.

    .. math:: W_{oij} = weight_{p(o,j),i}, \quad V_{oj} = bias_{p(o,j)}, \quad p(o, j) = start + X o + j

    Args:
        weight: the head's weight of shape ``[P, Z]``, as of ``torch.nn.Linear(Z, P)``.
        bias: the head's bias of shape ``[P]``, or None.
        shapes: the shape of each generated tensor, in the order in which they lie in the output of the head;
            P is the sum of their sizes. ``(O, X)`` or ``(O,)``; or ``(O, ...)`` with more dimensions, which
            together count as X. So for the kernel of a convolution x is a patch, as
            ``torch.nn.functional.unfold`` lays it out.
        order: of two dimensions: ``"out,in"`` for ``(O, X)``, as in ``torch.nn.Linear``, or ``"in,out"`` for
            ``(X, O)``, as in ``x @ weight.view(X, O)``: p(o, j) = start + O j + o.

    Returns:
        A list with a :class:`mi_kernels.HeadPart` for each shape, ``(W, V)`` of a matrix or ``(U, c)`` of a
        vector: ``(W, V), (U, c) = mi.split_head(head.weight, head.bias, [(O, X), (O,)])`` are the arguments
        of ``mi.interaction(x, z, W, U, V, c)`` and ``mi.generate(z, W, U, V, c)``. V and c are None without
        ``bias``.

    Nothing is copied, and nothing computed; gradients flow to ``weight`` and ``bias``. W has the context
    innermost in memory. Any dtype that :func:`mi_kernels.interaction` takes.

    Raises:
        TypeError: an argument has a wrong type, or ``bias`` has not the dtype of ``weight``.
        ValueError: the shape of ``weight`` or ``bias`` does not fit ``shapes``, a shape has no dimensions, a
            negative size, or more than two dimensions with ``"in,out"``; or ``order`` is neither.

    Source: Ha et al., "HyperNetworks", ICLR 2017; Gilmer et al., "Neural Message Passing for Quantum
    Chemistry", ICML 2017 (the edge network).

    Example:
        >>> head, x, z = torch.nn.Linear(3, 4 * 5 + 4), torch.randn(8, 5), torch.randn(8, 3)
        >>> (w, v), (u, c) = mi.split_head(head.weight, head.bias, [(4, 5), (4,)])
        >>> mi.interaction(x, z, w, u, v, c).shape
        torch.Size([8, 4])
    """
    op = "split_head"
    check_tensors(op, ("weight", "bias"), (weight, bias), 1)
    check_order(op, order)
    _check_shapes(op, shapes, order)
    total = sum(math.prod(shape) for shape in shapes)
    check_shape(op, "weight", weight, {"P": total, "Z": None})
    check_shape(op, "bias", bias, {"P": total})
    return split(weight, bias, shapes, order)


def split(
    weight: Tensor, bias: Tensor | None, shapes: Sequence[Sequence[int]], order: Order
) -> list[HeadPart]:
    """:func:`split_head` of arguments that fit."""
    if len(shapes) == 1:
        return [_part(weight, bias, shapes[0], order)]
    sizes = [math.prod(shape) for shape in shapes]
    # One node of autograd, whose backward writes each gradient once. `narrow` would add as many of full size.
    weights = weight.split(sizes)
    biases = (None,) * len(sizes) if bias is None else bias.split(sizes)
    return [_part(*each, order) for each in zip(weights, biases, shapes, strict=True)]


def _part(weight: Tensor, bias: Tensor | None, shape: Sequence[int], order: Order) -> HeadPart:
    """Of the rows of one generated tensor."""
    if len(shape) == 1:
        return HeadPart(weight, bias)
    context = weight.shape[1]
    if order == "in,out":
        width, out = shape
        weight = weight.view(width, out, context).permute(1, 2, 0)
        return HeadPart(weight, None if bias is None else bias.view(width, out).t())
    out, width = shape[0], math.prod(shape[1:])
    weight = weight.view(out, width, context).transpose(1, 2)
    return HeadPart(weight, None if bias is None else bias.view(out, width))


def check_order(op: str, order: object) -> None:
    if not isinstance(order, str) or order not in ORDERS:
        raise ValueError(f"{op}: order: expected one of {', '.join(map(repr, ORDERS))}, got {order!r}")


def _check_shapes(op: str, shapes: Any, order: Order) -> None:
    if not isinstance(shapes, Sequence) or isinstance(shapes, str):
        raise TypeError(f"{op}: shapes: expected a sequence of shapes, got {type(shapes).__name__}")
    for number, shape in enumerate(shapes):
        name = f"shapes[{number}]"
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise TypeError(f"{op}: {name}: expected a sequence of int, got {type(shape).__name__}")
        for dim, size in enumerate(shape):
            if isinstance(size, bool) or not isinstance(size, int | torch.SymInt):
                raise TypeError(f"{op}: {name}[{dim}]: expected an int, got {type(size).__name__}")
            if size < 0:
                raise ValueError(f"{op}: {name}[{dim}]: expected >= 0, got {size}")
        most = 2 if order == "in,out" else len(shape)
        if not 1 <= len(shape) <= most:
            limit = "one or two dimensions with order='in,out'" if shape else "at least one dimension"
            raise ValueError(f"{op}: {name}: expected {limit}, got {list(shape)}")
