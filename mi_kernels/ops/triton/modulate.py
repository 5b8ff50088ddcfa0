"""Modulation and its gradients in Triton: one read of each operand, one write of each result.

Compiled ahead of time and run in Triton's interpreter, not on a GPU. Axes and tiles: modulate_tiling.py.

The gradients are computed in one pass. dscale and dshift are summed over the axes in which scale does not
vary, so a program loads its scale once, loops over the tiles of its part of a sum, and keeps elementwise
partial sums in registers. Where several programs share a sum, their partial sums go to scratch (at most
``axes.FEW_PROGRAMS`` tiles) and a second kernel adds them in a fixed order: no atomics.

A kernel is one function, whatever its length: its parts share nearly all of its arguments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mi_kernels.ops.dtypes import accumulation_dtype
from mi_kernels.ops.modulate import portable
from mi_kernels.ops.triton import activations
from mi_kernels.ops.triton import modulate_tiling as axes
from mi_kernels.ops.triton.elementwise import loaded, number, origin, pointers, tile_mask
from mi_kernels.ops.triton.launch import cdiv, launch

Maybe = Tensor | None
# The second kernel's tile: its rows are splits. Few columns, so that few results still use several programs.
FINISH, FINISH_COLUMNS = 1024, 64


# Sizes that change from call to call are specialised on 1 only. They are separate arguments because Triton
# always specialises the elements of a tuple.
_OUTER, _DEPTH = ("outer_0", "outer_1", "outer_2"), ("depth_0", "depth_1", "depth_2")
_SIZES_THAT_CHANGE = ("M", *_OUTER, *_DEPTH, "splits")


@triton.jit(do_not_specialize_on_alignment=_SIZES_THAT_CHANGE)
def _modulate_kernel(
    p_x,
    p_y,
    p_scale,
    p_shift,  # or None
    scale_offset: tl.float64,  # else Triton passes a float as float32
    M,
    N,
    outer_0,  # sizes of the outer axes
    outer_1,
    outer_2,
    x_strides,  # row, column, (outer axes), (depth axes); likewise below
    y_strides,
    scale_strides,
    shift_strides,
    SCALE_BY_ROW: tl.constexpr,
    SCALE_BY_COLUMN: tl.constexpr,
    SHIFT_BY_ROW: tl.constexpr,
    SHIFT_BY_COLUMN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    outer_sizes = outer_0, outer_1, outer_2
    tile = tl.program_id(0)
    n_tiles, m_tiles = tl.cdiv(N, BN), tl.cdiv(M, BM)
    i_n = (tile % n_tiles).to(tl.int64) * BN + tl.arange(0, BN)
    tile = tile // n_tiles
    i_m = (tile % m_tiles).to(tl.int64) * BM + tl.arange(0, BM)
    i_outer = tile // m_tiles
    m_m, m_n = i_m < M, i_n < N

    o_x, o_y = origin(i_outer, outer_sizes, x_strides[2]), origin(i_outer, outer_sizes, y_strides[2])
    b_x = loaded(p_x, x_strides, o_x, i_m, i_n, m_m, m_n, True, True)
    o_scale = origin(i_outer, outer_sizes, scale_strides[2])
    b_scale = loaded(p_scale, scale_strides, o_scale, i_m, i_n, m_m, m_n, SCALE_BY_ROW, SCALE_BY_COLUMN)
    b_y = (activations.value(ACTIVATION, b_scale) + number(scale_offset, b_x)) * b_x
    if p_shift is not None:
        o_shift = origin(i_outer, outer_sizes, shift_strides[2])
        b_y += loaded(p_shift, shift_strides, o_shift, i_m, i_n, m_m, m_n, SHIFT_BY_ROW, SHIFT_BY_COLUMN)
    p_y = pointers(p_y, y_strides, o_y, i_m, i_n, True, True)
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), m_m[:, None] & m_n[None, :])


@triton.jit
def _summed(b_sum, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if ROWS:
        b_sum = tl.sum(b_sum, 0, keep_dims=True)
    if COLUMNS:
        b_sum = tl.sum(b_sum, 1, keep_dims=True)
    return b_sum


@triton.jit(do_not_specialize_on_alignment=_SIZES_THAT_CHANGE)
def _modulate_grads_kernel(
    p_grad,
    p_x,  # operands and results that are not used are None
    p_scale,
    p_dx,
    p_dscale,  # the result, or partial sums [splits, ...]
    p_dshift,
    scale_offset: tl.float64,
    M,
    N,
    outer_0,
    outer_1,
    outer_2,
    depth_0,  # sizes of the depth axes
    depth_1,
    depth_2,
    grad_strides,
    x_strides,
    scale_strides,
    dx_strides,
    sum_strides,  # of dscale and of dshift
    sum_size,  # elements of one of them
    splits,  # programs that share a sum
    SCALE_BY_ROW: tl.constexpr,
    SCALE_BY_COLUMN: tl.constexpr,
    REDUCE_ROWS: tl.constexpr,
    REDUCE_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    outer_sizes, depth_sizes = (outer_0, outer_1, outer_2), (depth_0, depth_1, depth_2)
    n_tiles, m_tiles = tl.cdiv(N, BN), tl.cdiv(M, BM)
    program = tl.program_id(0)
    i_outer, i_split = program // splits, program % splits
    m_first, n_first = i_outer * 0, i_outer * 0
    steps, m_steps, n_steps = depth_sizes[0] * depth_sizes[1] * depth_sizes[2], 1, 1
    if REDUCE_COLUMNS:
        n_steps = n_tiles
    else:
        n_first = i_outer % n_tiles
        i_outer = i_outer // n_tiles
    if REDUCE_ROWS:
        m_steps = m_tiles
    else:
        m_first = i_outer % m_tiles
        i_outer = i_outer // m_tiles
    steps = steps * m_steps * n_steps
    steps_per_split = tl.cdiv(steps, splits)

    i_m = m_first.to(tl.int64) * BM + tl.arange(0, BM)
    i_n = n_first.to(tl.int64) * BN + tl.arange(0, BN)
    if p_scale is not None:
        # Outside the loop, whose axes are those in which scale does not vary.
        o = origin(i_outer, outer_sizes, scale_strides[2])
        m_m, m_n = i_m < M, i_n < N
        b_scale = loaded(p_scale, scale_strides, o, i_m, i_n, m_m, m_n, SCALE_BY_ROW, SCALE_BY_COLUMN)
        b_gate = activations.value(ACTIVATION, b_scale) + number(scale_offset, b_scale)
    wide = tl.float64 if p_grad.dtype.element_ty == tl.float64 else tl.float32
    sum_scale, sum_shift = tl.zeros([BM, BN], wide), tl.zeros([BM, BN], wide)
    o_grad = origin(i_outer, outer_sizes, grad_strides[2])
    o_sum = origin(i_outer, outer_sizes, sum_strides[2]) + i_split.to(tl.int64) * sum_size
    first = i_split * steps_per_split
    for i_step in tl.range(0, tl.minimum(steps_per_split, steps - first)):
        step = first + i_step
        j_m = (m_first + step // n_steps % m_steps).to(tl.int64) * BM + tl.arange(0, BM)
        j_n = (n_first + step % n_steps).to(tl.int64) * BN + tl.arange(0, BN)
        m_m, m_n, i_depth = j_m < M, j_n < N, step // (n_steps * m_steps)
        o = o_grad + origin(i_depth, depth_sizes, grad_strides[3])
        b_grad = loaded(p_grad, grad_strides, o, j_m, j_n, m_m, m_n, True, True)
        if p_dshift is not None:
            sum_shift += b_grad
        if p_x is not None:
            o = origin(i_outer, outer_sizes, x_strides[2]) + origin(i_depth, depth_sizes, x_strides[3])
            sum_scale += loaded(p_x, x_strides, o, j_m, j_n, m_m, m_n, True, True) * b_grad
        if p_dx is not None:
            o = origin(i_outer, outer_sizes, dx_strides[2]) + origin(i_depth, depth_sizes, dx_strides[3])
            p = pointers(p_dx, dx_strides, o, j_m, j_n, True, True)
            tl.store(p, (b_gate * b_grad).to(p.dtype.element_ty), m_m[:, None] & m_n[None, :])

    m = tile_mask(i_m < M, i_n < N, not REDUCE_ROWS, not REDUCE_COLUMNS)
    if p_dscale is not None:
        b_dscale = activations.tangent(ACTIVATION, b_scale, _summed(sum_scale, REDUCE_ROWS, REDUCE_COLUMNS))
        p = pointers(p_dscale, sum_strides, o_sum, i_m, i_n, not REDUCE_ROWS, not REDUCE_COLUMNS)
        tl.store(p, b_dscale.to(p.dtype.element_ty), m)
    if p_dshift is not None:
        b_dshift = _summed(sum_shift, REDUCE_ROWS, REDUCE_COLUMNS)
        p = pointers(p_dshift, sum_strides, o_sum, i_m, i_n, not REDUCE_ROWS, not REDUCE_COLUMNS)
        tl.store(p, b_dshift.to(p.dtype.element_ty), m)


@triton.jit
def _add_splits_kernel(p_parts, p_out, size, splits, BS: tl.constexpr, BN: tl.constexpr):
    """out[n] = sum_s parts[s, n], in the order of s."""
    i_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    b_sum = tl.zeros([BS, BN], p_parts.dtype.element_ty)
    for first in range(0, splits, BS):
        i_s = first + tl.arange(0, BS)
        p = p_parts + i_s.to(tl.int64)[:, None] * size + i_n[None, :]
        b_sum += tl.load(p, (i_s[:, None] < splits) & (i_n[None, :] < size), other=0.0)
    b_out = tl.sum(b_sum, 0)
    tl.store(p_out + i_n, b_out.to(p_out.dtype.element_ty), i_n < size)


def _strides(tensor: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Strides, 0 where the tensor broadcasts to this shape."""
    pairs = zip(tensor.stride(), tensor.shape, shape, strict=True)
    return tuple(0 if own != size else stride for stride, own, size in pairs)


