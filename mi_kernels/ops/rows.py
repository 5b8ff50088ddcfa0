"""Rows of a matrix in another order, with rows of zeros between them, differentiable to any order.

PyTorch's index_select is as fast as memory, but its derivative adds rows up one after the other, as if
some were taken twice. Here each row has one place at most, so the derivative is the same function with both
orders in each other's place.
"""

from torch import Tensor

from mi_kernels.ops.rules import Rule, differentiating, nests


def move(rows: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """y [P, X] with y[p] = rows[source[p]], or zeros where source[p] is N.

    Args:
        rows: [N, X].
        source: [P], numbers of rows up to N.
        places: [N], where each row goes in y, and P where it goes nowhere.
    """
    return Move.call(rows, source, places) if differentiating((rows,)) else _moved(rows, source, places)


def _moved(rows: Tensor, source: Tensor, places: Tensor) -> Tensor:
    if len(source) <= len(places):  # no zeros
        return rows.index_select(0, source)
    absent = source == len(rows)
    moved = rows.index_select(0, source.masked_fill(absent, 0))
    return moved.index_fill_(0, absent.nonzero().squeeze(1), 0)


class Move(Rule):
    @staticmethod
    def forward(rows, source, places):
        return _moved(rows, source, places)

    @staticmethod
    def setup_context(ctx, inputs, output):
        Rule.save(ctx, *inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        source, places = ctx.saved_tensors
        return None if grad is None else move(grad, places, source), None, None

    @staticmethod
    @nests
    def jvp(ctx, tangent, *_):
        return move(tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, dims, rows, source, places):
        rows = rows.movedim(dims[0], 1)
        return move(rows.flatten(1), source, places).unflatten(1, rows.shape[1:]), 1
