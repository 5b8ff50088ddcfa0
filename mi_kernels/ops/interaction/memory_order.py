"""The order in which the axes of W lie in memory.

The kernels read W with the strides it has, but expect x inside z: a W with z inside is the W of the product
with x and z exchanged. Only speed depends on the answers, so symbolic strides answer for the example.
"""

import torch
from torch import Tensor

from mi_kernels.ops.rules import Maybe

CONTIGUOUS = (0, 1, 2)


def of_example(size: int) -> int:
    """The size of the traced example, without a guard; 0 if it depends on data."""
    node = None if torch.compiler.is_dynamo_compiling() else getattr(size, "node", None)
    if node is None:  # not a torch.SymInt
        return size
    return node.hint if node.has_hint() else 0


def order(weight: Maybe) -> tuple[int, ...]:
    """The axes O, Z, X (0, 1, 2) of W [(G,) O, Z, X], from the outermost in memory to the innermost."""
    if weight is None:
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


def has_z_inside(weight: Maybe) -> bool:
    """Whether z is inside x in memory."""
    found = order(weight)
    return found.index(1) > found.index(2)


def is_n_major(matrix: Maybe) -> bool:
    """Whether the rows of a matrix [(G,) N, K] are not contiguous, but its columns."""
    if matrix is None:
        return False
    row, column = (of_example(stride) for stride in matrix.stride()[-2:])
    return 0 < row < column and all(of_example(size) != 1 for size in matrix.shape[-2:])


def restored(tensor: Tensor, found: tuple[int, ...]) -> Tensor:
    """A tensor whose last three axes are those of W in the order ``found``, as [(G,) O, Z, X]."""
    lead = tensor.dim() - 3
    return tensor.permute(*range(lead), *(lead + found.index(axis) for axis in CONTIGUOUS))
