"""A call of the family norm: x's sizes, its operands beside it, and what both directions launch alike."""

from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype
from ..norm.layout import result_like
from . import norm_tiling as tiling
from .launch import cdiv, launch

Maybe = Tensor | None


class Problem:
    """x's sizes, and operands beside it."""

    def __init__(self, x: Tensor, dim: int, groups: int) -> None:
        self.x, self.dim, self.groups = x, dim, groups
        self.lead = (*x.shape[:dim], groups)
        self.sets = torch.Size(self.lead).numel()
        self.channels = x.shape[dim] // groups
        self.space = torch.Size(x.shape[dim + 1 :]).numel()
        self.wide = accumulation_dtype(x.dtype)

    def flat(self, tensor: Maybe) -> Maybe:
        """The tensor, or a copy if the positions in it are more than one axis."""
        if tensor is None or tiling.is_flat(tensor, self.dim):
            return tensor
        return result_like(self.x, self.dim).copy_(tensor)

    def layout(self, tensor: Maybe) -> tiling.Layout:
        return tiling.layout(tensor, self.x.shape, self.dim, self.groups)

    def statistics(self) -> tiling.Layout:
        strides, step = [], 1
        for size in reversed(self.lead):
            strides.append(step)
            step *= size
        return tiling.Layout(tuple(reversed(strides)), 0, 0)

    def most(self, half: bool) -> int:
        return tiling.most_elements(self.wide.itemsize, half)

    def warps(self, BM: int, BN: int, backward: bool) -> int:
        return tiling.warps(BM * BN, self.wide.itemsize, backward)

    def axes(
        self, layouts: dict[str, tiling.Layout], looped: tuple[bool, ...] | None, rows: bool
    ) -> tiling.Sets | None:
        strides = tuple(one.lead for one in layouts.values())
        return tiling.sets(self.lead, (self.statistics().lead, *strides), looped, rows)

    def strides(
        self, axes: tiling.Sets, layouts: dict[str, tiling.Layout], by_rows: bool | None
    ) -> dict[str, Any]:
        """The arguments ``*_strides``; of maps, ``by_rows`` says whether the channels are rows."""
        found = {}
        for index, (name, one) in enumerate(layouts.items(), 1):
            row, _, outer, depth = axes.strides(index, 0)
            pair = (row, one.channel) if by_rows is None else (one.space, one.channel)
            found[f"{name}_strides"] = (*(pair[::-1] if by_rows else pair), outer, depth)
        return found


def _by_row(axes: tiling.Sets, layouts: dict[str, tiling.Layout], names: tuple[str, ...]) -> bool:
    """Whether one of the operands varies over the rows of a tile."""
    return any(axes.rows.strides[i] for i, name in enumerate(layouts, 1) if name in names)


def launch_rows(
    problem: Problem,
    axes: tiling.Sets,
    kernel: Any,
    arguments: dict[str, Any],
    layouts: dict[str, tiling.Layout],
    most: int | None = None,
) -> None:
    """A kernel whose programs have a few rows each; of ``most`` columns at a time."""
    rows, columns = axes.rows.size, problem.channels
    others = problem.sets // rows
    BM, BN = tiling.row_tile(rows, others, min(columns, most or columns), problem.most(False) // 4)
    arguments = {
        **arguments,
        **problem.strides(axes, layouts, None),
        **{"M": rows, "N": columns, "BM": BM, "BN": BN},
        "CONTEXT_BY_ROW": _by_row(axes, layouts, ("gate", "scale", "shift")),
        "WEIGHT_BY_ROW": _by_row(axes, layouts, ("weight", "bias")),
    }
    launch(
        problem.x.device,
        kernel,
        cdiv(rows, BM) * others,
        arguments,
        problem.warps(BM, BN, most is not None),
        1,
    )


def map_tiles(problem: Problem, y: tiling.Layout) -> tuple[dict[str, Any], bool, int, int]:
    """A tile's constants, whether it is a set, and how many tiles a set has along rows and columns."""
    # Where the positions are contiguous, they are the columns of a tile.
    by_rows = y.space == 1 and problem.space > 1
    M, N = (problem.channels, problem.space) if by_rows else (problem.space, problem.channels)
    BM, BN, whole = tiling.set_tile(M, N, problem.most(True))
    constants = {"M": M, "N": N, "BM": BM, "BN": BN, "CHANNELS_ARE_ROWS": by_rows, "sets": problem.sets}
    return constants, whole, cdiv(M, BM), cdiv(N, BN)
