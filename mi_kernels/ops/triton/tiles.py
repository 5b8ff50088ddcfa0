"""The choice of a kernel's tile: a table of measured choices, else a heuristic. Calls never autotune.

`choose` is a pure function of a :class:`GemmProblem`. ``TABLE`` is part of the package and empty until
measured choices are committed. The user's own choices, written by ``python -m mi_kernels tune``
(``user_files.table``), have precedence if that file is trusted. Every choice must pass :func:`valid`.
"""

import contextlib
import functools
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import user_files
from .tile_limits import (
    GemmProblem,
    TileConfig,
    is_well_formed,
    next_power,
    on_tensor_cores,
    styles,
    valid,
)

TABLE = Path(__file__).with_name("table.json")
MAX_SPLITS = 32
STEPS_OF_A_SPLIT = 8  # minimum loop steps per split: below, prologue and epilogue dominate
L2_ELEMENTS = 1 << 21  # elements of partial sums that stay in an L2 cache


def candidates(problem: GemmProblem) -> Iterator[TileConfig]:
    """Valid tiles for the tuner to measure, that of the heuristic first."""
    seen = set()
    blocks = (
        (128, 128),
        (128, 256),
        (64, 256),
        (128, 64),
        (64, 128),
        (64, 64),
        (32, 64),
        (16, 64),
        (16, 128),
    )
    for tile in (_heuristic(problem), *(_shaped(problem, *block) for block in blocks)):
        for style in (tile.style, *styles(problem)):
            for warps in (tile.warps, 4, 8):
                for stages in (tile.stages, 1, 2, 3, 4):
                    for depth in (tile.BK, 2 * tile.BK, tile.BK // 2):
                        other = replace(tile, style=style, warps=warps, stages=stages, BK=depth)
                        if depth >= 16 and other not in seen and valid(other, problem):
                            seen.add(other)
                            yield other


def _shaped(problem: GemmProblem, max_rows: int, max_columns: int) -> TileConfig:
    """A tile of at most this size, not much larger than the problem."""
    rows = min(max(next_power(problem.rows), 16), max_rows)
    columns = min(max(next_power(problem.columns), 16), max_columns)
    deepest = 128 // problem.dtype.itemsize if on_tensor_cores(problem) else 16
    depth = max(min(next_power(problem.depth), deepest), 16)
    warps = 8 if rows * columns >= 128 * 128 else 4
    return TileConfig(
        rows, columns, depth, warps, 3 if problem.capability >= (8, 0) else 1, styles(problem)[0]
    )


def _heuristic(problem: GemmProblem) -> TileConfig:
    if not on_tensor_cores(problem) or problem.dtype == torch.float64:
        # Before 9.0 the accumulators of 64x64 and their partial sums spill.
        narrow = problem.dtype == torch.float32 and problem.capability < (9, 0)
        tile = _shaped(problem, 64, 32 if narrow and styles(problem) == ("promoted",) else 64)
        return _fitted(problem, replace(tile, stages=2, warps=8 if tile.BM * tile.BN == 64 * 64 else 4))
    if problem.primitive == "sum":
        return replace(_shaped(problem, 32, 128), stages=1)
    if problem.primitive == "dual_linear":
        return _fitted(problem, _dual_linear(problem))
    if not problem.aligned:  # scalar loads: every element has its own address
        tile = _shaped(problem, 64, 32 if problem.second else 64)
        depth = min(tile.BK, 64 // problem.dtype.itemsize)
        style = styles(problem)[0]
        # A generated operand of twice this depth, and sums of sums with four warps, use 254 registers or
        # spill; so does a widened operand. Eight warps have 128 registers each, too few for dz alone.
        if style in ("held", "scaled"):
            depth = 16
        widened = style == "k_scaled" and problem.dtype != torch.bfloat16
        many_registers = widened or style == "promoted" and problem.primitive != "context_grad"
        eight = many_registers and tile.BM * tile.BN == 64 * 64
        return _fitted(problem, replace(tile, BK=max(depth, 16), warps=8 if eight else 4))
    if problem.second:
        tile = _shaped(problem, 128, 64)
        return _fitted(problem, replace(tile, warps=8) if tile.BM == 128 else tile)
    if problem.primitive == "input_grads":
        mma = problem.capability not in ((9, 0), (10, 0))
        if mma or problem.dtype == torch.float32:
            tile = _shaped(problem, 64, 64 if mma and problem.dtype.itemsize == 2 else 128)
            return _fitted(problem, replace(tile, warps=8) if tile.BM * tile.BN >= 64 * 64 else tile)
        tile = _shaped(problem, 128, 128)
        return _fitted(problem, replace(tile, BK=min(tile.BK, 32)) if problem.capability == (10, 0) else tile)
    if problem.dtype in (torch.float16, torch.float32) and problem.capability[0] == 12:
        tile = _shaped(problem, 128, 64)
        if problem.primitive == "linear":
            tile = replace(tile, BK=min(tile.BK, 64 // problem.dtype.itemsize))
        return _fitted(problem, replace(tile, warps=8) if tile.BM == 128 else tile)
    if problem.primitive == "linear" and problem.rows <= 16:  # V is read once: more programs read it
        return _fitted(problem, _shaped(problem, 16, 64))
    wide = problem.columns > 128 and problem.rows * problem.columns >= problem.multiprocessors * 128 * 256
    tile = _shaped(problem, 128, 256 if wide else 128)
    eight = problem.primitive == "linear" and problem.capability[0] == 12 and tile.BM * tile.BN >= 128 * 64
    return _fitted(problem, replace(tile, warps=8) if eight else tile)


def _dual_linear(problem: GemmProblem) -> TileConfig:
    """Two accumulators and, with ranks, their sum; small and shallow where others spill 8 to 48 bytes."""
    mma, summed = problem.capability not in ((9, 0), (10, 0)), problem.context > 1
    if not problem.aligned:
        tile = _shaped(problem, 32 if summed else 64, 32)
    elif problem.rows <= 16:  # more programs read the weights
        tile = _shaped(problem, 16, 32)
    elif summed:
        tile = _shaped(problem, 32 if mma else 64, 64)
    else:
        tile = _shaped(problem, 128, 64)
    item, eight = problem.dtype.itemsize, tile.BM == 128 or summed and tile.BM * tile.BN == 64 * 64
    few = problem.aligned and problem.rows <= 16
    if not problem.aligned or summed and mma and not few:
        tile = replace(tile, BK=max(min(tile.BK, 64 // item), 16))
    shallow = mma and not few and (summed or item == 4)
    return replace(tile, warps=8 if eight else 4, stages=2 if shallow else tile.stages)


def _fitted(problem: GemmProblem, tile: TileConfig) -> TileConfig:
    """The nearest valid tile: tries other styles first, then fewer stages, then smaller blocks."""
    while True:
        for stages in range(tile.stages, 0, -1):
            for style in styles(problem):
                other = replace(tile, stages=stages, style=style)
                if valid(other, problem):
                    return other
        if tile.BN > 16:
            tile = replace(tile, BN=tile.BN // 2)
        elif tile.BM > 16:
            tile = replace(tile, BM=tile.BM // 2)
        else:
            tile = replace(tile, BK=tile.BK // 2)


@functools.cache
def table() -> dict[str, TileConfig]:
    """The measured choices by key: the user's, then those of the package."""
    found, reason = user_table()
    if reason is not None:
        warnings.warn(f"mi_kernels: the table of `tune` is not used: {reason}", RuntimeWarning, stacklevel=2)
    return (read(TABLE) if TABLE.exists() else {}) | found


def user_table() -> tuple[dict[str, TileConfig], str | None]:
    """The choices that `tune` wrote for this user, and why they are not used, else None."""
    try:
        path = user_files.table()
        if not path.exists():
            return {}, None
        reason = user_files.distrust(path)
        return ({}, reason) if reason is not None else (read(path), None)
    except (OSError, ValueError) as error:
        return {}, str(error)
    except RuntimeError:  # there is no home directory
        return {}, None


def read(path: Path) -> dict[str, TileConfig]:
    """The choices in a file written with `to_json`. A ValueError names the file and the invalid entry."""
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no table of tiles: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is no table of tiles: expected an object, got {entries!r:.100}")
    return {key: _tile(entry, f"{path}, entry {key!r}") for key, entry in entries.items()}


def _tile(entry: Any, where: str) -> TileConfig:
    types = {field.name: str if field.name == "style" else int for field in fields(TileConfig)}
    if not isinstance(entry, dict) or {name: type(value) for name, value in entry.items()} != types:
        raise ValueError(f"{where}: expected {', '.join(types)}, got {entry!r:.200}")
    tile = TileConfig(**entry)
    if not is_well_formed(tile):
        raise ValueError(f"{where}: there is no {tile}")
    return tile


def to_json(choices: dict[str, TileConfig]) -> str:
    """The text of a table file."""
    return json.dumps({key: asdict(tile) for key, tile in sorted(choices.items())}, indent=1) + "\n"


@contextlib.contextmanager
def overriding(choices: dict[str, TileConfig]) -> Iterator[None]:
    """Override choices of the table, for the tuner and tests."""
    before = dict(table())
    table().update(choices)
    choose.cache_clear()
    try:
        yield
    finally:
        table().clear()
        table().update(before)
        choose.cache_clear()


@functools.lru_cache(maxsize=4096)
def choose(problem: GemmProblem) -> TileConfig:
    """The tile of a problem: a valid one of the table, else that of the heuristic."""
    tile = table().get(problem.key)
    if tile is not None and valid(tile, problem):
        return tile
    return _heuristic(problem)


def splits(problem: GemmProblem, tile: TileConfig) -> int:
    """The number of parts of the sum over i (for dW: over rows of the batch), to occupy the device.

    The parts are added in a fixed order. Through it the summation order of a row of y depends on the batch.
    """
    programs = problem.batch * -(-problem.rows // tile.BM) * -(-problem.columns // tile.BN)
    steps = -(-problem.depth // tile.BK) * problem.context
    over_rows = problem.primitive in ("weight_grad", "matrix_grad")
    length = steps if over_rows else problem.context
    # Unless they fit the L2 cache, partial sums must stay below what the fused form avoids: B*Z*X, B*O*X.
    room = L2_ELEMENTS // max(problem.batch * problem.rows * problem.columns, 1)
    if not over_rows:
        context, depth, columns = problem.context, problem.depth, max(problem.columns, 1)
        room = max(room, min(context, depth, context * depth // columns) // 4)
    most = min(
        problem.multiprocessors // max(programs, 1), MAX_SPLITS, steps // STEPS_OF_A_SPLIT, length, room
    )
    each = -(-length // max(most, 1))
    return -(-length // each) if each else 1
