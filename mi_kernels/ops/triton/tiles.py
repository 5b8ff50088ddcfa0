"""Which tile a kernel runs with: a table of measured choices, else a heuristic. Nothing is tuned on a call.

`choose` is a pure function of a :class:`Problem`. ``TABLE`` is a part of the package, empty until someone has
measured and committed it. Before it come the choices that ``python -m mi_kernels tune`` wrote for the user
(``user_files.table``), if nobody else could have. Every choice, from wherever, passes :func:`valid`.
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
# Stands for every GPU of AMD: 64 KiB of shared memory, one stage.
AMD = (7, 5)
# Shared memory of a thread block in bytes, and multiprocessors of the largest part, by compute capability.
_SHARED = {AMD: 64 << 10, (8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
_SHARED_ELSEWHERE = 99 << 10
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}
_MULTIPROCESSORS_ELSEWHERE = 128
MAX_SPLITS = 32
MAX_STAGES = 8
LARGEST_BLOCK = 256  # for which host.WIDE_STRIDE keeps offsets within a tile in int32
STEPS_OF_A_SPLIT = 8  # loop turns below which a part is all start and end
FEW = 1 << 21  # elements of partial sums that stay in an L2 cache


@dataclass(frozen=True)
class Problem:
    """A kernel call as far as its tile depends on it.

    Attributes:
        primitive: ``"forward"`` (with W), ``"linear"`` (without), ``"sum"`` (of partial sums alone),
            ``"input_grads"`` (dx and dz), ``"context_grad"`` (dz alone), ``"weight_grad"`` (dW) or
            ``"matrix_grad"`` (dU, dV).
        dtype: of the operands.
        precision: ``"ieee"`` or ``"tf32"``, of float32 operands.
        capability: of the device; (8, 0) stands for the interpreter.
        old: whether Triton is older than 3.9.
        aligned: whether tiles of all operands are read 16 bytes at a time (host.readable).
        batch: products that run side by side (groups, and i of dW).
        rows, columns: of the result.
        context, depth: lengths I and K of the sums.
        second: whether a second product, the shift, runs beside the first.
        gated: whether an activation and its factor follow the sum.
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
        """The entry of the table: sizes count by the next power of two, and whether operands are aligned."""
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
class Tile:
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


def styles(problem: Problem) -> tuple[str, ...]:
    """Styles that compute a problem, the preferred one first."""
    if problem.primitive != "forward":
        return _STYLES[problem.primitive]
    # z x leaves the range of float16 though the sum need not. In float32 a sum of sums rounds less.
    if problem.dtype in (torch.float16, torch.float32):
        return ("promoted",)
    # A tile that stays pays where enough products follow it.
    return ("held", "scaled", "promoted") if problem.context >= 16 else ("scaled", "promoted")


def valid(tile: Tile, problem: Problem) -> bool:
    """Whether a tile can run a problem: numbers, style, registers, shared memory and the Hopper hazard."""
    if not sound(tile) or tile.style not in styles(problem):
        return False
    return (
        registers(tile, problem) <= 255
        and not _spills(tile, problem)
        and shared_memory(tile, problem) <= available_shared_memory(problem.capability)
        and not _hazard(tile, problem)
    )


def sound(tile: Tile) -> bool:
    """Whether a tile is one at all: blocks of powers of two, warps and stages that candidates have."""
    blocks = all(
        16 <= size <= LARGEST_BLOCK and size & (size - 1) == 0 for size in (tile.BM, tile.BN, tile.BK)
    )
    known = any(tile.style in names for names in (*_STYLES.values(), ("held", "scaled")))
    return blocks and known and tile.warps in (4, 8) and 1 <= tile.stages <= MAX_STAGES


def _spills(tile: Tile, problem: Problem) -> bool:
    """What the estimate of registers does not see, known from compiling ahead of time."""
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
        # On 10.0 the sum over outputs beside that of V leaves no registers for deep tiles.
        mma = problem.capability not in ((9, 0), (10, 0))
        if problem.capability == (10, 0) and size >= 128 * 128 and tile.BK > 32:
            return True
        return size > (64 * 64 if mma and item == 2 else 64 * 128 if mma or item == 4 else 128 * 128)
    widened = problem.dtype in (torch.float16, torch.float32)
    return widened and problem.capability[0] == 12 and size > 128 * 64


