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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mi_kernels.ops import user_files

TABLE = Path(__file__).with_name("table.json")
# Placeholder for all AMD GPUs: 64 KiB of shared memory, one stage.
AMD = (7, 5)
# Shared memory of a thread block in bytes, and multiprocessors of the largest GPU, by compute capability.
_SHARED = {AMD: 64 << 10, (8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
_SHARED_ELSEWHERE = 99 << 10
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}
_MULTIPROCESSORS_ELSEWHERE = 128
MAX_SPLITS = 32
MAX_STAGES = 8
LARGEST_BLOCK = 256  # host.WIDE_STRIDE relies on it to keep offsets within a tile in int32
STEPS_OF_A_SPLIT = 8  # minimum loop steps per split: below, prologue and epilogue dominate
L2_ELEMENTS = 1 << 21  # elements of partial sums that stay in an L2 cache


@dataclass(frozen=True)
class GemmProblem:
    """The properties of a kernel call that its tile depends on.

    Attributes:
        primitive: ``"forward"`` (with W), ``"linear"`` (without), ``"sum"`` (of partial sums alone),
            ``"input_grads"`` (dx and dz), ``"context_grad"`` (dz alone), ``"weight_grad"`` (dW) or
            ``"matrix_grad"`` (dU, dV).
        dtype: of the operands.
        precision: ``"ieee"`` or ``"tf32"``, of float32 operands.
        capability: of the device; (8, 0) for the interpreter.
        old: whether Triton is older than 3.9.
        aligned: whether tiles of all operands are loaded 16 bytes at a time (host.vectorizable).
        batch: number of independent products (groups, and i of dW).
        rows, columns: of the result.
        context, depth: lengths I and K of the sums.
        second: whether a second product, the shift, is computed along with the first.
        gated: whether the epilogue has an activation and its factor.
    """

    primitive: str
    dtype: torch.dtype
    precision: str
    capability: tuple[int, int]
    old: bool
    aligned: bool
    batch: int
    rows: int
    columns: int
    context: int
    depth: int
    second: bool = False
    gated: bool = False

    @property
    def key(self) -> str:
        """The key in the table: sizes rounded up to powers of two, and whether operands are aligned."""
        major, minor = self.capability
        sizes = (self.batch, self.rows, self.columns, self.context, self.depth)
        dtype = str(self.dtype).removeprefix("torch.")
        kind = self.primitive + "+shift" * self.second + "+gate" * self.gated
        kind += "" if self.aligned else " unaligned"
        return f"sm{major}{minor} {kind} {dtype} {self.precision} " + "x".join(str(_power(s)) for s in sizes)

    @property
    def multiprocessors(self) -> int:
        return _MULTIPROCESSORS.get(self.capability, _MULTIPROCESSORS_ELSEWHERE)


@dataclass(frozen=True)
class TileConfig:
    """Blocks of the result (BM, BN) and of the sum (BK), warps, pipeline stages and style (engine.py)."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    style: str


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


_STYLES = {
    "linear": ("plain",),
    "sum": ("plain",),
    "matrix_grad": ("plain",),
    "weight_grad": ("k_scaled",),
    "input_grads": ("promoted",),
    "context_grad": ("promoted",),
}


def styles(problem: GemmProblem) -> tuple[str, ...]:
    """Styles that can compute a problem, the preferred one first."""
    if problem.primitive != "forward":
        return _STYLES[problem.primitive]
    # z x may overflow float16 though the sum does not. In float32 a sum of sums rounds less.
    if problem.dtype in (torch.float16, torch.float32):
        return ("promoted",)
    # Holding a tile in registers pays off if it is used for enough i.
    return ("held", "scaled", "promoted") if problem.context >= 16 else ("scaled", "promoted")


def valid(tile: TileConfig, problem: GemmProblem) -> bool:
    """Whether a tile can run a problem: blocks, style, registers, shared memory and the Hopper hazard."""
    if not is_well_formed(tile) or tile.style not in styles(problem):
        return False
    return (
        registers(tile, problem) <= 255
        and not _spills(tile, problem)
        and shared_memory(tile, problem) <= available_shared_memory(problem.capability)
        and not _hazard(tile, problem)
    )


def is_well_formed(tile: TileConfig) -> bool:
    """Whether block sizes are powers of two and warps, stages and style are known values."""
    blocks = all(
        16 <= size <= LARGEST_BLOCK and size & (size - 1) == 0 for size in (tile.BM, tile.BN, tile.BK)
    )
    known = any(tile.style in names for names in (*_STYLES.values(), ("held", "scaled")))
    return blocks and known and tile.warps in (4, 8) and 1 <= tile.stages <= MAX_STAGES


def _spills(tile: TileConfig, problem: GemmProblem) -> bool:
    """Spills that the estimate of registers misses, known from ahead-of-time compilation."""
    size, item = tile.BM * tile.BN, problem.dtype.itemsize
    if not _on_tensor_cores(problem) or problem.dtype == torch.float64:
        return False
    if size > 128 * 128 and _wide_spills(problem):
        return True
    if problem.gated and problem.capability[0] == 12 and size >= 128 * 128 and tile.stages > 2:
        return True
    if problem.primitive == "linear" and _linear_spills(tile, problem):
        return True
    if not problem.aligned and problem.primitive != "sum":
        return size > 64 * 64 or tile.BK * item > 64
    if problem.primitive == "input_grads":
        # At 128x128 mma spills 18 registers, and tf32 spills everywhere; 16 bits spill at 64x128 on mma.
        # On 10.0 the sum over outputs along with that of V leaves no registers for deep tiles.
        mma = problem.capability not in ((9, 0), (10, 0))
        if problem.capability == (10, 0) and size >= 128 * 128 and tile.BK > 32:
            return True
        return size > (64 * 64 if mma and item == 2 else 64 * 128 if mma or item == 4 else 128 * 128)
    widened = problem.dtype in (torch.float16, torch.float32)
    return widened and problem.capability[0] == 12 and size > 128 * 64


def _wide_spills(problem: GemmProblem) -> bool:
    # Partial sums and an activation need as many registers as the sum itself: up to 1100 bytes are spilled.
    # With a generated operand mma spills up to 430.
    mma = problem.capability not in ((9, 0), (10, 0))
    return problem.gated or problem.primitive == "linear" or mma and problem.primitive != "matrix_grad"


def _linear_spills(tile: TileConfig, problem: GemmProblem) -> bool:
    # ptxas spills a few registers to fit one more thread block.
    size, four, item = tile.BM * tile.BN, tile.warps == 4, problem.dtype.itemsize
    deep = tile.stages > 2
    if problem.capability == (9, 0):
        return tile.BM == 16 and tile.BN >= 128 and four and deep
    if not problem.aligned:
        return problem.capability[0] in (10, 12) and (size > 64 * 32 or item == 4 and deep)
    large = problem.capability[0] == 12 and size >= 128 * 64
    return large and (four or problem.dtype != torch.bfloat16 and tile.BK * item > 64)


def available_shared_memory(capability: tuple[int, int]) -> int:
    """Maximum bytes of a thread block."""
    return _SHARED.get(capability, _SHARED_ELSEWHERE)


def _hazard(tile: TileConfig, problem: GemmProblem) -> bool:
    # Triton before 3.9 overwrites operand registers while a wgmma still reads them (triton issue 9433).
    scaled = tile.style in ("scaled", "held", "k_scaled")
    return scaled and problem.old and problem.capability == (9, 0) and tile.stages > 1


# Accumulator tiles of a program; for other primitives one, and one more if promoted.
_ACCUMULATORS = {"input_grads": 3, "context_grad": 2}


def registers(tile: TileConfig, problem: GemmProblem) -> int:
    """An upper estimate of registers per thread: accumulators, generated operand, addresses."""
    registers_each = 2 if problem.dtype == torch.float64 else 1
    accumulators = _ACCUMULATORS.get(problem.primitive, 1 + problem.second + (tile.style == "promoted"))
    operand = tile.BM * tile.BK * problem.dtype.itemsize // 4
    if tile.style == "held":
        operand *= 2
    elif tile.style not in ("scaled", "k_scaled"):
        operand = 0
    threads = 32 * tile.warps
    return (accumulators * registers_each * tile.BM * tile.BN + operand) // threads + 48


def shared_memory(tile: TileConfig, problem: GemmProblem) -> int:
    """Bytes of the pipeline buffers."""
    left = 0 if tile.style == "held" else tile.BM
    right = tile.BN * (2 if problem.second else 1)
    item = 4 if _widened(problem) else problem.dtype.itemsize
    buffers = (left + right) * tile.BK * problem.dtype.itemsize * max(tile.stages, 1)
    return buffers + (tile.BM + tile.BN) * tile.BK * item


def _widened(problem: GemmProblem) -> bool:
    return problem.primitive == "weight_grad" and problem.dtype == torch.float16


def _on_tensor_cores(problem: GemmProblem) -> bool:
    return problem.dtype != torch.float32 or problem.precision == "tf32"


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
    rows = min(max(_power(problem.rows), 16), max_rows)
    columns = min(max(_power(problem.columns), 16), max_columns)
    deepest = 128 // problem.dtype.itemsize if _on_tensor_cores(problem) else 16
    depth = max(min(_power(problem.depth), deepest), 16)
    warps = 8 if rows * columns >= 128 * 128 else 4
    return TileConfig(
        rows, columns, depth, warps, 3 if problem.capability >= (8, 0) else 1, styles(problem)[0]
    )


def _heuristic(problem: GemmProblem) -> TileConfig:
    if not _on_tensor_cores(problem) or problem.dtype == torch.float64:
        # Before 9.0 the accumulators of 64x64 and their partial sums spill.
        narrow = problem.dtype == torch.float32 and problem.capability < (9, 0)
        tile = _shaped(problem, 64, 32 if narrow and styles(problem) == ("promoted",) else 64)
        return _fitted(problem, replace(tile, stages=2, warps=8 if tile.BM * tile.BN == 64 * 64 else 4))
    if problem.primitive == "sum":
        return replace(_shaped(problem, 32, 128), stages=1)
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
