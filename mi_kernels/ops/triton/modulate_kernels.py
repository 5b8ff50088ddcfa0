"""The kernels of modulation, mixtures and their gradients, which modulate.py launches.

A kernel is one function, whatever its length: its parts share nearly all of its arguments.
"""

import triton
import triton.language as tl

from . import activations
from .elementwise import loaded, number, origin, pointers, tile_mask


@triton.jit
def _factor(ACTIVATION: tl.constexpr, b_scale, factor, offset):
    """F(scale), what x is multiplied by."""
    b_value = activations.value(ACTIVATION, b_scale)
    return b_value * number(factor, b_scale) + number(offset, b_scale)


# Sizes that change from call to call are specialised on 1 only. They are separate arguments because Triton
# always specialises the elements of a tuple.
OUTER, DEPTH = ("outer_0", "outer_1", "outer_2"), ("depth_0", "depth_1", "depth_2")
_SIZES_THAT_CHANGE = ("M", *OUTER, *DEPTH, "splits")


@triton.jit(do_not_specialize_on_alignment=_SIZES_THAT_CHANGE)
def _modulate_kernel(
    p_x,
    p_y,
    p_scale,
    p_shift,  # or None
    scale_offset: tl.float64,  # else Triton passes a float as float32
    scale_factor: tl.float64,
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
    MIXES: tl.constexpr,  # x and shift: y = F(scale) (x - shift) + shift
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
    b_factor = _factor(ACTIVATION, b_scale, scale_factor, scale_offset)
    if p_shift is None:
        b_y = b_factor * b_x
    else:
        o_shift = origin(i_outer, outer_sizes, shift_strides[2])
        b_shift = loaded(p_shift, shift_strides, o_shift, i_m, i_n, m_m, m_n, SHIFT_BY_ROW, SHIFT_BY_COLUMN)
        if MIXES:
            b_x -= b_shift
        b_y = b_factor * b_x + b_shift
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
    p_other,  # of a mixture, whose dshift is g - F(scale) g, of the size of x; else None
    scale_offset: tl.float64,
    scale_factor: tl.float64,
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
    other_strides,
    scale_strides,
    dx_strides,  # of dx, and of dshift of a mixture
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
        b_factor = _factor(ACTIVATION, b_scale, scale_factor, scale_offset)
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
        if p_dshift is not None and p_other is None:
            sum_shift += b_grad
        if p_x is not None:
            o = origin(i_outer, outer_sizes, x_strides[2]) + origin(i_depth, depth_sizes, x_strides[3])
            b_x = loaded(p_x, x_strides, o, j_m, j_n, m_m, m_n, True, True)
            if p_other is not None:
                o = origin(i_outer, outer_sizes, other_strides[2])
                o += origin(i_depth, depth_sizes, other_strides[3])
                b_x -= loaded(p_other, other_strides, o, j_m, j_n, m_m, m_n, True, True)
            sum_scale += b_x * b_grad
        o = origin(i_outer, outer_sizes, dx_strides[2]) + origin(i_depth, depth_sizes, dx_strides[3])
        if p_dx is not None:
            p = pointers(p_dx, dx_strides, o, j_m, j_n, True, True)
            tl.store(p, (b_factor * b_grad).to(p.dtype.element_ty), m_m[:, None] & m_n[None, :])
        if p_dshift is not None and p_other is not None:
            p = pointers(p_dshift, dx_strides, o, j_m, j_n, True, True)
            b_dshift = b_grad - b_factor * b_grad
            tl.store(p, b_dshift.to(p.dtype.element_ty), m_m[:, None] & m_n[None, :])

    m = tile_mask(i_m < M, i_n < N, not REDUCE_ROWS, not REDUCE_COLUMNS)
    if p_dscale is not None:
        b_sum = _summed(sum_scale, REDUCE_ROWS, REDUCE_COLUMNS)
        b_dscale = activations.tangent(ACTIVATION, b_scale, b_sum * number(scale_factor, b_scale))
        p = pointers(p_dscale, sum_strides, o_sum, i_m, i_n, not REDUCE_ROWS, not REDUCE_COLUMNS)
        tl.store(p, b_dscale.to(p.dtype.element_ty), m)
    if p_dshift is not None and p_other is None:
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
