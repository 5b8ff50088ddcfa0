"""The host code of the kernels: problems, tiles, splits, scratch and launches, for tensors of any strides.

Activations are [B, ..] or [G, B, ..], weights have the same leading dimension of groups or none. Scratch
comes from torch's allocator; it holds the partial sums of split programs, which are added in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..dtypes import accumulation_dtype
from ..precision import has_tf32, precision
from . import kernels
from .launch import cdiv, launch, operand, target
from .tile_limits import GemmProblem, TileConfig
from .tiles import choose, splits

Maybe = Tensor | None

_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}
# A sum over at most this many products leaves most of BK idle, so a longer axis is chosen for K.
SHORT = 8
# Partial sums of dz have an element per row, i and column tile. The batch is cut so that they fit.
PARTIAL_BYTES = 128 << 20
# 256 steps along each of two axes with smaller strides stay within int32.
WIDE_STRIDE = 1 << 22
# By operand, the indices (in its tuple) of the strides used within a tile; the others locate the tile.
_WITHIN = {"w": (2, 4), "dw": (3, 5), "dz": (3,)}
_WITHIN |= dict.fromkeys(("bias", "bias_x", "bias_z", "shift_bias"), (2,))
_WITHIN |= dict.fromkeys(("x", "z", "u", "v", "shift_weight", "gate", "g", "p", "q"), (2, 3))
_WITHIN |= dict.fromkeys(("y", "sums"), (-2, -1))


class GateEpilogue(NamedTuple):
    """The epilogue of a gate: (act(p) + s) * x + (C z + d)."""

    activation: str
    scale_offset: float
    x: Tensor
    shift_weight: Maybe
    shift_bias: Maybe
    keep: bool


def groups_of(tensor: Tensor) -> int:
    """G of activations [G, B, ..], or 1."""
    return tensor.shape[0] if tensor.dim() == 3 else 1


def nonempty(matrix: Maybe) -> Maybe:
    """The weight, or None if it has no elements: it may have no memory."""
    return None if matrix is None or 0 in matrix.shape else matrix


Sizes = tuple[int, int, int, int, int]  # G, M, N, I, K


def vectorizable(operand: Tensor, row: int = -2) -> bool:
    """Whether tiles of an operand are loaded 16 bytes at a time, along its last axis or the axis ``row``.

    Triton specialises integers on being 1 or divisible by 16 (in elements of any dtype), and pointers on
    16-byte alignment. Sizes matter because they bound the mask of a tile.
    """
    sizes = [operand.shape[axis] for axis in (row, -1) if operand.stride(axis) == 1]
    known = all(stride == 1 or stride % 16 == 0 for stride in operand.stride())
    return known and any(size % 16 == 0 for size in sizes) and operand.data_ptr() % 16 == 0


def gemm_problem(
    primitive: str,
    like: Tensor,
    sizes: Sizes,
    *matrices: Maybe,
    weight: Maybe = None,
    second: bool = False,
    gated: bool = False,
) -> GemmProblem:
    """The problem; ``matrices`` are the operands loaded as tiles (not z where it only scales)."""
    aligned = all(vectorizable(t) for t in matrices if t is not None)
    aligned = aligned and (weight is None or vectorizable(weight, -3))
    capability, old = target(like.device)
    kind = primitive, like.dtype, precision(like.dtype), capability, old, aligned
    return GemmProblem(*kind, *sizes, second, gated)


def constants(tile: TileConfig, dtype: torch.dtype, operands: dict[str, Any]) -> dict[str, Any]:
    # Operands of dW in float16 are widened (engine.k_scaled), exactly in the 11 bits of tf32.
    widened = tile.style == "k_scaled" and dtype == torch.float16
    strides = [operand[k] for name, operand in operands.items() if operand for k in _WITHIN[name]]
    return {
        "ACCUMULATE": _ACCUMULATE[accumulation_dtype(dtype)],
        "PRECISION": "tf32" if widened and has_tf32() else precision(dtype),
        "STYLE": tile.style,
        "INDEX": tl.int64 if max(strides) >= WIDE_STRIDE else tl.int32,
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
    }


def contraction(
    y: Tensor,  # [(G,) M, N]
    x: Tensor,  # [(G,) M, K]
    z: Tensor,  # [(G,) M, I]
    weight: Maybe = None,  # [(G,) N, I, K]
    weight_z: Maybe = None,  # [(G,) N, I]
    weight_x: Maybe = None,  # [(G,) N, K]
    bias: Maybe = None,  # [(G,) N]
    gate: GateEpilogue | None = None,
    sums: Maybe = None,  # [parts, G, M, N]
) -> Maybe:
    """Write y = z^T W x + U z + V x + c + sums, or its gate; returns p if the gate keeps it."""
    weight, weight_z, weight_x = map(nonempty, (weight, weight_z, weight_x))
    if weight is not None and x.shape[-1] <= SHORT < z.shape[-1]:
        x, z, weight, weight_z, weight_x = z, x, weight.mT, weight_x, weight_z
    p = torch.empty_like(y) if gate is not None and gate.keep else None
    sizes = groups_of(y), y.shape[-2], y.shape[-1], z.shape[-1], x.shape[-1]
    shift_weight = None if gate is None else nonempty(gate.shift_weight)
    terms = (weight_z, weight_x, shift_weight)
    # Operands of the plain products beside W.
    read = (*terms, None if weight_z is None else z, None if weight_x is None else x)
    tile = None
    if weight is not None:
        problem = gemm_problem("forward", x, sizes, x, *read, weight=weight, gated=gate is not None)
        tile = choose(problem)
        parts = splits(problem, tile)
        if y.shape[-1] <= SHORT < z.shape[-1]:
            sums, weight = fused_reduction(None, z, x, weight.movedim(-1, -3), x), None
        elif parts > 1:
            sums = y.new_empty(parts, *sizes[:3], dtype=accumulation_dtype(x.dtype))
            _interaction(tile, sizes, sums, x, z, weight, splits=parts)
            weight = None
    if weight is None:
        primitive = "sum" if all(term is None for term in terms) else "linear"
        tile = choose(gemm_problem(primitive, x, sizes, *read, second=shift_weight is not None))
    assert tile is not None
    _interaction(tile, sizes, y, x, z, weight, weight_z, weight_x, bias, p=p, gate=gate, sums=sums)
    return p


def fused_reduction(
    y: Maybe,  # [(G,) M, N], or [parts, G, M, N]
    x: Tensor,  # [(G,) M, K]
    z: Tensor,  # [(G,) M, I]; not used without y
    weight: Tensor,  # [(G,) N, I, K]
    partner: Tensor,  # [(G,) M, N]
    weight_x: Maybe = None,  # [(G,) N, K]
    result: Maybe = None,  # [(G,) M, I]
) -> Maybe:
    """dz[m, i] = sum_n partner[m, n] T[m, n, i] with T = sum_k W x, and y = sum_i z T + V x in the same pass.

    The sums are written to ``result``, if it is given and one column tile covers N; else partial sums, one
    per tile, are returned as [tiles, G, M, I]. If y is in parts, too, the caller that adds them adds V x.
    """
    count, (M, N), I, K = groups_of(x), partner.shape[-2:], weight.shape[-2], x.shape[-1]  # noqa: E741
    problem = _fused_problem(y is not None, x, partner, weight)
    tile = choose(problem)
    parts = y.shape[0] if y is not None and y.dim() == 4 else 1
    if y is None:
        parts, z = splits(problem, tile), x
    sums = None
    if result is None or N > tile.BN:
        # Rows are innermost, in the order in which a program writes them.
        sums = x.new_empty(cdiv(N, tile.BN), count, I, M, dtype=accumulation_dtype(x.dtype)).mT
    dz = result if sums is None else sums
    weight_x = nonempty(weight_x) if parts == 1 else None
    sizes = count, M, N, I, K
    _interaction(tile, sizes, y, x, z, weight, None, weight_x, partner=partner, dz=dz, splits=parts)
    return sums


def _fused_problem(both: bool, x: Tensor, partner: Tensor, weight: Tensor) -> GemmProblem:
    M, N = partner.shape[-2:]
    sizes = groups_of(x), M, N, weight.shape[-2], x.shape[-1]
    return gemm_problem("input_grads" if both else "context_grad", x, sizes, x, partner, weight=weight)


def fused_reduction_parts(x: Tensor, partner: Tensor, weight: Tensor) -> int:
    """The number of parts of y in `fused_reduction`."""
    problem = _fused_problem(True, x, partner, weight)
    return splits(problem, choose(problem))


def max_rows(x: Tensor, partner: Tensor, weight: Tensor) -> int:
    """Rows of one call of `fused_reduction` whose partial sums stay below ``PARTIAL_BYTES``."""
    tiles = cdiv(partner.shape[-1], choose(_fused_problem(True, x, partner, weight)).BN)
    row = tiles * groups_of(x) * weight.shape[-2] * accumulation_dtype(x.dtype).itemsize
    return max(PARTIAL_BYTES // row, 1)


def _interaction(
    tile: TileConfig,
    sizes: Sizes,
    y: Maybe,
    x: Tensor,
    z: Tensor,
    weight: Maybe = None,
    weight_z: Maybe = None,
    weight_x: Maybe = None,
    bias: Maybe = None,
    *,
    p: Maybe = None,
    gate: GateEpilogue | None = None,
    sums: Maybe = None,
    partner: Maybe = None,
    dz: Maybe = None,
    splits: int = 1,
) -> None:
    count, M, N, I, K = sizes  # noqa: E741
    operands = {
        "y": operand(y, 4),
        "x": operand(x, 3),
        "z": operand(z, 3),
        "w": operand(weight, 4),
        "u": operand(weight_z, 3),
        "v": operand(weight_x, 3),
        "bias": operand(bias, 2),
        "shift_weight": None if gate is None else operand(nonempty(gate.shift_weight), 3),
        "shift_bias": None if gate is None else operand(gate.shift_bias, 2),
        "sums": operand(sums, 4),
        "gate": operand(partner if gate is None else gate.x, 3),
        "dz": operand(dz, 4),
    }
    arguments = operands | {
        "p": p,
        "M": M,
        "N": N,
        "I": I,
        "K": K,
        "splits": splits,
        "parts": 0 if sums is None else sums.shape[0],
        "ACTIVATION": "identity" if gate is None else gate.activation,
        "scale_offset": 0.0 if gate is None else gate.scale_offset,
        **constants(tile, x.dtype, operands),
    }
    programs = count * splits * cdiv(M, tile.BM) * cdiv(N, tile.BN)
    launch(x.device, kernels.interaction, programs, arguments, tile.warps, tile.stages)


def weight_grad(
    dw: Tensor,  # [(G,) M, I, N], or without z [(G,) M, N]
    grad: Tensor,  # [(G,) B, M]
    z: Maybe,  # [(G,) B, I]
    x: Tensor,  # [(G,) B, N]
) -> None:
    """Write dW[m, i, n] = sum_b grad[b, m] z[b, i] x[b, n], or without z the product grad^T x."""
    rows, M, N, I = *grad.shape[-2:], x.shape[-1], 1 if z is None else z.shape[-1]  # noqa: E741
    count = groups_of(grad)
    primitive = "matrix_grad" if z is None else "weight_grad"
    problem = gemm_problem(primitive, x, (count * I, M, N, 1, rows), grad, x)
    tile = choose(problem)
    parts = splits(problem, tile)
    each = cdiv(cdiv(rows, parts), tile.BK) * tile.BK
    parts = max(cdiv(rows, each), 1) if each else 1
    if z is None:
        dw = dw.unsqueeze(-2)
    if parts == 1:
        _weight_grads(tile, 1, each, dw, grad, z, x)
        return
    sums = dw.new_empty(parts, count, M, I, N, dtype=accumulation_dtype(dw.dtype))
    _weight_grads(tile, parts, each, sums, grad, z, x)
    y = dw.view(1, -1, N) if dw.is_contiguous() else dw.flatten(0, -3)
    nothing = y.narrow(-1, 0, 0)
    contraction(y, nothing, nothing, sums=sums.view(parts, *y.shape))


def _weight_grads(
    tile: TileConfig, parts: int, each: int, dw: Tensor, grad: Tensor, z: Maybe, x: Tensor
) -> None:
    count, (M, I, N) = groups_of(grad), dw.shape[-3:]  # noqa: E741
    operands = {"dw": operand(dw, 5), "g": operand(grad, 3), "z": operand(z, 3), "x": operand(x, 3)}
    arguments = operands | {
        "M": M,
        "N": N,
        "I": I,
        "B": grad.shape[-2],
        "splits": parts,
        "each": each,
        **constants(tile, x.dtype, operands),
    }
    programs = count * parts * I * cdiv(M, tile.BM) * cdiv(N, tile.BN)
    launch(x.device, kernels.weight_grads, programs, arguments, tile.warps, tile.stages)


def gated(
    gate: GateEpilogue, z: Tensor, weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> tuple[Tensor, Tensor]:
    """(act(p) + s) * x + shift of p = z^T W x + U z + V x + c, and p if the gate keeps it, else [0, X]."""
    x = gate.x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    nothing = x.new_empty(0, x.shape[1])
    if gate.activation != "softmax":
        p = contraction(y, x, z, weight, weight_z, weight_x, bias, gate)
        return y, nothing if p is None else p
    # softmax needs whole rows, so gate and shift are stored in the accumulation dtype.
    whole, shift = torch.empty_like(y, dtype=accumulation_dtype(x.dtype)), None
    contraction(whole, x, z, weight, weight_z, weight_x, bias)
    if gate.shift_weight is not None or gate.shift_bias is not None:
        shift = torch.empty_like(whole)
        contraction(shift, x, z, None, gate.shift_weight, None, gate.shift_bias)
    p = torch.empty_like(y) if gate.keep else None
    arguments = {
        "y": operand(y, 2),
        "p": operand(p, 2),
        "gate": operand(whole, 2),
        "shift": operand(shift, 2),
        "x": operand(x, 2),
        "N": x.shape[1],
        "scale_offset": gate.scale_offset,
        "BN": min(max(16, 1 << (x.shape[1] - 1).bit_length()), 1024),
    }
    launch(x.device, kernels.softmax_gate, x.shape[0] if x.shape[1] else 0, arguments, 4, 1)
    return y, nothing if p is None else p
