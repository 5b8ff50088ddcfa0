"""What a tile may be: the problem it is for, its registers, its shared memory, known spills and hazards."""

from dataclasses import dataclass

import torch

# Placeholder for all AMD GPUs: 64 KiB of shared memory, one stage.
AMD = (7, 5)
# Shared memory of a thread block in bytes, and multiprocessors of the largest GPU, by compute capability.
_SHARED = {AMD: 64 << 10, (8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
_SHARED_ELSEWHERE = 99 << 10
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}
_MULTIPROCESSORS_ELSEWHERE = 128
MAX_STAGES = 8
LARGEST_BLOCK = 256  # host.WIDE_STRIDE relies on it to keep offsets within a tile in int32


@dataclass(frozen=True)
class GemmProblem:
    """The properties of a kernel call that its tile depends on.

    Attributes:
        primitive: ``"forward"`` (with W), ``"linear"`` (without), ``"sum"`` (of partial sums alone),
            ``"input_grads"`` (dx and dz), ``"context_grad"`` (dz alone), ``"weight_grad"`` (dW),
            ``"matrix_grad"`` (dU, dV) or ``"dual_linear"`` (two products, whose epilogue multiplies them).
        dtype: of the operands.
        precision: ``"ieee"`` or ``"tf32"``, of float32 operands.
        capability: of the device; (8, 0) for the interpreter.
        old: whether Triton is older than 3.9.
        aligned: whether tiles of all operands are loaded 16 bytes at a time (host.vectorizable).
        batch: number of independent products (groups, and i of dW).
        rows, columns: of the result.
        context, depth: lengths I and K of the sums; of dual_linear its ranks, and the longer of both sums.
        second: whether a second product, of the same A operand, is computed along with the first.
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
        return f"sm{major}{minor} {kind} {dtype} {self.precision} " + "x".join(
            str(next_power(s)) for s in sizes
        )

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


def next_power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


_STYLES = {
    "linear": ("plain",),
    "sum": ("plain",),
    "dual_linear": ("plain",),
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
    if not on_tensor_cores(problem) or problem.dtype == torch.float64:
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


def _accumulators(tile: TileConfig, problem: GemmProblem) -> int:
    """Accumulator tiles of a program."""
    if problem.primitive == "dual_linear":
        return 2 + (problem.context > 1)  # the sum over ranks
    known = {"input_grads": 3, "context_grad": 2}
    return known.get(problem.primitive, 1 + problem.second + (tile.style == "promoted"))


def registers(tile: TileConfig, problem: GemmProblem) -> int:
    """An upper estimate of registers per thread: accumulators, generated operand, addresses."""
    registers_each = 2 if problem.dtype == torch.float64 else 1
    accumulators = _accumulators(tile, problem)
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


def on_tensor_cores(problem: GemmProblem) -> bool:
    return problem.dtype != torch.float32 or problem.precision == "tf32"
