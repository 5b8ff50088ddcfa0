"""The order in which the axes of W lie in memory.

The kernels read W with the strides it has, but expect x inside z: a W with z inside is the W of the product
with x and z exchanged. Only speed depends on the answers, so symbolic strides answer for the example.
"""

import torch
from torch import Tensor

from ..rules import Maybe

CONTIGUOUS = (0, 1, 2)
_PLAIN = Tensor, torch.nn.Parameter  # tensors of tracers would answer `is_contiguous` with a guard


def of_example(size: int) -> int:
    """The size of the traced example, without a guard; 0 if it depends on data."""
    node = None if type(size) is int else getattr(size, "node", None)  # a torch.SymInt has one
    if node is None:
        return size
    return node.hint if node.has_hint() else 0


def order(weight: Maybe) -> tuple[int, ...]:
    """The axes O, Z, X (0, 1, 2) of W [(G,) O, Z, X], from the outermost in memory to the innermost."""
    if weight is None or type(weight) in _PLAIN and weight.is_contiguous():
        return CONTIGUOUS
    strides = [of_example(stride) for stride in weight.stride()[-3:]]
    if strides[0] >= strides[1] >= strides[2]:
        return CONTIGUOUS
    sizes = [of_example(size) for size in weight.shape[-3:]]
    long = [axis for axis in CONTIGUOUS if sizes[axis] != 1]
    if any(strides[axis] == 0 for axis in long):  # expanded: no order
        return CONTIGUOUS
    # Axes of size 1 have no place: in front.
    placed = sorted(long, key=lambda axis: -strides[axis])
    if placed == long:
        return CONTIGUOUS
    return *(axis for axis in CONTIGUOUS if axis not in long), *placed


def is_n_major(matrix: Maybe) -> bool:
    """Whether the first of the last two axes is inside the other one in memory: z inside x, if it is W."""
    if matrix is None or type(matrix) in _PLAIN and matrix.is_contiguous():
        return False
    row, column = matrix.stride()[-2:]
    if not 0 < of_example(row) < of_example(column):
        return False
    return of_example(matrix.shape[-2]) != 1 != of_example(matrix.shape[-1])


def restored(tensor: Tensor, found: tuple[int, ...]) -> Tensor:
    """A tensor whose last three axes are those of W in the order ``found``, as [(G,) O, Z, X]."""
    lead = tensor.dim() - 3
    return tensor.permute(*range(lead), *(lead + found.index(axis) for axis in CONTIGUOUS))
