"""The kernels: a program computes a tile of the result with the engine's main loop and an epilogue.

    interaction    y, dx, dz, dx with dz, gates: rows of the batch are rows of a tile
    weight_grads   dW, dU, dV: sums over the rows of the batch
    softmax_gate   gates whose activation normalises over a row

Sizes M, N of the result and I, K of the sums are those of the call (docstring of interaction.py).

Triton specialises a kernel on whether each size and stride is 1, divisible by 16, or neither. The number of
parts of a sum changes with the batch and does not affect loads, so it is specialised on 1 only. (The same was
tried for M: a kernel then spilled, at 10.0 in tf32.)

A kernel is one function, whatever its length: it has 30 arguments, and its parts share them all.
"""

import triton
import triton.language as tl

from . import activations
from .engine import accumulate, b_operand, remaining, tile, tile_index


@triton.jit
def gated(acc, shift, b_gate, scale_offset, ACTIVATION: tl.constexpr):
    """Epilogue (act(p) + s) * x + shift."""
    return (activations.value(ACTIVATION, acc) + number(scale_offset, acc.dtype)) * b_gate + shift


@triton.jit
def number(value, DTYPE: tl.constexpr):
    """A [1, 1] tensor in the accumulation dtype."""
    return tl.full([1, 1], value, tl.float64).to(DTYPE)


