"""One main loop for every form: a matrix product whose left operand is generated a tile at a time.

    accumulator[m, n] += sum_i sum_k (a[m, k] * s) b[k, n, i]

How s enters is the style. It is a constant of the compilation, so each style compiles to its own loop:

    plain     s = 1, and there is one i: a matrix product
    scaled    s[m, i] multiplies the rows of a before the product
    held      the same with k outside: a tile of a stays in registers while i runs over it, W streams by
    promoted  s[m, i] multiplies the rows of the finished product over k, in the accumulation dtype
    k_scaled  s[k] multiplies the columns of a: dW_i = (g z_i)^T x, where k are the rows of the batch

scaled and held round s a to the dtype of the operands, as a materialised operand would. promoted does not,
and does not leave the range of float16; it is also what makes T = g W_i, of which dx and dz are both taken.

Operands are tuples (pointer, strides...), None where a term is absent; any stride, 0 included. Where a tile
begins is counted in int64; within a tile in int32 as long as its strides allow that (INDEX), which leaves
registers to the sums. Rows, columns and k beyond the sizes are masked in both operands, so that no NaN comes
from padding.
"""

import triton
import triton.language as tl


@triton.jit
def rounded_to_tf32(t):
    """float32 with the low 13 bits rounded away, half up: matrix instructions would cut them off."""
    bits = (t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    # The largest NaN would turn into -0.
    return tl.where(t == t, bits.to(tl.float32, bitcast=True), t)


@triton.jit
def k_scaled(b_a, b_s):
    """a[m, k] s[k]. In float16 the product is one of float32 that keeps 11 bits: g z may be tiny or huge."""
    if b_a.dtype == tl.float16:
        return rounded_to_tf32(b_a.to(tl.float32) * b_s.to(tl.float32)[None, :])
    else:  # another type: Triton takes no two from one function that returns before its end
        return b_a * b_s[None, :]


@triton.jit
def remaining(size, start, BLOCK: tl.constexpr):
    """How much of a block from ``start`` lies within ``size``."""
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
    count,  # how many i
    first,  # k from here
    last,  # to here
    WANT: tl.constexpr,  # whether acc is wanted, or dz alone
    STYLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    """acc and shift with all products added."""
    p_a, o_a, m_a, stride_a = a
    p_b, o_b, m_b, stride_bi, stride_bk = b
    lanes = tl.arange(0, BK)
    # 64-bit divisions are slow, and these are within 31 bits.
    k_steps, count = tl.cast(tl.cdiv(last - first, BK), tl.int32), tl.cast(count, tl.int32)
    if STYLE == "held":
        turns, steps = k_steps, count
    else:
        turns, steps = 1, k_steps * count
    if STYLE == "promoted":
        part = tl.zeros_like(acc)
    for turn in range(turns):
        if STYLE == "held":
            k = first + tl.cast(turn, tl.int64) * BK
            m_k = lanes < remaining(last, k, BK)
            b_held = tl.load(p_a + k * stride_a + o_a, mask=m_a & m_k[None, :], other=0.0)
        for step in tl.range(0, steps):
            if STYLE == "held":
                i = tl.cast(step, tl.int64)
            elif STYLE == "scaled" or STYLE == "promoted":
                i = tl.cast(step // k_steps, tl.int64)
                k = first + tl.cast(step % k_steps, tl.int64) * BK
            else:
                i = tl.cast(0, tl.int64)
                k = first + tl.cast(step, tl.int64) * BK
            m_k = lanes < remaining(last, k, BK)
            b_b = tl.load(p_b + i * stride_bi + k * stride_bk + o_b, mask=m_b & m_k[:, None], other=0.0)
            if STYLE == "held":
                b_a = b_held
            else:
                b_a = tl.load(p_a + k * stride_a + o_a, mask=m_a & m_k[None, :], other=0.0)
            if STYLE == "held" or STYLE == "scaled":
                b_a = b_a * tl.load(s[0] + i * s[3] + s[1], mask=s[2], other=0.0)[:, None]
                b_a = tl.where(m_k[None, :], b_a, tl.zeros_like(b_a))  # padding times Inf
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
                        # Columns of padding hold NaN where a row of a holds Inf.
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
def tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Which tile a program makes, and of which matrix. Bands of rows share columns of W in the L2 cache."""
    BAND: tl.constexpr = 8
    down, across = tl.cast(tl.cdiv(M, BM), tl.int32), tl.cast(tl.cdiv(N, BN), tl.int32)
    matrix, place = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    band, within = place // (BAND * across), place % (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    return matrix, (band * BAND + within % height).to(tl.int64), (within // height).to(tl.int64)


@triton.jit
def tile(origin, row_stride, column_stride, rows, columns):
    """(pointer, offsets) of a tile, rows and columns counted from its origin."""
    return origin, rows[:, None] * row_stride + columns[None, :] * column_stride


@triton.jit
def right(operand, group, start, columns, m_columns, lanes):
    """The right operand of a plain product, a matrix [G, N, K], from column ``start``."""
    origin = operand[0] + group * operand[1] + start * operand[2]
    offsets = columns[None, :] * operand[2] + lanes[:, None] * operand[3]
    return origin, offsets, m_columns[None, :], 0, operand[3]
