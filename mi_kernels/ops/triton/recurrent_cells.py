"""What a step does beside its products with the state: cells, interactions, and their derivatives.

Both forms of the kernels call these functions, one in a program that makes all steps, one in a launch a step.
An operand [T, B, N] is a tuple (pointer, strides of step, row, column), None where it is absent; what has no
steps has stride 0 there. A tile is a tuple

    (step, first row, rows [BM], columns [BN], mask, mask of rows that make the step, ends [BM],
     mask of columns [BN])

with rows relative to the first, and the step after the last of each row as its end. Offsets within a tile are
of the dtype of rows and columns, int32 where all strides allow that: the loop over all steps keeps those of
every operand in registers. What belongs to the gates of a block of units is a tile of its own, a gate after
the other: its columns are those of one gate, then those of the next.
"""

import triton
import triton.language as tl

from . import activations
from .activations import sigmoid, tanh
from .elementwise import widened


@triton.jit
def ends_of(lengths, T, row, rows, m_m):
    """[BM], the step after the last one of each row; 0 beyond the batch."""
    if lengths is None:
        return tl.where(m_m, T, 0)
    else:
        return tl.load(lengths[0] + row * lengths[1] + rows * lengths[1], mask=m_m, other=0)


@triton.jit
def tile_of(t, row, rows, m_m, ends, columns, m_n):
    m = m_m[:, None] & m_n[None, :]
    return t, row, rows, columns, m, m & (t < ends)[:, None], ends, m_n


@triton.jit
def gate_columns(columns, first, size, BU: tl.constexpr):
    """Columns of gates, and whether they exist, of the indices [G BU] of a block from the unit ``first``."""
    units = first + columns % BU
    return (columns // BU) * size + units, units < size


@triton.jit
def of_gate(tile, gate, size):
    """The tile of a later gate than that of ``tile``."""
    return tile[0], tile[1], tile[2], tile[3] + gate * size, tile[4], tile[5], tile[6], tile[7]


@triton.jit
def pointers(p, t, tile):
    return p[0] + t * p[1] + tile[1] * p[2] + (tile[2][:, None] * p[2] + tile[3][None, :] * p[3])


@triton.jit
def loaded(p, tile):
    """In the accumulation dtype, 0 for rows that do not make the step: their memory is not read."""
    return widened(tl.load(pointers(p, tile[0], tile), mask=tile[5], other=0.0))


@triton.jit
def carried(p, tile):
    """The state of all rows, as it is."""
    return tl.load(pointers(p, tile[0], tile), mask=tile[4], other=0.0)


@triton.jit
def live(tile, b):
    """Zero where a row does not make the step, or does not exist."""
    return tl.where(tile[5], b, tl.zeros_like(b))


@triton.jit
def store(p, tile, b):
    tl.store(pointers(p, tile[0], tile), b.to(p[0].dtype.element_ty), mask=tile[4])


@triton.jit
def keep(p, tile, b):
    """Store a result of the step, zero for rows that do not make it, if it is wanted."""
    if p is not None:
        store(p, tile, live(tile, b))


@triton.jit
def before(p, first, tile, REVERSE: tl.constexpr):
    """What an operand was before the step, ``first`` before a row's first one."""
    t, _, _, _, _, made, ends, _ = tile
    if REVERSE:
        begins = (t == ends - 1)[:, None]
        other = t + 1
    else:
        begins = (ends * 0 + t == 0)[:, None]
        other = t - 1
    begun = tl.load(pointers(p, other, tile), mask=made & (begins == 0), other=0.0)
    given = tl.load(pointers(first, 0, tile), mask=made & begins, other=0.0)
    return tl.where(begins, widened(given), widened(begun))


@triton.jit
def halves(b):
    """The tiles [BM, BU] of two gates."""
    return tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quarters(b):
    b = tl.permute(tl.reshape(b, (b.shape[0], 2, 2, b.shape[1] // 4)), (0, 3, 1, 2))
    even, odd = tl.split(b)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def joined_halves(a, b):
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def joined_quarters(a, b, c, d):
    whole = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    return tl.reshape(whole, (a.shape[0], 4 * a.shape[1]))


@triton.jit
def vector(integration, row, tile):
    """alpha (0), beta_h (1), beta_x (2) or b (3), [1, BN]; 0 beyond the columns."""
    p = integration[0] + row * integration[1] + tile[3] * integration[2]
    return widened(tl.load(p, mask=tile[7], other=0.0))[None, :]


@triton.jit
def integrate(q, x, integration, tile):
    by_h = q * (vector(integration, 0, tile) * x + vector(integration, 1, tile))
    return by_h + (vector(integration, 2, tile) * x + vector(integration, 3, tile))


@triton.jit
def pre_activation(product, gates_x, integration, tile):
    x = loaded(gates_x, tile)
    if integration is None:
        return x + product
    else:
        return integrate(product, x, integration, tile)


@triton.jit
def open_gates(pre):
    i, f, g, o = quarters(pre)
    return sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)


@triton.jit
def factor_step(a, tile, factors_x, products):
    """The operand of the product with weight_hm."""
    keep(products, tile, a)
    return live(tile, a * loaded(factors_x, tile))


@triton.jit
def cell_step(
    product,
    c,
    g_tile,
    u_tile,
    gates_x,
    integration,
    gates,
    products,
    cells,
    CELL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """h of the step, and c after it; c of a plain cell is passed through."""
    keep(products, g_tile, product)
    pre = pre_activation(product, gates_x, integration, g_tile)
    if CELL == "lstm":
        i, f, g, o = open_gates(pre)
        new = f * c + i * g
        keep(cells, u_tile, new)
        if gates is not None:
            keep(gates, g_tile, joined_quarters(i, f, g, o))
        return o * tanh(new), tl.where(u_tile[5], new, c)
    else:
        return activations.value(ACTIVATION, pre), c


@triton.jit
def reset_step(product, h, g_tile, u_tile, gates_x, integration, products):
    """r h and z."""
    keep(products, g_tile, product)
    r, z = halves(sigmoid(pre_activation(product, gates_x, integration, g_tile)))
    return live(u_tile, r * widened(h)), z


@triton.jit
def candidate_step(product, z, h, tile, gates_x, integration, products):
    """h of the step of a GRU; ``tile`` has the columns of n."""
    keep(products, tile, product)
    n = tanh(pre_activation(product, gates_x, integration, tile))
    return n + z * (widened(h) - n)


@triton.jit
def state_step(new, h, tile, out):
    """h after the step, in the dtype of the operands: the new one where a row makes the step."""
    new = new.to(h.dtype)
    keep(out, tile, new)
    return tl.where(tile[5], new, h)
