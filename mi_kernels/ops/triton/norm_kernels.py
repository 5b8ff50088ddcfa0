"""The kernels of normalisation with modulation and of its gradients, which norm.py launches.

As those of modulate_kernels.py, each is one function, since its parts share nearly all of its arguments.
"""

import triton
import triton.language as tl

from . import activations
from .elementwise import loaded, number, origin, pointers, widened

# What a kernel of maps does with a tile: all with a whole set; or sums of tiles in one pass, and what follows
# from them in a second.
WHOLE, SUMS, APPLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
OUTER, DEPTH = ("outer_0", "outer_1", "outer_2"), ("depth_0", "depth_1", "depth_2")
SIZES_THAT_CHANGE = ("M", *OUTER, *DEPTH, "splits", "sets")


@triton.jit
def quotient(a, b):
    """a / b, correctly rounded."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def divided(a, count):
    return quotient(a, tl.full(a.shape, count, a.dtype))


@triton.jit
def _inverse_root(variance, eps):
    t = variance + number(eps, variance)
    if t.dtype == tl.float64:
        return 1.0 / tl.sqrt(t)
    else:
        return tl.div_rn(tl.full(t.shape, 1.0, t.dtype), tl.sqrt_rn(t))


@triton.jit
def factor(ACTIVATION: tl.constexpr, b_scale, offset):
    """F(scale) = act(scale) + s."""
    return activations.value(ACTIVATION, b_scale) + number(offset, b_scale)


@triton.jit
def operand(p, strides, i_outer, sizes, i_m, i_n, m_m, m_n, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr):
    return loaded(p, strides, origin(i_outer, sizes, strides[2]), i_m, i_n, m_m, m_n, BY_ROW, BY_COLUMN)


@triton.jit
def stored(p, strides, offset, i_m, i_n, m, b, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr):
    p = pointers(p, strides, offset, i_m, i_n, BY_ROW, BY_COLUMN)
    tl.store(p, b.to(p.dtype.element_ty), m)


@triton.jit
def tile_of(program, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """The set of a program, the numbers of its tile, and the indices of that."""
    n_tiles, m_tiles = tl.cdiv(N, BN), tl.cdiv(M, BM)
    n_tile, rest = program % n_tiles, program // n_tiles
    m_tile, i_set = rest % m_tiles, rest // m_tiles
    i_m, i_n = m_tile.to(tl.int64) * BM + tl.arange(0, BM), n_tile.to(tl.int64) * BN + tl.arange(0, BN)
    return i_set, m_tile, n_tile, i_m, i_n


@triton.jit(do_not_specialize_on_alignment=SIZES_THAT_CHANGE)
def _norm_rows_kernel(
    p_x,
    p_h,  # operands that are not there are None
    p_gate,
    p_scale,
    p_shift,
    p_weight,
    p_bias,
    p_y,
    p_x_new,
    p_mean,  # without it, no mean is subtracted
    p_rstd,
    eps: tl.float64,  # else Triton passes a float as float32
    scale_offset: tl.float64,
    M,
    N,
    outer_0,  # sizes of the outer axes
    outer_1,
    outer_2,
    x_strides,  # row, column, (outer axes), (depth axes); likewise below
    h_strides,
    gate_strides,
    scale_strides,
    shift_strides,
    weight_strides,
    bias_strides,
    y_strides,
    stat_strides,
    CONTEXT_BY_ROW: tl.constexpr,
    WEIGHT_BY_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """A row is a set, which the tile has whole."""
    sizes = outer_0, outer_1, outer_2
    m_tiles = tl.cdiv(M, BM)
    i_outer = tl.program_id(0) // m_tiles
    i_m = (tl.program_id(0) % m_tiles).to(tl.int64) * BM + tl.arange(0, BM)
    i_n = tl.arange(0, BN).to(tl.int64)
    m_m, m_n = i_m < M, i_n < N
    m = m_m[:, None] & m_n[None, :]

    b_x = operand(p_x, x_strides, i_outer, sizes, i_m, i_n, m_m, m_n, True, True)
    o_y = origin(i_outer, sizes, y_strides[2])
    if p_h is not None:
        b_h = operand(p_h, h_strides, i_outer, sizes, i_m, i_n, m_m, m_n, True, True)
        if p_gate is not None:
            b_h *= operand(p_gate, gate_strides, i_outer, sizes, i_m, i_n, m_m, m_n, CONTEXT_BY_ROW, True)
        b_rounded = (b_x + b_h).to(p_x.dtype.element_ty)
        stored(p_x_new, y_strides, o_y, i_m, i_n, m, b_rounded, True, True)
        b_x = widened(b_rounded)  # the gradients are of what is stored
    o_stat = origin(i_outer, sizes, stat_strides[2])
    if p_mean is not None:
        b_mean = divided(tl.sum(b_x, 1, keep_dims=True), N)
        stored(p_mean, stat_strides, o_stat, i_m, i_n, m_m[:, None], b_mean, True, False)
        b_x = tl.where(m, b_x - b_mean, 0.0)
    b_rstd = _inverse_root(divided(tl.sum(b_x * b_x, 1, keep_dims=True), N), eps)
    stored(p_rstd, stat_strides, o_stat, i_m, i_n, m_m[:, None], b_rstd, True, False)
    b_y = b_x * b_rstd
    if p_weight is not None:
        b_y *= operand(p_weight, weight_strides, i_outer, sizes, i_m, i_n, m_m, m_n, WEIGHT_BY_ROW, True)
    if p_bias is not None:
        b_y += operand(p_bias, bias_strides, i_outer, sizes, i_m, i_n, m_m, m_n, WEIGHT_BY_ROW, True)
    if p_scale is not None:
        b_scale = operand(p_scale, scale_strides, i_outer, sizes, i_m, i_n, m_m, m_n, CONTEXT_BY_ROW, True)
        b_y *= factor(ACTIVATION, b_scale, scale_offset)
    if p_shift is not None:
        b_y += operand(p_shift, shift_strides, i_outer, sizes, i_m, i_n, m_m, m_n, CONTEXT_BY_ROW, True)
    stored(p_y, y_strides, o_y, i_m, i_n, m, b_y, True, True)


@triton.jit(do_not_specialize_on_alignment=SIZES_THAT_CHANGE)
def _norm_maps_kernel(
    p_x,
    p_h,
    p_gate,
    p_scale,
    p_shift,
    p_weight,
    p_bias,
    p_y,
    p_x_new,
    p_mean,
    p_rstd,
    p_parts,  # [3, tiles, sets]: elements, means and sums of squares around them; only of SUMS
    eps: tl.float64,
    scale_offset: tl.float64,
    M,  # channels and positions, or positions and channels
    N,
    outer_0,
    outer_1,
    outer_2,
    sets,
    x_strides,
    h_strides,
    gate_strides,
    scale_strides,
    shift_strides,
    weight_strides,
    bias_strides,
    y_strides,
    CENTER: tl.constexpr,
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

    b_x = operand(p_x, x_strides, i_set, sizes, i_m, i_n, m_m, m_n, True, True)
    o_y = origin(i_set, sizes, y_strides[2])
    if p_h is not None:
        b_h = operand(p_h, h_strides, i_set, sizes, i_m, i_n, m_m, m_n, True, True)
        if p_gate is not None:
            b_h *= operand(p_gate, gate_strides, i_set, sizes, i_m, i_n, m_m, m_n, BY_ROW, BY_COLUMN)
        b_rounded = (b_x + b_h).to(p_x.dtype.element_ty)
        stored(p_x_new, y_strides, o_y, i_m, i_n, m, b_rounded, True, True)
        b_x = widened(b_rounded)
    if PASS == APPLY:
        if CENTER:
            b_x -= tl.load(p_mean + i_set)
        b_rstd = tl.load(p_rstd + i_set)
    else:
        rows, columns = tl.minimum(M - m_tile * BM, BM), tl.minimum(N - n_tile * BN, BN)
        b_size = number(rows, b_x) * number(columns, b_x)
        if CENTER:
            b_mean = quotient(tl.sum(tl.sum(b_x, 1, keep_dims=True), 0, keep_dims=True), b_size)
            b_x = tl.where(m, b_x - b_mean, 0.0)
        b_square = tl.sum(tl.sum(b_x * b_x, 1, keep_dims=True), 0, keep_dims=True)
        if PASS == SUMS:
            tile = m_tile * tl.cdiv(N, BN) + n_tile
            tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
            o = tile.to(tl.int64) * sets + i_set + tl.zeros([1, 1], tl.int64)
            part = tiles.to(tl.int64) * sets
            tl.store(p_parts + o, b_size)
            if CENTER:
                tl.store(p_parts + (o + part), b_mean)
            tl.store(p_parts + (o + 2 * part), b_square)
        else:
            o = i_set + tl.zeros([1, 1], tl.int64)
            if CENTER:
                tl.store(p_mean + o, b_mean)
            b_rstd = _inverse_root(quotient(b_square, b_size), eps)
            tl.store(p_rstd + o, b_rstd)
    if PASS != SUMS:
        b_y = b_x * b_rstd
        if p_weight is not None:
            b_y *= operand(p_weight, weight_strides, i_set, sizes, i_m, i_n, m_m, m_n, BY_ROW, BY_COLUMN)
        if p_bias is not None:
            b_y += operand(p_bias, bias_strides, i_set, sizes, i_m, i_n, m_m, m_n, BY_ROW, BY_COLUMN)
        if p_scale is not None:
            b = operand(p_scale, scale_strides, i_set, sizes, i_m, i_n, m_m, m_n, BY_ROW, BY_COLUMN)
            b_y *= factor(ACTIVATION, b, scale_offset)
        if p_shift is not None:
            b_y += operand(p_shift, shift_strides, i_set, sizes, i_m, i_n, m_m, m_n, BY_ROW, BY_COLUMN)
        stored(p_y, y_strides, o_y, i_m, i_n, m, b_y, True, True)