@triton.jit(do_not_specialize_on_alignment=["splits", "parts"])
def interaction(
    y,  # (pointer, strides of split, group, row, column), or None
    p,  # pointer: the gate before its activation, with the strides of y; or None
    x,  # (pointer, strides of group, row, k)   [G, M, K]
    z,  # (pointer, strides of group, row, i)   [G, M, I]
    w,  # (pointer, strides of group, column, i, k)   [G, N, I, K], or None
    u,  # (pointer, strides of group, column, i)   [G, N, I], or None
    v,  # (pointer, strides of group, column, k)   [G, N, K], or None
    bias,  # (pointer, strides of group, column), or None
    shift_weight,  # as u, of the shift
    shift_bias,  # as bias, of the shift
    sums,  # (pointer, strides of part, group, row, column) of partial sums to add, or None
    gate,  # (pointer, strides of group, row, column): the factor of the activation, or x where dz is wanted
    dz,  # (pointer, strides of column tile, group, row, i), or None
    M,
    N,
    I,  # noqa: E741
    K,
    splits,  # parts of the sum over i, one program each
    parts,  # number of partial sums to add
    scale_offset: tl.float64,  # else Triton passes a float as float32
    ACTIVATION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STYLE: tl.constexpr,
    INDEX: tl.constexpr,  # dtype of offsets within a tile
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = gate(z^T W x + U z + V x + bias + sums, C z + shift bias); dz_i = sum_n x (W_i x)."""
    matrix, m_tile_index, n_tile_index = tile_index(M, N, BM, BN)
    group, split = (matrix // splits).to(tl.int64), (matrix % splits).to(tl.int64)
    row, column = m_tile_index * BM, n_tile_index * BN
    rows, columns = tl.arange(0, BM).to(INDEX), tl.arange(0, BN).to(INDEX)
    k_range = tl.arange(0, BK).to(INDEX)
    m_rows, m_columns = rows < remaining(M, row, BM), columns < remaining(N, column, BN)
    m_tile = m_rows[:, None] & m_columns[None, :]
    p_x, o_x = tile(x[0] + group * x[1] + row * x[2], x[2], x[3], rows, k_range)
    a_x = p_x, o_x, m_rows[:, None], x[3]
    p_z = z[0] + group * z[1] + row * z[2]
    acc = tl.zeros((BM, BN), ACCUMULATE)
    shift = acc
    if w is not None:
        each = tl.cdiv(I, splits)
        start = split * each
        count = tl.minimum(each, I - start)
        pair = None
        if dz is not None:
            b_gate = result_tile(gate, group, row, column, rows, columns, m_tile)
            p_dz = dz[0] + n_tile_index * dz[1] + group * dz[2] + row * dz[3] + start * dz[4]
            pair = b_gate, p_dz, rows * dz[3], m_rows, dz[4]
        p_w, o_w = tile(w[0] + group * w[1] + column * w[2] + start * w[3], w[4], w[2], k_range, columns)
        b_w = p_w, o_w, m_columns[None, :], w[3], w[4]
        s = p_z + start * z[3], rows * z[2], m_rows, z[3]
        acc, shift = accumulate(
            acc, shift, a_x, b_w, None, s, pair, count, 0, K, y is not None, STYLE, PRECISION, BK
        )
    if u is not None:
        p_z, o_z = tile(p_z, z[2], z[3], rows, k_range)
        a_z = p_z, o_z, m_rows[:, None], z[3]
        b_u = b_operand(u, group, column, columns, m_columns, k_range)
        b_c = None
        if shift_weight is not None:
            b_c = b_operand(shift_weight, group, column, columns, m_columns, k_range)
        acc, shift = accumulate(acc, shift, a_z, b_u, b_c, None, None, 1, 0, I, True, "plain", PRECISION, BK)
    if v is not None:
        b_v = b_operand(v, group, column, columns, m_columns, k_range)
        acc, shift = accumulate(acc, shift, a_x, b_v, None, None, None, 1, 0, K, True, "plain", PRECISION, BK)
    if y is not None:
        if bias is not None:
            acc += row_vector(bias, group, column, columns, m_columns).to(ACCUMULATE)
        if shift_bias is not None:
            shift += row_vector(shift_bias, group, column, columns, m_columns).to(ACCUMULATE)
        if sums is not None:
            p_sums = sums[0] + group * sums[2] + row * sums[3] + column * sums[4]
            p_sums, o_sums = tile(p_sums, sums[3], sums[4], rows, columns)
            for _ in range(parts):
                acc += tl.load(p_sums + o_sums, mask=m_tile, other=0.0)
                p_sums += sums[1]
        origin, o_y = tile(group * y[2] + row * y[3] + column * y[4], y[3], y[4], rows, columns)
        if p is not None:
            tl.store(p + origin + o_y, acc, mask=m_tile)
        if dz is None and gate is not None:
            b_gate = result_tile(gate, group, row, column, rows, columns, m_tile).to(ACCUMULATE)
            acc = gated(acc, shift, b_gate, scale_offset, ACTIVATION)
        tl.store(y[0] + split * y[1] + origin + o_y, acc, mask=m_tile)


@triton.jit
def result_tile(operand, group, row, column, rows, columns, m_tile):
    """A tile [BM, BN] of an operand [G, M, N]."""
    origin = operand[0] + group * operand[1] + row * operand[2] + column * operand[3]
    origin, offsets = tile(origin, operand[2], operand[3], rows, columns)
    return tl.load(origin + offsets, mask=m_tile, other=0.0)


@triton.jit
def row_vector(operand, group, column, columns, m_columns):
    """A row [1, BN] of an operand [G, N]."""
    p_row = operand[0] + group * operand[1] + column * operand[2]
    return tl.load(p_row + columns * operand[2], mask=m_columns, other=0.0)[None, :]


@triton.jit(do_not_specialize_on_alignment=["splits"])
def weight_grads(
    dw,  # (pointer, strides of split, group, o, i, j)   [parts, G, O, I, N]
    g,  # (pointer, strides of group, row, o)   [G, B, O]
    z,  # (pointer, strides of group, row, i)   [G, B, I], or None where I = 1
    x,  # (pointer, strides of group, row, j)   [G, B, N]
    M,  # O
    N,
    I,  # noqa: E741
    B,
    splits,  # parts of the batch, one program each
    each,  # rows of a part
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STYLE: tl.constexpr,
    INDEX: tl.constexpr,  # dtype of offsets within a tile
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dW[o, i, j] = sum_b (g[b, o] z[b, i]) x[b, j] of a tile of o and j; without z the product g^T x."""
    matrix, m_tile_index, n_tile_index = tile_index(M, N, BM, BN)
    split, i = (matrix % splits).to(tl.int64), (matrix // splits % I).to(tl.int64)
    group = (matrix // splits // I).to(tl.int64)
    out_feature, column = m_tile_index * BM, n_tile_index * BN
    outs, columns = tl.arange(0, BM).to(INDEX), tl.arange(0, BN).to(INDEX)
    k_range = tl.arange(0, BK).to(INDEX)
    m_outs, m_columns = outs < remaining(M, out_feature, BM), columns < remaining(N, column, BN)
    first = split * each
    last = tl.minimum(first + each, B)
    p_g, o_g = tile(g[0] + group * g[1] + out_feature * g[3], g[3], g[2], outs, k_range)
    p_x, o_x = tile(x[0] + group * x[1] + column * x[3], x[2], x[3], k_range, columns)
    s = None
    if z is not None:
        s = z[0] + group * z[1] + i * z[3], k_range * z[2], z[2]
    acc = tl.zeros((BM, BN), ACCUMULATE)
    a_g, b_x = (p_g, o_g, m_outs[:, None], g[2]), (p_x, o_x, m_columns[None, :], 0, x[2])
    acc, _ = accumulate(acc, acc, a_g, b_x, None, s, None, 1, first, last, True, STYLE, PRECISION, BK)
    p_dw = dw[0] + split * dw[1] + group * dw[2] + i * dw[4] + out_feature * dw[3] + column * dw[5]
    p_dw, o_dw = tile(p_dw, dw[3], dw[5], outs, columns)
    tl.store(p_dw + o_dw, acc, mask=m_outs[:, None] & m_columns[None, :])


@triton.jit
def softmax_gate(
    y,  # (pointer, stride of row)
    p,  # the same, or None
    gate,  # (pointer, stride of row), in the accumulation dtype
    shift,  # the same, or None
    x,  # (pointer, strides of row, column)
    N,
    scale_offset: tl.float64,
    BN: tl.constexpr,
):
    """y = (softmax(gate) + s) * x + shift of a row; p is the gate in the dtype of y."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BN)
    p_gate = gate[0] + row * gate[1] + columns
    largest = tl.full((BN,), float("-inf"), p_gate.dtype.element_ty)
    for start in range(0, N, BN):
        b_gate = tl.load(p_gate + start, mask=columns < N - start, other=float("-inf"))
        largest = tl.maximum(largest, b_gate)
    most = tl.max(largest, 0)
    total = tl.zeros((BN,), p_gate.dtype.element_ty)
    for start in range(0, N, BN):
        b_gate = tl.load(p_gate + start, mask=columns < N - start, other=float("-inf"))
        total += activations.exp(b_gate - most)
    whole = tl.sum(total, 0)
    for start in range(0, N, BN):
        m_columns = columns < N - start
        b_gate = tl.load(p_gate + start, mask=m_columns, other=0.0)
        b_x = tl.load(x[0] + row * x[1] + (start + columns).to(tl.int64) * x[2], mask=m_columns, other=0.0)
        b_y = activations.exp(b_gate - most) / whole + tl.full((BN,), scale_offset, tl.float64).to(
            b_gate.dtype
        )
        b_y *= b_x.to(b_gate.dtype)
        if shift is not None:
            b_y += tl.load(shift[0] + row * shift[1] + start + columns, mask=m_columns, other=0.0)
        tl.store(y[0] + row * y[1] + start + columns, b_y, mask=m_columns)
        if p is not None:
            tl.store(p[0] + row * p[1] + start + columns, b_gate, mask=m_columns)
