"""Permutation of rows with optional rows of zeros between them, differentiable to any order.

The derivative of PyTorch's index_select is a slow index_add, since a row may be selected twice. Here each row
has at most one destination, so the derivative is the same function with both indices exchanged.
"""

from torch import Tensor

from .rules import Rule, differentiating, nestable


def move(rows: Tensor, src_index: Tensor, dest_index: Tensor) -> Tensor:
    """y [P, X] with y[p] = rows[src_index[p]], or zeros where src_index[p] is N.

    Args:
        rows: [N, X].
        src_index: [P], rows to read, up to N.
        dest_index: [N], the row of y to which each row goes, or P where it is dropped.
    """
    return (
        PermuteRowsRule.call(rows, src_index, dest_index)
        if differentiating((rows,))
        else _moved(rows, src_index, dest_index)
    )


def _moved(rows: Tensor, src_index: Tensor, dest_index: Tensor) -> Tensor:
    if len(src_index) <= len(dest_index):  # no zeros
        return rows.index_select(0, src_index)
    absent = src_index == len(rows)
    moved = rows.index_select(0, src_index.masked_fill(absent, 0))
    return moved.index_fill_(0, absent.nonzero().squeeze(1), 0)


class PermuteRowsRule(Rule):
    @staticmethod
    def forward(rows, src_index, dest_index):
        return _moved(rows, src_index, dest_index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        Rule.save(ctx, *inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        src_index, dest_index = ctx.saved_tensors
        return None if grad is None else move(grad, dest_index, src_index), None, None

    @staticmethod
    @nestable
    def jvp(ctx, tangent, *_):
        return move(tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, dims, rows, src_index, dest_index):
        rows = rows.movedim(dims[0], 1)
        return move(rows.flatten(1), src_index, dest_index).unflatten(1, rows.shape[1:]), 1
