"""The main loop of all kernels: a matrix product whose A operand is generated tile by tile.

    accumulator[m, n] += sum_i sum_k (a[m, k] * s) b[k, n, i]

The style says how s is applied. It is a constexpr, so each style compiles to its own loop:

    plain     s = 1 and one i: a matrix product
    scaled    s[m, i] multiplies the rows of a before the product
    held      the same with k as the outer loop: a tile of a stays in registers for all i, W is streamed
    promoted  s[m, i] multiplies the rows of the finished product over k, in the accumulation dtype
    k_scaled  s[k] multiplies the columns of a: dW_i = (g z_i)^T x, where k are the rows of the batch

scaled and held round s a to the dtype of the operands, like a materialised operand. promoted does not, and
cannot overflow float16; it also computes T = g W_i, from which both dx and dz are reduced.

Operands are tuples (pointer, strides...), None where a term is absent; strides are arbitrary, 0 included. The
origin of a tile is in int64, offsets within a tile in int32 if its strides allow that (INDEX), which saves
registers for the accumulators. Rows, columns and k beyond the sizes are masked in both operands, so that
padding yields no NaN.
"""

import triton
import triton.language as tl


@triton.jit
def rounded_to_tf32(t):
    """float32 rounded to tf32, half up (matrix instructions would truncate the low 13 bits)."""
    bits = (t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    # The largest NaN would overflow to -0.
    return tl.where(t == t, bits.to(tl.float32, bitcast=True), t)


@triton.jit
def k_scaled(b_a, b_s):
    """a[m, k] s[k]. In float16 the product is in float32, rounded to 11 bits: g z may under- or overflow."""
    if b_a.dtype == tl.float16:
        return rounded_to_tf32(b_a.to(tl.float32) * b_s.to(tl.float32)[None, :])
    else:  # a branch of its own: Triton allows two return types only under a constexpr if/else
        return b_a * b_s[None, :]


@triton.jit
def remaining(size, start, BLOCK: tl.constexpr):
    """How many elements of a block from ``start`` are below ``size``."""
    return tl.minimum(size - start, BLOCK).to(tl.int32)


@triton.jit
def accumulate(
    acc,  # [BM, BN]
    shift,  # [BM, BN], or acc where there is no second product
    a,  # (pointer, offsets [BM, BK], mask [BM, 1], stride of k)
    b,  # (pointer, offsets [BK, BN], mask [1, BN], stride of i, stride of k)
    other,  # the same for the second product with a, or None
    s,  # (pointer, offsets [BM], mask [BM], stride of i); k_scaled: (pointer, offsets [BK], stride of k)
    pair,  # (x [BM, BN], pointer of dz, offsets [BM], mask [BM], stride of i), or None
    count,  # number of i
    first,  # first k
    last,  # end of k
    WANT: tl.constexpr,  # whether acc is wanted, or only dz
    STYLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """acc and shift plus all products."""
    p_a, o_a, m_a, stride_a = a
    p_b, o_b, m_b, stride_bi, stride_bk = b
    k_range = tl.arange(0, BK)
    # int32, as 64-bit divisions are slow; the values fit.
    k_steps, count = tl.cast(tl.cdiv(last - first, BK), tl.int32), tl.cast(count, tl.int32)
    if STYLE == "held":
        outer_steps, inner_steps = k_steps, count
    else:
        outer_steps, inner_steps = 1, k_steps * count
    if STYLE == "promoted":
        part = tl.zeros_like(acc)
    for outer in range(outer_steps):
        if STYLE == "held":
            k = first + tl.cast(outer, tl.int64) * BK
            m_k = k_range < remaining(last, k, BK)
            b_held = tl.load(p_a + k * stride_a + o_a, mask=m_a & m_k[None, :], other=0.0)
        for step in tl.range(0, inner_steps):
            if STYLE == "held":
                i = tl.cast(step, tl.int64)
            elif STYLE == "scaled" or STYLE == "promoted":
                i = tl.cast(step // k_steps, tl.int64)
                k = first + tl.cast(step % k_steps, tl.int64) * BK
            else:
                i = tl.cast(0, tl.int64)
                k = first + tl.cast(step, tl.int64) * BK
            m_k = k_range < remaining(last, k, BK)
            b_b = tl.load(p_b + i * stride_bi + k * stride_bk + o_b, mask=m_b & m_k[:, None], other=0.0)
            if STYLE == "held":
                b_a = b_held
            else:
                b_a = tl.load(p_a + k * stride_a + o_a, mask=m_a & m_k[None, :], other=0.0)
            if STYLE == "held" or STYLE == "scaled":
                b_a = b_a * tl.load(s[0] + i * s[3] + s[1], mask=s[2], other=0.0)[:, None]
                b_a = tl.where(m_k[None, :], b_a, tl.zeros_like(b_a))  # masks 0 * Inf
            if STYLE == "k_scaled":
                b_a = k_scaled(b_a, tl.load(s[0] + k * s[2] + s[1], mask=m_k, other=0.0))
                b_b = b_b.to(b_a.dtype)
            if STYLE == "promoted":
                part = tl.dot(b_a, b_b, part, input_precision=PRECISION, out_dtype=acc.dtype)
                if k + BK >= last:
                    if WANT:
                        b_s = tl.load(s[0] + i * s[3] + s[1], mask=s[2], other=0.0)
                        acc += part * b_s.to(acc.dtype)[:, None]
                    if pair is not None:
                        # Padded columns are NaN where a row of a has Inf.
                        products = tl.where(m_b, part * pair[0].to(acc.dtype), 0.0)
                        tl.store(pair[1] + i * pair[4] + pair[2], tl.sum(products, 1), mask=pair[3])
                    part = tl.zeros_like(acc)
            else:
                acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
                if other is not None:
                    p_c = other[0] + k * other[4] + other[1]
                    b_c = tl.load(p_c, mask=other[2] & m_k[:, None], other=0.0)
                    shift = tl.dot(b_a, b_c, shift, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, shift


@triton.jit
def tile_index(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """(matrix, row tile, column tile) of a program. Bands of row tiles share columns of W in the L2 cache."""
    BAND: tl.constexpr = 8
    m_tiles, n_tiles = tl.cast(tl.cdiv(M, BM), tl.int32), tl.cast(tl.cdiv(N, BN), tl.int32)
    matrix, index = tl.program_id(0) // (m_tiles * n_tiles), tl.program_id(0) % (m_tiles * n_tiles)
    band, within = index // (BAND * n_tiles), index % (BAND * n_tiles)
    height = tl.minimum(m_tiles - band * BAND, BAND)
    return matrix, (band * BAND + within % height).to(tl.int64), (within // height).to(tl.int64)


@triton.jit
def tile(origin, row_stride, column_stride, rows, columns):
    """(pointer, offsets) of a tile; rows and columns are relative to its origin."""
    return origin, rows[:, None] * row_stride + columns[None, :] * column_stride


@triton.jit
def b_operand(operand, group, start, columns, m_columns, k_range):
    """The B operand of a plain product, a matrix [G, N, K], from column ``start``."""
    origin = operand[0] + group * operand[1] + start * operand[2]
    offsets = columns[None, :] * operand[2] + k_range[:, None] * operand[3]
    return origin, offsets, m_columns[None, :], 0, operand[3]
