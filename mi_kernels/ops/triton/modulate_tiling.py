"""Axes of an elementwise call, as few as its strides allow, and how tiles are laid over them."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from mi_kernels.ops.triton import interpreting

Strides = tuple[int, ...]
MOST = 3  # axes that a program walks beside those of its tile, kept ones and reduced ones


class Axis(NamedTuple):
    size: int
    strides: Strides  # of each operand, 0 where it broadcasts
    reduced: bool  # whether results are summed over it


class Tiling(NamedTuple):
    """Which axes a tile covers, which the grid and which a program's loop.

    A tile is [BM, BN]; its columns are the axis in which y is contiguous. ``outer`` are kept axes, ``depth``
    reduced ones, each padded to three. ``splits`` programs share the sum that makes one result.
    """

    rows: Axis
    columns: Axis
    outer: tuple[Axis, ...]
    depth: tuple[Axis, ...]
    BM: int
    BN: int
    splits: int

    def strides(self, operand: int) -> tuple[int, int, Strides, Strides]:
        """Of one operand: by rows, by columns, by the outer axes, by the axes of the loop."""
        row, column = (axis.strides[operand] for axis in (self.rows, self.columns))
        outer, depth = (tuple(axis.strides[operand] for axis in axes) for axes in (self.outer, self.depth))
        return row, column, outer, depth

    def varies(self, operand: int) -> tuple[bool, bool]:
        """Whether the operand varies over the rows and over the columns of a tile."""
        return self.rows.strides[operand] != 0, self.columns.strides[operand] != 0

    @property
    def sizes(self) -> tuple[int, int, Strides, Strides]:
        outer, depth = (tuple(axis.size for axis in axes) for axes in (self.outer, self.depth))
        return self.rows.size, self.columns.size, outer, depth

    @property
    def programs(self) -> int:
        """Programs of one split."""
        tiles = _tiles(self.rows, self.BM, False) * _tiles(self.columns, self.BN, False)
        return math.prod(axis.size for axis in self.outer) * tiles

    @property
    def steps(self) -> int:
        """Tiles that make one result."""
        tiles = _tiles(self.rows, self.BM, True) * _tiles(self.columns, self.BN, True)
        return math.prod(axis.size for axis in self.depth) * tiles


def _tiles(axis: Axis, block: int, reduced: bool) -> int:
    return -(-axis.size // block) if axis.reduced == reduced else 1


def collapse(shape: Sequence[int], operands: Sequence[Strides], reduced: Sequence[bool]) -> list[Axis]:
    """The axes in the order in which the first operand, a dense one, lies in memory; the last is the fastest.

    Neighbours become one axis where they are one for every operand, and of one kind.
    """
    axes = [
        Axis(size, tuple(strides[d] for strides in operands), reduced[d])
        for d, size in enumerate(shape)
        if size != 1
    ]
    axes.sort(key=lambda axis: -axis.strides[0])
    merged: list[Axis] = []
    for axis in axes:
        if merged and merged[-1].reduced == axis.reduced:
            spans = tuple(stride * axis.size for stride in axis.strides)
            if merged[-1].strides == spans:
                merged[-1] = axis._replace(size=merged[-1].size * axis.size)
                continue
        merged.append(axis)
    return merged


# Bytes of a tile: 32 of each operand for each of 128 threads, two loads of 16 bytes under way at once.
TILE_BYTES, WARPS = 4096, 4
# Where there are fewer programs than a large GPU holds at once (132 processors with 8 of them), tiles shrink
# to a quarter and sums are split. The interpreter runs one program after the other, in milliseconds each.
FEW_PROGRAMS = 8 if interpreting() else 1024
# Tiles of one split, at least: their sums, in float32, are then a small part of what was read.
STEPS_OF_A_SPLIT = 4
# Columns of a tile where a scale serves many rows, so that its activation is computed for several at once.
SHARED_COLUMNS = 512


@lru_cache(maxsize=4096)
def tiling(
    shape: tuple[int, ...], operands: tuple[Strides, ...], reduced: tuple[bool, ...], itemsize: int
) -> Tiling | None:
    """How to walk these operands; None where they alternate between more axes than the kernels take."""
    axes = collapse(shape, operands, reduced)
    unit = Axis(1, (0,) * len(operands), False)
    columns = axes.pop() if axes else unit
    # Rows of the other kind than the columns, so that one of the two is summed within the tile.
    other = [axis for axis in axes if axis.reduced != columns.reduced]
    rows = other[-1] if other else (axes[-1] if axes else unit._replace(reduced=columns.reduced))
    axes = [axis for axis in axes if axis is not rows]
    outer, depth = ([axis for axis in axes if axis.reduced == kind] for kind in (False, True))
    if max(len(outer), len(depth)) > MOST:
        return None
    outer, depth = ([unit] * (MOST - len(kind)) + kind for kind in (outer, depth))
    made = Tiling(rows, columns, tuple(outer), tuple(depth), BM=1, BN=1, splits=1)
    elements = total = TILE_BYTES // itemsize
    while elements >= total // 4:
        made = _with_tile(made, elements)
        if made.programs * made.steps >= FEW_PROGRAMS:
            break
        elements //= 2
    splits = max(1, min(made.steps // STEPS_OF_A_SPLIT, FEW_PROGRAMS // made.programs))
    return made._replace(splits=splits)


def _with_tile(made: Tiling, elements: int) -> Tiling:
    shared = made.rows.size > 1 and any(stride == 0 for stride in made.rows.strides)
    most = min(elements, SHARED_COLUMNS) if shared else elements
    most = min(most, _power(made.columns.size))
    # The widest block among those that waste about the fewest lanes. Of a long axis all waste next to none,
    # so that its block does not change with every size.
    blocks = (most, most // 2 or 1, most // 4 or 1)
    covered = {block: -(-made.columns.size // block) * block for block in blocks}
    BN = max(block for block, lanes in covered.items() if 16 * lanes <= 17 * min(covered.values()))
    return made._replace(BM=min(elements // BN, _power(made.rows.size)), BN=BN)


def _power(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()