def _sizes(plan: axes.Tiling, *names: tuple[str, ...]) -> dict[str, int]:
    """The arguments M and N, and the sizes of the other axes by their names."""
    M, N, *others = plan.sizes
    sizes = {"M": M, "N": N}
    for group, values in zip(names, others, strict=False):
        sizes |= dict(zip(group, values, strict=True))
    return sizes


def modulate(x: Tensor, scale: Tensor, shift: Maybe, activation: str, scale_offset: float) -> Tensor:
    """y of ``mi_kernels::modulate``; shapes as in schema.py."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    operands = [y, x, scale] if shift is None else [y, x, scale, shift]
    strides = tuple(_strides(t, x.shape) for t in operands)
    plan = axes.tiling(tuple(x.shape), strides, (False,) * x.dim(), x.element_size())
    if plan is None:
        return portable.modulate(x, scale, shift, activation, scale_offset)
    arguments = {
        **{"p_x": x, "p_y": y, "p_scale": scale, "p_shift": shift, "scale_offset": scale_offset},
        **_sizes(plan, _OUTER),
        **{"x_strides": plan.strides(1), "y_strides": plan.strides(0)},
        "scale_strides": plan.strides(2),
        "shift_strides": None if shift is None else plan.strides(3),
        **dict(zip(("SCALE_BY_ROW", "SCALE_BY_COLUMN"), plan.varies(2), strict=True)),
        **dict(zip(("SHIFT_BY_ROW", "SHIFT_BY_COLUMN"), plan.varies(-1), strict=True)),
        **{"ACTIVATION": activation, "BM": plan.BM, "BN": plan.BN},
    }
    launch(x.device, _modulate_kernel, plan.programs, arguments, axes.WARPS, 1)
    return y


def modulate_grads(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift_size: list[int],
    activation: str,
    scale_offset: float,
    want_x: bool,
    want_scale: bool,
    want_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale and dshift of ``mi_kernels::modulate_grads``."""
    make = x.new_zeros if x.numel() == 0 else x.new_empty
    dx = torch.empty_like(x) if want_x else x.new_empty(0)
    dscale = make(scale.shape if want_scale else 0)
    dshift = make(shift_size if want_shift else 0)
    if x.numel() == 0:
        return dx, dscale, dshift
    # One pass, unless dshift is summed over other axes than dscale; then a second pass reads g for it.
    same = tuple(shift_size) == tuple(scale.shape)
    for wants in ((want_x, want_scale, want_shift and same), (False, False, want_shift and not same)):
        results = [t if wanted else None for t, wanted in zip((dx, dscale, dshift), wants, strict=True)]
        if any(wants) and not _pass(grad, x, scale, activation, scale_offset, *results):
            rule = (grad, x, scale, shift_size, activation, scale_offset)
            return portable.modulate_grads(*rule, want_x, want_scale, want_shift)
    return dx, dscale, dshift


