"""Tilings of elementwise calls: their axes, merged as far as strides allow, and the tiles over them."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from . import interpreting

Strides = tuple[int, ...]
MAX_AXES = 3  # beside those of a tile, of kept and of reduced axes each


class Axis(NamedTuple):
    size: int
    strides: Strides  # of each operand, 0 where it broadcasts
    reduced: bool  # whether results are summed over it


class Tiling(NamedTuple):
    """The axes of a tile, of the grid and of the loop of a program.

    A tile is [BM, BN]; its columns are the axis in which y is contiguous. ``outer`` are the other kept axes,
    ``depth`` the other reduced ones, each padded to three. ``splits`` programs share the sum of one result.
    """

    rows: Axis
    columns: Axis
    outer: tuple[Axis, ...]
    depth: tuple[Axis, ...]
    BM: int
    BN: int
    splits: int

    def strides(self, operand: int) -> tuple[int, int, Strides, Strides]:
        """Strides of one operand: row, column, outer axes, depth axes."""
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
        """Programs per split."""
        tiles = _tiles(self.rows, self.BM, False) * _tiles(self.columns, self.BN, False)
        return math.prod(axis.size for axis in self.outer) * tiles

    @property
    def steps(self) -> int:
        """Tiles summed into one result."""
        tiles = _tiles(self.rows, self.BM, True) * _tiles(self.columns, self.BN, True)
        return math.prod(axis.size for axis in self.depth) * tiles


def _tiles(axis: Axis, block: int, reduced: bool) -> int:
    return -(-axis.size // block) if axis.reduced == reduced else 1


def collapse(shape: Sequence[int], operands: Sequence[Strides], reduced: Sequence[bool]) -> list[Axis]:
    """The axes in the memory order of the first operand, which is dense; the last is the fastest.

    Adjacent axes are merged if they are contiguous in every operand and both kept or both reduced.
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


# Bytes of a tile: 32 of each operand per thread (of 128), which is two 16-byte loads in flight.
TILE_BYTES, WARPS = 4096, 4
# With fewer programs than a large GPU holds at once (8 on each of 132 multiprocessors), tiles shrink to as
# little as a quarter and sums are split. The interpreter runs programs one by one, in milliseconds each.
FEW_PROGRAMS = 8 if interpreting() else 1024
# Minimum tiles per split, so that partial sums, in float32, are a small part of the traffic.
STEPS_OF_A_SPLIT = 4
# Maximum columns of a tile where rows share a scale, so that one activation serves several rows.
SHARED_COLUMNS = 512


@lru_cache(maxsize=4096)
def tiling(
    shape: tuple[int, ...], operands: tuple[Strides, ...], reduced: tuple[bool, ...], itemsize: int
) -> Tiling | None:
    """The tiling of these operands; None if kept and reduced axes are more than the kernels support."""
    axes = collapse(shape, operands, reduced)
    unit = Axis(1, (0,) * len(operands), False)
    columns = axes.pop() if axes else unit
    # One of rows and columns is reduced if possible, so that it is summed within the tile.
    other = [axis for axis in axes if axis.reduced != columns.reduced]
    rows = other[-1] if other else (axes[-1] if axes else unit._replace(reduced=columns.reduced))
    axes = [axis for axis in axes if axis is not rows]
    outer, depth = ([axis for axis in axes if axis.reduced == kind] for kind in (False, True))
    if max(len(outer), len(depth)) > MAX_AXES:
        return None
    outer, depth = ([unit] * (MAX_AXES - len(kind)) + kind for kind in (outer, depth))
    result = Tiling(rows, columns, tuple(outer), tuple(depth), BM=1, BN=1, splits=1)
    elements = total = TILE_BYTES // itemsize
    while elements >= total // 4:
        result = _with_tile(result, elements)
        if result.programs * result.steps >= FEW_PROGRAMS:
            break
        elements //= 2
    splits = max(1, min(result.steps // STEPS_OF_A_SPLIT, FEW_PROGRAMS // result.programs))
    return result._replace(splits=splits)


def _with_tile(tiling: Tiling, elements: int) -> Tiling:
    shared = tiling.rows.size > 1 and any(stride == 0 for stride in tiling.rows.strides)
    most = min(elements, SHARED_COLUMNS) if shared else elements
    most = min(most, _power(tiling.columns.size))
    # The widest block among those with about the least padding. A long axis has little with any block, so its
    # block does not change with every size.
    blocks = (most, most // 2 or 1, most // 4 or 1)
    covered = {block: -(-tiling.columns.size // block) * block for block in blocks}
    BN = max(block for block, padded in covered.items() if 16 * padded <= 17 * min(covered.values()))
    return tiling._replace(BM=min(elements // BN, _power(tiling.rows.size)), BN=BN)


def _power(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()
