"""The host's side of the kernels: problems, tiles, splits, scratch and launches, for tensors of any strides.

Activations are [B, ..] or [G, B, ..], weights have the same leading dimension of groups or none. Scratch
comes from torch's allocator; sums of several programs lie in it and are added in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mi_kernels.ops.dtypes import accumulation_dtype
from mi_kernels.ops.precision import has_tf32, precision
from mi_kernels.ops.triton import kernels
from mi_kernels.ops.triton.launch import cdiv, launch, operand, target
from mi_kernels.ops.triton.tiles import Problem, Tile, choose, splits

Maybe = Tensor | None

_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}
# Sums over fewer products than this leave most of a tile idle, so a longer one is taken for the lanes.
SHORT = 8
# A partial sum of dz holds a number for each row, i and tile of columns. Rows are cut so that it fits.
PARTIAL_BYTES = 128 << 20
# 256 steps by each of two strides below this stay in the range of int32.
WIDE_STRIDE = 1 << 22
# Which strides of an operand, by their place in its tuple, are taken within a tile; the others lead to it.
_WITHIN = {"w": (2, 4), "bias": (2,), "shift_bias": (2,), "dw": (3, 5), "dz": (3,)}
_WITHIN |= dict.fromkeys(("x", "z", "u", "v", "shift_weight", "gate", "g"), (2, 3)) | dict.fromkeys(
    ("y", "sums"), (3, 4)
)


class GateEpilogue(NamedTuple):
    """What a gate does with the sum p: (act(p) + s) * x + (C z + d)."""

    activation: str
    scale_offset: float
    x: Tensor
    shift_weight: Maybe
    shift_bias: Maybe
    keep: bool


def groups_of(tensor: Tensor) -> int:
    """G of activations [G, B, ..], or 1."""
    return tensor.shape[0] if tensor.dim() == 3 else 1


def with_features(matrix: Maybe) -> Maybe:
    """None in place of a weight whose sum is empty: it may have no memory."""
    return None if matrix is None or 0 in matrix.shape else matrix


Sizes = tuple[int, int, int, int, int]  # G, M, N, I, K


def readable(operand: Tensor, row: int = -2) -> bool:
    """Whether tiles of an operand are read 16 bytes at a time, along its last axis or the axis ``row``.

    Triton knows of an integer whether it is 1 or divisible by 16 (in elements, whatever their dtype), and of
    a pointer whether it is aligned to 16 bytes. Sizes count because they bound the mask of a tile.
    """
    sizes = [operand.shape[axis] for axis in (row, -1) if operand.stride(axis) == 1]
    known = all(stride == 1 or stride % 16 == 0 for stride in operand.stride())
    return known and any(size % 16 == 0 for size in sizes) and operand.data_ptr() % 16 == 0


def _problem(
    primitive: str,
    like: Tensor,
    sizes: Sizes,
    *matrices: Maybe,
    weight: Maybe = None,
    second: bool = False,
    gated: bool = False,
) -> Problem:
    """The problem of operands of which tiles are read; z, where it only scales, is none of them."""
    aligned = all(readable(t) for t in matrices if t is not None)
    aligned = aligned and (weight is None or readable(weight, -3))
    capability, old = target(like.device)
    kind = primitive, like.dtype, precision(like.dtype), capability, old, aligned
    return Problem(*kind, *sizes, second, gated)


def _constants(tile: Tile, dtype: torch.dtype, operands: dict[str, Any]) -> dict[str, Any]:
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
    """Write y = z^T W x + U z + V x + c + sums, or the gate of it; returns p if the gate keeps it."""
    weight, weight_z, weight_x = map(with_features, (weight, weight_z, weight_x))
    if weight is not None and x.shape[-1] <= SHORT < z.shape[-1]:
        x, z, weight, weight_z, weight_x = z, x, weight.mT, weight_x, weight_z
    p = torch.empty_like(y) if gate is not None and gate.keep else None
    sizes = groups_of(y), y.shape[-2], y.shape[-1], z.shape[-1], x.shape[-1]
    shift_weight = None if gate is None else with_features(gate.shift_weight)
    terms = (weight_z, weight_x, shift_weight)
    # What the plain products beside W read.
    read = (*terms, None if weight_z is None else z, None if weight_x is None else x)
    tile = None
    if weight is not None:
        problem = _problem("forward", x, sizes, x, *read, weight=weight, gated=gate is not None)
        tile = choose(problem)
        parts = splits(problem, tile)
        if y.shape[-1] <= SHORT < z.shape[-1]:
            sums, weight = paired(None, z, x, weight.movedim(-1, -3), x), None
        elif parts > 1:
            sums = y.new_empty(parts, *sizes[:3], dtype=accumulation_dtype(x.dtype))
            _interaction(tile, sizes, sums, x, z, weight, splits=parts)
            weight = None
    if weight is None:
        primitive = "sum" if all(term is None for term in terms) else "linear"
        tile = choose(_problem(primitive, x, sizes, *read, second=shift_weight is not None))
    assert tile is not None
    _interaction(tile, sizes, y, x, z, weight, weight_z, weight_x, bias, p=p, gate=gate, sums=sums)
    return p


def paired(
    y: Maybe,  # [(G,) M, N], or [parts, G, M, N]
    x: Tensor,  # [(G,) M, K]
    z: Tensor,  # [(G,) M, I]; without y of no account
    weight: Tensor,  # [(G,) N, I, K]
    partner: Tensor,  # [(G,) M, N]
    weight_x: Maybe = None,  # [(G,) N, K]
    result: Maybe = None,  # [(G,) M, I]
) -> Maybe:
    """Sums over n of partner[m, n] T[m, n, i], where T = sum_k W x; y = sum_i z T + V x on the way.

    The sums go to ``result``, if there is one and one tile of columns holds them all; else they are returned,
    a part for each tile, as [tiles, G, M, I]. So does y: with parts, V is left to who adds them.
    """
    count, (M, N), I, K = groups_of(x), partner.shape[-2:], weight.shape[-2], x.shape[-1]  # noqa: E741
    problem = _paired_problem(y is not None, x, partner, weight)
    tile = choose(problem)
    parts = y.shape[0] if y is not None and y.dim() == 4 else 1
    if y is None:
        parts, z = splits(problem, tile), x
    sums = None
    if result is None or N > tile.BN:
        # Rows lie innermost, as a program writes them.
        sums = x.new_empty(cdiv(N, tile.BN), count, I, M, dtype=accumulation_dtype(x.dtype)).mT
    dz = result if sums is None else sums
    weight_x = with_features(weight_x) if parts == 1 else None
    sizes = count, M, N, I, K
    _interaction(tile, sizes, y, x, z, weight, None, weight_x, partner=partner, dz=dz, splits=parts)
    return sums


def _paired_problem(both: bool, x: Tensor, partner: Tensor, weight: Tensor) -> Problem:
    M, N = partner.shape[-2:]
    sizes = groups_of(x), M, N, weight.shape[-2], x.shape[-1]
    return _problem("input_grads" if both else "context_grad", x, sizes, x, partner, weight=weight)


def paired_parts(x: Tensor, partner: Tensor, weight: Tensor) -> int:
    """In how many parts `paired` makes y."""
    problem = _paired_problem(True, x, partner, weight)
    return splits(problem, choose(problem))


def rows_at_once(x: Tensor, partner: Tensor, weight: Tensor) -> int:
    """Rows of one call of `paired` for which its sums stay below ``PARTIAL_BYTES``."""
    tiles = cdiv(partner.shape[-1], choose(_paired_problem(True, x, partner, weight)).BN)
    row = tiles * groups_of(x) * weight.shape[-2] * accumulation_dtype(x.dtype).itemsize
    return max(PARTIAL_BYTES // row, 1)


def _interaction(
    tile: Tile,
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
        "shift_weight": None if gate is None else operand(with_features(gate.shift_weight), 3),
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
        **_constants(tile, x.dtype, operands),
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
    problem = _problem(primitive, x, (count * I, M, N, 1, rows), grad, x)
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


def _weight_grads(tile: Tile, parts: int, each: int, dw: Tensor, grad: Tensor, z: Maybe, x: Tensor) -> None:
    count, (M, I, N) = groups_of(grad), dw.shape[-3:]  # noqa: E741
    operands = {"dw": operand(dw, 5), "g": operand(grad, 3), "z": operand(z, 3), "x": operand(x, 3)}
    arguments = operands | {
        "M": M,
        "N": N,
        "I": I,
        "B": grad.shape[-2],
        "splits": parts,
        "each": each,
        **_constants(tile, x.dtype, operands),
    }
    programs = count * parts * I * cdiv(M, tile.BM) * cdiv(N, tile.BN)
    launch(x.device, kernels.weight_grads, programs, arguments, tile.warps, tile.stages)


def gated(
    gate: GateEpilogue, z: Tensor, weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> tuple[Tensor, Tensor]:
    """(act(p) + s) * x + shift of p = z^T W x + U z + V x + c, and p if it is kept, else [0, X]."""
    x = gate.x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    nothing = x.new_empty(0, x.shape[1])
    if gate.activation != "softmax":
        p = contraction(y, x, z, weight, weight_z, weight_x, bias, gate)
        return y, nothing if p is None else p
    # The rows are needed whole, so gate and shift wait for them in the dtype of accumulation.
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