def _pass(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    activation: str,
    scale_offset: float,
    dx: Maybe,
    dscale: Maybe,
    dshift: Maybe,
) -> bool:
    """Write the results that are not None; False if there are too many axes."""
    sums = [t for t in (dscale, dshift) if t is not None]
    reduced = tuple(own != size for own, size in zip((*sums, x)[0].shape, x.shape, strict=True))
    operands = (
        grad if dx is None else dx,
        grad,
        None if dscale is None else x,
        None if dscale is dx is None else scale,
        sums[0] if sums else None,
    )
    strides = tuple((0,) * x.dim() if t is None else _strides(t, x.shape) for t in operands)
    plan = axes.tiling(tuple(x.shape), strides, reduced, x.element_size())
    if plan is None:
        return False
    size = sums[0].numel() if sums else 0
    into = [dscale, dshift]
    if plan.splits > 1:
        scratch = x.new_empty((len(sums), plan.splits, size), dtype=accumulation_dtype(x.dtype))
        parts = iter(scratch)
        into = [None if t is None else next(parts) for t in into]
    arguments = {
        **{"p_grad": grad, "p_x": operands[2], "p_scale": operands[3], "p_dx": dx},
        **{"p_dscale": into[0], "p_dshift": into[1], "scale_offset": scale_offset},
        **_sizes(plan, _OUTER, _DEPTH),
        **{"grad_strides": plan.strides(1), "x_strides": plan.strides(2), "scale_strides": plan.strides(3)},
        **{"dx_strides": plan.strides(0), "sum_strides": plan.strides(4), "sum_size": size},
        "splits": plan.splits,
        **dict(zip(("SCALE_BY_ROW", "SCALE_BY_COLUMN"), plan.varies(3), strict=True)),
        **{"REDUCE_ROWS": plan.rows.reduced, "REDUCE_COLUMNS": plan.columns.reduced},
        **{"ACTIVATION": activation, "BM": plan.BM, "BN": plan.BN},
    }
    programs = plan.programs * plan.splits
    launch(x.device, _modulate_grads_kernel, programs, arguments, axes.WARPS, 1)
    if plan.splits > 1:
        for part, total in zip(scratch, sums, strict=True):
            _add_splits(part, total)
    return True


def _add_splits(parts: Tensor, total: Tensor) -> None:
    splits, size = parts.shape
    BN = min(FINISH_COLUMNS, triton.next_power_of_2(size))
    BS = min(FINISH // BN, triton.next_power_of_2(splits))
    arguments = {"p_parts": parts, "p_out": total, "size": size, "splits": splits, "BS": BS, "BN": BN}
    launch(parts.device, _add_splits_kernel, cdiv(size, BN), arguments, axes.WARPS, 1)
