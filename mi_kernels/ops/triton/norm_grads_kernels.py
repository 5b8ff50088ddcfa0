"""The kernels of the gradients of normalisation with modulation, which norm_grads.py launches."""

import triton
import triton.language as tl

from . import activations
from .elementwise import loaded, number, origin
from .norm_kernels import (
    SIZES_THAT_CHANGE,
    SUMS,
    WHOLE,
    divided,
    factor,
    operand,
    quotient,
    stored,
    tile_of,
)


@triton.jit(do_not_specialize_on_alignment=SIZES_THAT_CHANGE)
def _norm_row_means_kernel(
    p_grad,
    p_x,
    p_scale,
    p_weight,
    p_mean,
    p_rstd,
    p_means,  # [2, sets]: m(a) and m(a n)
    scale_offset: tl.float64,
    M,
    N,
    outer_0,
    outer_1,
    outer_2,
    sets,
    grad_strides,
    x_strides,
    scale_strides,
    weight_strides,
    stat_strides,
    CONTEXT_BY_ROW: tl.constexpr,
    WEIGHT_BY_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The means of rows that are longer than a tile."""
    sizes = outer_0, outer_1, outer_2
    m_tiles = tl.cdiv(M, BM)
    i_outer = tl.program_id(0) // m_tiles
    i_m = (tl.program_id(0) % m_tiles).to(tl.int64) * BM + tl.arange(0, BM)
    i_0 = tl.arange(0, BN).to(tl.int64)
    m_m = i_m < M
    o_stat = origin(i_outer, sizes, stat_strides[2])
    b_rstd = loaded(p_rstd, stat_strides, o_stat, i_m, i_0, m_m, m_m, True, False)
    if p_mean is not None:
        b_mean = loaded(p_mean, stat_strides, o_stat, i_m, i_0, m_m, m_m, True, False)
    wide = tl.float64 if p_grad.dtype.element_ty == tl.float64 else tl.float32
    sum_a, sum_an = tl.zeros([BM, BN], wide), tl.zeros([BM, BN], wide)
    for i_step in tl.range(0, tl.cdiv(N, BN)):
        i_n = i_0 + i_step * BN
        m_n = i_n < N
        b_a = operand(p_grad, grad_strides, i_outer, sizes, i_m, i_n, m_m, m_n, True, True)
        b_n = operand(p_x, x_strides, i_outer, sizes, i_m, i_n, m_m, m_n, True, True)
        if p_mean is not None:
            b_n -= b_mean
        if p_scale is not None:
            b = operand(p_scale, scale_strides, i_outer, sizes, i_m, i_n, m_m, m_n, CONTEXT_BY_ROW, True)
            b_a *= factor(ACTIVATION, b, scale_offset)
        if p_weight is not None:
            b_a *= operand(p_weight, weight_strides, i_outer, sizes, i_m, i_n, m_m, m_n, WEIGHT_BY_ROW, True)
        m = m_m[:, None] & m_n[None, :]
        sum_a += tl.where(m, b_a, 0.0)
        sum_an += tl.where(m, b_a * b_n, 0.0)
    b_a = divided(tl.sum(sum_a, 1, keep_dims=True), N)
    b_an = divided(tl.sum(sum_an, 1, keep_dims=True), N) * b_rstd
    stored(p_means, stat_strides, o_stat, i_m, i_0, m_m[:, None], b_a, True, False)
    o_stat += sets
    stored(p_means, stat_strides, o_stat, i_m, i_0, m_m[:, None], b_an, True, False)


@triton.jit(do_not_specialize_on_alignment=SIZES_THAT_CHANGE)
def _norm_rows_grads_kernel(
    p_grad,
    p_x,  # operands and results that are not used are None
    p_grad_x,
    p_h,
    p_gate,
    p_scale,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    p_means,  # of rows longer than a tile: [2, sets]
    p_dx,
    p_dh,
    p_dgate,  # the result where contexts vary by row, else sums of h dx
    p_dscale,  # only where contexts vary by row
    p_dshift,
    p_sum_gn,  # [splits, ...], with g F for g where contexts vary by row
    p_sum_g,
    scale_offset: tl.float64,
    M,
    N,
    outer_0,
    outer_1,
    outer_2,
    depth_0,  # sizes of the other axes that a program loops over
    depth_1,
    depth_2,
    grad_strides,
    x_strides,
    grad_x_strides,
    h_strides,
    gate_strides,
    scale_strides,
    weight_strides,
    bias_strides,
    stat_strides,
    dx_strides,
    context_strides,  # of dgate, dscale and dshift
    sum_strides,
    sum_size,  # elements of one of the sums
    splits,  # programs that share a sum
    sets,
    CONTEXT_BY_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """A program loops over the rows of one context, or over any rows where contexts vary by row."""
    sizes, depths = (outer_0, outer_1, outer_2), (depth_0, depth_1, depth_2)
    INPUTS: tl.constexpr = p_dx is not None or p_dh is not None or p_dgate is not None
    program = tl.program_id(0)
    n_tiles, m_tiles = tl.cdiv(N, BN), tl.cdiv(M, BM)
    i_n = (program % n_tiles).to(tl.int64) * BN + tl.arange(0, BN)
    program = program // n_tiles
    i_outer, i_split = program // splits, program % splits
    m_n = i_n < N
    steps = depth_0 * depth_1 * depth_2 * m_tiles
    steps_per_split = tl.cdiv(steps, splits)
    first = i_split * steps_per_split

    if p_weight is not None:
        b_weight = operand(p_weight, weight_strides, i_outer, sizes, i_n, i_n, m_n, m_n, False, True)
    if p_bias is not None:
        b_bias = operand(p_bias, bias_strides, i_outer, sizes, i_n, i_n, m_n, m_n, False, True)
    if not CONTEXT_BY_ROW:
        if p_scale is not None:
            b_scale = operand(p_scale, scale_strides, i_outer, sizes, i_n, i_n, m_n, m_n, False, True)
            b_factor = factor(ACTIVATION, b_scale, scale_offset)
        if p_gate is not None:
            b_gate = operand(p_gate, gate_strides, i_outer, sizes, i_n, i_n, m_n, m_n, False, True)
    wide = tl.float64 if p_grad.dtype.element_ty == tl.float64 else tl.float32
    sum_gn, sum_g, sum_hd = tl.zeros([BM, BN], wide), tl.zeros([BM, BN], wide), tl.zeros([BM, BN], wide)
    for i_step in tl.range(0, tl.minimum(steps_per_split, steps - first)):
        step = first + i_step
        i_m = (step % m_tiles).to(tl.int64) * BM + tl.arange(0, BM)
        i_depth = step // m_tiles
        m_m = i_m < M
        m = m_m[:, None] & m_n[None, :]
        o = origin(i_outer, sizes, grad_strides[2]) + origin(i_depth, depths, grad_strides[3])
        b_g = loaded(p_grad, grad_strides, o, i_m, i_n, m_m, m_n, True, True)
        o = origin(i_outer, sizes, x_strides[2]) + origin(i_depth, depths, x_strides[3])
        b_n = loaded(p_x, x_strides, o, i_m, i_n, m_m, m_n, True, True)
        o_stat = origin(i_outer, sizes, stat_strides[2]) + origin(i_depth, depths, stat_strides[3])
        if p_mean is not None:
            b_n -= loaded(p_mean, stat_strides, o_stat, i_m, i_n, m_m, m_n, True, False)
        b_rstd = loaded(p_rstd, stat_strides, o_stat, i_m, i_n, m_m, m_n, True, False)
        b_n = tl.where(m, b_n * b_rstd, 0.0)
        o_context = origin(i_outer, sizes, context_strides[2]) + origin(i_depth, depths, context_strides[3])
        b_a = b_g
        if CONTEXT_BY_ROW:
            if p_dshift is not None:
                stored(p_dshift, context_strides, o_context, i_m, i_n, m, b_g, True, True)
            if p_scale is not None:
                o = origin(i_outer, sizes, scale_strides[2]) + origin(i_depth, depths, scale_strides[3])
                b_scale = loaded(p_scale, scale_strides, o, i_m, i_n, m_m, m_n, True, True)
                if p_dscale is not None:
                    b = b_n
                    if p_weight is not None:
                        b *= b_weight
                    if p_bias is not None:
                        b += b_bias
                    b = activations.tangent(ACTIVATION, b_scale, b_g * b)
                    stored(p_dscale, context_strides, o_context, i_m, i_n, m, b, True, True)
                b_a = b_g * factor(ACTIVATION, b_scale, scale_offset)
            if p_sum_gn is not None:
                sum_gn += b_a * b_n
            if p_sum_g is not None:
                sum_g += b_a
        else:
            if p_sum_gn is not None:
                sum_gn += b_g * b_n
            if p_sum_g is not None:
                sum_g += b_g
            if p_scale is not None:
                b_a = b_g * b_factor
        if INPUTS:
            if p_weight is not None:
                b_a *= b_weight
            if p_means is None:
                b_an = divided(tl.sum(b_a * b_n, 1, keep_dims=True), N)
                b_dx = b_a - b_n * b_an
                if p_mean is not None:
                    b_dx -= divided(tl.sum(b_a, 1, keep_dims=True), N)
            else:
                o = o_stat + sets
                b_dx = b_a - b_n * loaded(p_means, stat_strides, o, i_m, i_n, m_m, m_n, True, False)
                if p_mean is not None:
                    b_dx -= loaded(p_means, stat_strides, o_stat, i_m, i_n, m_m, m_n, True, False)
            b_dx *= b_rstd
            if p_grad_x is not None:
                o = origin(i_outer, sizes, grad_x_strides[2]) + origin(i_depth, depths, grad_x_strides[3])
                b_dx += loaded(p_grad_x, grad_x_strides, o, i_m, i_n, m_m, m_n, True, True)
            o_dx = origin(i_outer, sizes, dx_strides[2]) + origin(i_depth, depths, dx_strides[3])
            if p_dx is not None:
                stored(p_dx, dx_strides, o_dx, i_m, i_n, m, b_dx, True, True)
            if p_dh is not None:
                if CONTEXT_BY_ROW:
                    o = origin(i_outer, sizes, gate_strides[2]) + origin(i_depth, depths, gate_strides[3])
                    b_gate = loaded(p_gate, gate_strides, o, i_m, i_n, m_m, m_n, True, True)
                stored(p_dh, dx_strides, o_dx, i_m, i_n, m, b_dx * b_gate, True, True)
            if p_dgate is not None:
                o = origin(i_outer, sizes, h_strides[2]) + origin(i_depth, depths, h_strides[3])
                b_hd = b_dx * loaded(p_h, h_strides, o, i_m, i_n, m_m, m_n, True, True)
                if CONTEXT_BY_ROW:
                    stored(p_dgate, context_strides, o_context, i_m, i_n, m, b_hd, True, True)
                else:
                    sum_hd += tl.where(m, b_hd, 0.0)

    o_sum = origin(i_outer, sizes, sum_strides[2]) + i_split.to(tl.int64) * sum_size
    m = m_n[None, :]
    if p_sum_gn is not None:
        b = tl.sum(sum_gn, 0, keep_dims=True)
        stored(p_sum_gn, sum_strides, o_sum, i_n, i_n, m, b, False, True)
    if p_sum_g is not None:
        b = tl.sum(sum_g, 0, keep_dims=True)
        stored(p_sum_g, sum_strides, o_sum, i_n, i_n, m, b, False, True)
    if p_dgate is not None and not CONTEXT_BY_ROW:
        b = tl.sum(sum_hd, 0, keep_dims=True)
        stored(p_dgate, sum_strides, o_sum, i_n, i_n, m, b, False, True)


@triton.jit
def _stored_sums(p, b, o, i_m, i_n, m_m, m_n, CHANNELS_ARE_ROWS: tl.constexpr):
    """Sums over the positions of a tile, one of each channel, which begin at o."""
    if CHANNELS_ARE_ROWS:
        tl.store(p + (o + i_m), tl.sum(b, 1), m_m)
    else:
        tl.store(p + (o + i_n), tl.sum(b, 0), m_n)


@triton.jit(do_not_specialize_on_alignment=SIZES_THAT_CHANGE)
def _norm_maps_grads_kernel(
    p_grad,
    p_x,
    p_grad_x,
    p_h,
    p_gate,
    p_scale,
    p_weight,
    p_mean,
    p_rstd,
    p_means,  # [2, sets]: m(a) and m(a n); only of APPLY
    p_dx,
    p_dh,
    p_sum_gn,  # [tiles of positions, sets, channels of a set]
    p_sum_g,
    p_sum_hd,
    scale_offset: tl.float64,
    M,
    N,
    outer_0,
    outer_1,
    outer_2,
    sets,
    grad_strides,
    x_strides,
    grad_x_strides,
    h_strides,
    gate_strides,
    scale_strides,
    weight_strides,
    dx_strides,
    CHANNELS_ARE_ROWS: tl.constexpr,
    PASS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    sizes = outer_0, outer_1, outer_2
    BY_ROW: tl.constexpr = CHANNELS_ARE_ROWS
    BY_COLUMN: tl.constexpr = not CHANNELS_ARE_ROWS
    i_set, m_tile, n_tile, i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN)
    m_m, m_n = i_m < M, i_n < N
    m = m_m[:, None] & m_n[None, :]
    if CHANNELS_ARE_ROWS:
        o_sum = (n_tile.to(tl.int64) * sets + i_set) * M
    else:
        o_sum = (m_tile.to(tl.int64) * sets + i_set) * N

    b_g = operand(p_grad, grad_strides, i_set, sizes, i_m, i_n, m_m, m_n, True, True)
    b_n = operand(p_x, x_strides, i_set, sizes, i_m, i_n, m_m, m_n, True, True)
    b_rstd = tl.load(p_rstd + i_set)
    if p_mean is not None:
        b_n -= tl.load(p_mean + i_set)
    b_n = tl.where(m, b_n * b_rstd, 0.0)
    if p_sum_gn is not None:
        _stored_sums(p_sum_gn, b_g * b_n, o_sum, i_m, i_n, m_m, m_n, CHANNELS_ARE_ROWS)
    if p_sum_g is not None:
        _stored_sums(p_sum_g, b_g, o_sum, i_m, i_n, m_m, m_n, CHANNELS_ARE_ROWS)
    if PASS != SUMS:
        b_a = b_g
        if p_scale is not None:
            b = operand(p_scale, scale_strides, i_set, sizes, i_m, i_n, m_m, m_n, BY_ROW, BY_COLUMN)
            b_a *= factor(ACTIVATION, b, scale_offset)
        if p_weight is not None:
            b_a *= operand(p_weight, weight_strides, i_set, sizes, i_m, i_n, m_m, m_n, BY_ROW, BY_COLUMN)
        if PASS == WHOLE:
            b_size = number(M, b_a) * number(N, b_a)
            total = tl.sum(tl.sum(b_a * b_n, 1, keep_dims=True), 0, keep_dims=True)
            b_dx = b_a - b_n * quotient(total, b_size)
            if p_mean is not None:
                b_dx -= quotient(tl.sum(tl.sum(b_a, 1, keep_dims=True), 0, keep_dims=True), b_size)
        else:
            b_dx = b_a - b_n * tl.load(p_means + (sets + i_set))
            if p_mean is not None:
                b_dx -= tl.load(p_means + i_set)
        b_dx *= b_rstd
        if p_grad_x is not None:
            b_dx += operand(p_grad_x, grad_x_strides, i_set, sizes, i_m, i_n, m_m, m_n, True, True)
        o_dx = origin(i_set, sizes, dx_strides[2])
        if p_dx is not None:
            stored(p_dx, dx_strides, o_dx, i_m, i_n, m, b_dx, True, True)
        if p_dh is not None:
            b = operand(p_gate, gate_strides, i_set, sizes, i_m, i_n, m_m, m_n, BY_ROW, BY_COLUMN)
            stored(p_dh, dx_strides, o_dx, i_m, i_n, m, b_dx * b, True, True)
        if p_sum_hd is not None:
            b_h = operand(p_h, h_strides, i_set, sizes, i_m, i_n, m_m, m_n, True, True)
            _stored_sums(p_sum_hd, tl.where(m, b_dx * b_h, 0.0), o_sum, i_m, i_n, m_m, m_n, CHANNELS_ARE_ROWS)
