"""What elementwise kernels share: tiles of operands over the axes of modulate_tiling.py.

An operand has size 1 along the axes of a tile in which it does not vary.
"""

import triton
import triton.language as tl


@triton.jit
def widened(t):
    if t.dtype == tl.float64:
        return t
    else:
        return t.to(tl.float32)


@triton.jit
def number(number, like):
    """A [1, 1] tensor in the dtype of ``like``."""
    return tl.full([1, 1], number, tl.float64).to(like.dtype)


@triton.jit
def origin(index, sizes, strides):
    """Where a tile begins: the offset of a linear index over three axes, the last of which is the fastest."""
    offset = (index * 0).to(tl.int64)
    for a in tl.static_range(3):
        offset += (index % sizes[2 - a]).to(tl.int64) * strides[2 - a]
        index = index // sizes[2 - a]
    return offset


@triton.jit
def pointers(p, strides, offset, i_m, i_n, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Pointers [BM or 1, BN or 1]: size 1 along an axis in which the operand does not vary."""
    p += offset
    if BY_ROW:
        p += i_m[:, None] * strides[0]
    else:
        p += tl.zeros([1, 1], tl.int64)
    if BY_COLUMN:
        p += i_n[None, :] * strides[1]
    return p


@triton.jit
def tile_mask(m_m, m_n, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr):
    everywhere = tl.full([1, 1], 1, tl.int1)
    if BY_ROW:
        everywhere = everywhere & m_m[:, None]
    if BY_COLUMN:
        everywhere = everywhere & m_n[None, :]
    return everywhere


@triton.jit
def loaded(p, strides, offset, i_m, i_n, m_m, m_n, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr):
    m = tile_mask(m_m, m_n, BY_ROW, BY_COLUMN)
    return widened(tl.load(pointers(p, strides, offset, i_m, i_n, BY_ROW, BY_COLUMN), m, other=0.0))