def _wide_spills(problem: Problem) -> bool:
    # Partial sums and an activation take as many registers as the sum itself: up to 1100 bytes are spilled.
    # Beside a generated operand mma spills up to 430.
    mma = problem.capability not in ((9, 0), (10, 0))
    return problem.gated or problem.primitive == "linear" or mma and problem.primitive != "matrix_grad"


def _linear_spills(tile: Tile, problem: Problem) -> bool:
    # ptxas gives up a few registers where it sees room for one more thread block.
    size, four, item = tile.BM * tile.BN, tile.warps == 4, problem.dtype.itemsize
    deep = tile.stages > 2
    if problem.capability == (9, 0):
        return tile.BM == 16 and tile.BN >= 128 and four and deep
    if not problem.aligned:
        return problem.capability[0] in (10, 12) and (size > 64 * 32 or item == 4 and deep)
    large = problem.capability[0] == 12 and size >= 128 * 64
    return large and (four or problem.dtype != torch.bfloat16 and tile.BK * item > 64)


def available_shared_memory(capability: tuple[int, int]) -> int:
    """Bytes that a thread block can have."""
    return _SHARED.get(capability, _SHARED_ELSEWHERE)


def _hazard(tile: Tile, problem: Problem) -> bool:
    # Triton before 3.9 overwrites the registers of an operand that a wgmma still reads (triton issue 9433).
    scaled = tile.style in ("scaled", "held", "k_scaled")
    return scaled and problem.old and problem.capability == (9, 0) and tile.stages > 1


# Tiles of results that a program holds beside the operands, where it is not one and one more for promotion.
_ACCUMULATORS = {"input_grads": 3, "context_grad": 2}


def registers(tile: Tile, problem: Problem) -> int:
    """An estimate of registers per thread from above: accumulators, generated operand, addresses."""
    words = 2 if problem.dtype == torch.float64 else 1
    accumulators = _ACCUMULATORS.get(problem.primitive, 1 + problem.second + (tile.style == "promoted"))
    operand = tile.BM * tile.BK * problem.dtype.itemsize // 4
    if tile.style == "held":
        operand *= 2
    elif tile.style not in ("scaled", "k_scaled"):
        operand = 0
    threads = 32 * tile.warps
    return (accumulators * words * tile.BM * tile.BN + operand) // threads + 48


def shared_memory(tile: Tile, problem: Problem) -> int:
    """Bytes of the pipeline's buffers."""
    left = 0 if tile.style == "held" else tile.BM
    right = tile.BN * (2 if problem.second else 1)
    item = 4 if _widened(problem) else problem.dtype.itemsize
    buffers = (left + right) * tile.BK * problem.dtype.itemsize * max(tile.stages, 1)
    return buffers + (tile.BM + tile.BN) * tile.BK * item


def _widened(problem: Problem) -> bool:
    return problem.primitive == "weight_grad" and problem.dtype == torch.float16


def _on_tensor_cores(problem: Problem) -> bool:
    return problem.dtype != torch.float32 or problem.precision == "tf32"


def candidates(problem: Problem) -> Iterator[Tile]:
    """Valid tiles worth trying, the heuristic's own first: what a tuner measures."""
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


def _shaped(problem: Problem, most_rows: int, most_columns: int) -> Tile:
    """A tile of at most this size that is not much larger than the problem."""
    rows = min(max(_power(problem.rows), 16), most_rows)
    columns = min(max(_power(problem.columns), 16), most_columns)
    deepest = 128 // problem.dtype.itemsize if _on_tensor_cores(problem) else 16
    depth = max(min(_power(problem.depth), deepest), 16)
    warps = 8 if rows * columns >= 128 * 128 else 4
    return Tile(rows, columns, depth, warps, 3 if problem.capability >= (8, 0) else 1, styles(problem)[0])


