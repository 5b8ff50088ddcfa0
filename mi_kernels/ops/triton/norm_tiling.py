"""Axes and tiles of the family norm: the sets, which are normalised by themselves, and what is in a set.

A tile of the *rows* kernels has several sets as its rows, the channels of a set as its columns. Sets that
have positions too (maps) are tiles, or are cut into tiles, of channels by positions.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from . import interpreting
from .launch import cdiv
from .modulate_tiling import FEW_PROGRAMS, MAX_AXES, Axis, Strides, collapse

# Elements of a tile in float32; of float64 half. A set beyond ``MOST`` is read twice; beyond half of that in
# a backward pass or of a map, as registers would spill (compiled for 8.0, 9.0 and 10.0). So would they in a
# backward pass with more elements of a thread.
FEW, MOST = 2048, 8192
OF_A_THREAD, OF_A_THREAD_BACKWARD = 16, 8
# Columns of a tile of longer rows, in whose pass contexts and sums are by element too.
LONG = 1024
# Tiles whose column sums a program adds one after the other in float; what follows is added in trees.
STEPS = 16
_UNIT = 4  # bytes of a number in float32


class Layout(NamedTuple):
    """Strides of an operand: of the leading dimensions and the groups, of channels and of positions."""

    lead: Strides
    channel: int
    space: int


ABSENT = Layout((), 0, 0)


def layout(tensor: Tensor | None, shape: Sequence[int], dim: int, groups: int) -> Layout:
    """Strides beside an x of this shape, 0 where the tensor broadcasts; see ``is_flat`` for positions."""
    if tensor is None:
        return ABSENT
    strides = [0 if own == 1 else stride for own, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    behind = [stride for stride, size in zip(strides[dim + 1 :], shape[dim + 1 :], strict=True) if size != 1]
    lead = (*strides[:dim], strides[dim] * (shape[dim] // groups))
    return Layout(lead, strides[dim], behind[-1] if behind else 0)


def is_flat(tensor: Tensor, dim: int) -> bool:
    """Whether the positions behind ``dim`` are one axis."""
    behind = [
        (tensor.shape[d], tensor.stride(d)) for d in range(dim + 1, tensor.dim()) if tensor.shape[d] != 1
    ]
    pairs = zip(behind, behind[1:], strict=False)
    return all(outer == inner * size for (_, outer), (size, inner) in pairs)


class Sets(NamedTuple):
    """The axes of positions and groups. A tile's rows are one; a program has a part of ``outer`` and loops
    over ``depth``, each padded to three."""

    rows: Axis
    outer: tuple[Axis, ...]
    depth: tuple[Axis, ...]

    def strides(self, operand: int, column: int) -> tuple[int, int, Strides, Strides]:
        """Strides of one operand as elementwise.py takes them: row, column, outer axes, depth axes."""
        outer, depth = (tuple(axis.strides[operand] for axis in axes) for axes in (self.outer, self.depth))
        return self.rows.strides[operand], column, outer, depth

    def sizes(self, *names: tuple[str, ...]) -> dict[str, int]:
        """The sizes of the outer and depth axes by the names of a kernel's arguments."""
        pairs = zip(names, (self.outer, self.depth), strict=False)
        return {name: axis.size for group, axes in pairs for name, axis in zip(group, axes, strict=True)}


@lru_cache(maxsize=4096)
def sets(
    shape: tuple[int, ...], operands: tuple[Strides, ...], looped: tuple[bool, ...] | None, rows: bool
) -> Sets | None:
    """The axes of ``shape``, merged, the first operand dense. A program loops over the ``looped`` ones.

    With ``rows``, one of those (or of all, if ``looped`` is None) has the rows of a tile. None: there are
    more axes than the kernels take.
    """
    absent = (0,) * len(shape)
    axes = collapse(shape, tuple(strides or absent for strides in operands), looped or (False,) * len(shape))
    unit = Axis(1, (0,) * len(operands), False)
    chosen = [axis for axis in axes if axis.reduced or looped is None] if rows else []
    row = chosen[-1] if chosen else unit
    axes = [axis for axis in axes if axis is not row]
    outer, depth = ([axis for axis in axes if axis.reduced == kind] for kind in (False, True))
    if max(len(outer), len(depth)) > MAX_AXES:
        return None
    padded = (tuple([unit] * (MAX_AXES - len(kind)) + kind) for kind in (outer, depth))
    return Sets(row, *padded)


def power(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def most_elements(wide: int, half: bool) -> int:
    """Elements of a set that is read once; ``wide`` is the size of a number in which it is computed."""
    return MOST * _UNIT // wide // (2 if half else 1)


def row_tile(rows: int, others: int, columns: int, few: int = FEW) -> tuple[int, int]:
    """BM and BN of a tile with all columns, of about ``few`` elements; ``others`` multiplies the programs."""
    BN = power(columns)
    BM = min(max(few // BN, 1), power(rows))
    while BM > 1 and cdiv(rows, BM) * others < FEW_PROGRAMS:
        BM //= 2
    return BM, BN


def set_tile(rows: int, columns: int, most: int) -> tuple[int, int, bool]:
    """BM and BN, and whether the tile is a whole set."""
    BM, BN = power(rows), power(columns)
    if BM * BN <= most:
        return BM, BN, True
    few = most // 2
    BN = min(BN, few)
    return min(BM, few // BN), BN, False


def warps(elements: int, wide: int, backward: bool) -> int:
    of_a_thread = OF_A_THREAD_BACKWARD if backward else OF_A_THREAD
    return min(max(elements * wide // (32 * of_a_thread * _UNIT), 4), 16)


def splits(steps: int, programs: int) -> int:
    """Programs that share the sums over ``steps`` tiles."""
    wanted = max(cdiv(steps, STEPS), min(steps // 2, FEW_PROGRAMS // max(programs, 1)))
    wanted = cdiv(steps, STEPS) if interpreting() and steps > 2 else wanted
    return max(1, min(wanted, steps))