def _heuristic(problem: Problem) -> Tile:
    if not _on_tensor_cores(problem) or problem.dtype == torch.float64:
        # Before 9.0 the sums of 64x64 and their sums spill.
        narrow = problem.dtype == torch.float32 and problem.capability < (9, 0)
        tile = _shaped(problem, 64, 32 if narrow and styles(problem) == ("promoted",) else 64)
        return _fitted(problem, replace(tile, stages=2, warps=8 if tile.BM * tile.BN == 64 * 64 else 4))
    if problem.primitive == "sum":
        return replace(_shaped(problem, 32, 128), stages=1)
    if not problem.aligned:  # every element is loaded by itself, and has an address of its own
        tile = _shaped(problem, 64, 32 if problem.second else 64)
        depth = min(tile.BK, 64 // problem.dtype.itemsize)
        style = styles(problem)[0]
        # A generated operand of twice this depth, and sums of sums with four warps, take 254 registers or
        # spill; so does a widened operand. Eight warps have 128 each, which dz alone exceeds.
        if style in ("held", "scaled"):
            depth = 16
        widened = style == "k_scaled" and problem.dtype != torch.bfloat16
        much = widened or style == "promoted" and problem.primitive != "context_grad"
        eight = much and tile.BM * tile.BN == 64 * 64
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


def _fitted(problem: Problem, tile: Tile) -> Tile:
    """The nearest valid tile: another style before fewer stages, fewer stages before a smaller tile."""
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
def table() -> dict[str, Tile]:
    """The measured choices by key: those of the package, and the user's in front of them."""
    found, reason = own()
    if reason is not None:
        warnings.warn(f"mi_kernels: the table of `tune` is not used: {reason}", RuntimeWarning, stacklevel=2)
    return (read(TABLE) if TABLE.exists() else {}) | found


def own() -> tuple[dict[str, Tile], str | None]:
    """The choices that `tune` wrote for this user; and why they do not count, where they do not."""
    try:
        path = user_files.table()
        if not path.exists():
            return {}, None
        reason = user_files.distrust(path)
        return ({}, reason) if reason is not None else (read(path), None)
    except (OSError, ValueError) as error:
        return {}, str(error)
    except RuntimeError:  # there is no place for it
        return {}, None


def read(path: Path) -> dict[str, Tile]:
    """The choices in a file that `written` made. ValueError names the file, and the entry, that it is not."""
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no table of tiles: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is no table of tiles: expected an object, got {entries!r:.100}")
    return {key: _tile(entry, f"{path}, entry {key!r}") for key, entry in entries.items()}


def _tile(entry: Any, where: str) -> Tile:
    types = {field.name: str if field.name == "style" else int for field in fields(Tile)}
    if not isinstance(entry, dict) or {name: type(value) for name, value in entry.items()} != types:
        raise ValueError(f"{where}: expected {', '.join(types)}, got {entry!r:.200}")
    tile = Tile(**entry)
    if not sound(tile):
        raise ValueError(f"{where}: there is no {tile}")
    return tile


def written(choices: dict[str, Tile]) -> str:
    """The text of a table."""
    return json.dumps({key: asdict(tile) for key, tile in sorted(choices.items())}, indent=1) + "\n"


@contextlib.contextmanager
def using(choices: dict[str, Tile]) -> Iterator[None]:
    """With other choices in front of the table's, for a tuner and for tests."""
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
def choose(problem: Problem) -> Tile:
    """The tile of a problem: the table's, if it has a valid one, else the heuristic's."""
    tile = table().get(problem.key)
    if tile is not None and valid(tile, problem):
        return tile
    return _heuristic(problem)


def splits(problem: Problem, tile: Tile) -> int:
    """Into how many parts the sum over i (of dW: over rows of the batch) is split, to occupy the device.

    The parts are added in a fixed order. How a row of y is summed depends on the number of rows through this.
    """
    programs = problem.batch * -(-problem.rows // tile.BM) * -(-problem.columns // tile.BN)
    turns = -(-problem.depth // tile.BK) * problem.context
    over_rows = problem.primitive in ("weight_grad", "matrix_grad")
    length = turns if over_rows else problem.context
    # Beyond what is small anyway, partial sums must not grow to what the fused form spares: B*Z*X, B*O*X.
    room = FEW // max(problem.batch * problem.rows * problem.columns, 1)
    if not over_rows:
        context, depth, columns = problem.context, problem.depth, max(problem.columns, 1)
        room = max(room, min(context, depth, context * depth // columns) // 4)
    most = min(
        problem.multiprocessors // max(programs, 1), MAX_SPLITS, turns // STEPS_OF_A_SPLIT, length, room
    )
    each = -(-length // max(most, 1))
    return -(-length // each) if each else 1
