"""A step in one, two or three launches: a program has a block of rows and a block of columns or units.

The products with the state loop over blocks of K (engine.py), and what follows them is in the same kernel
(recurrent_cells.py), with all gates of a block of units in one program. ``ROLE`` says what follows:

    factor     a, then the operand of the product with weight_hm
    plain, lstm   the cell
    reset, candidate   the two halves of a GRU
    project    weight_hr times the hidden units

and in the backward pass

    state      of h after the step: from the step after it, and grad; then the cell where CELL names it
    hidden     of o tanh(c), through weight_hr; then the cell
    reset      of r h, then that of r
    factor     of the operand of the product with weight_hm

``step``, ``previous``, T and B are not compiled for. States are read from one buffer and written to another,
since the programs of a launch read states that others write.
"""

import triton
import triton.language as tl

from .elementwise import widened
from .engine import accumulate, remaining
from .recurrent_cells import (
    candidate_step,
    carried,
    cell_step,
    ends_of,
    factor_step,
    gate_columns,
    keep,
    loaded,
    of_gate,
    reset_step,
    state_step,
    store,
    tile_of,
)
from .recurrent_slopes import (
    added,
    candidate_tangents,
    cell_grads,
    cell_tangents,
    factor_grads,
    factor_tangents,
    gate_grads,
    reset_grads,
    reset_tangents,
    update_grads,
)

UNSPECIALISED = ("step", "previous", "T", "B")


@triton.jit
def block_of(B, C, BM: tl.constexpr, BU: tl.constexpr, GATES: tl.constexpr, INDEX: tl.constexpr):
    """The block's number, first row, rows, columns [GATES BU] and units [BU], the latter with their masks."""
    u_blocks = tl.cdiv(C, BU)
    m_block, u_block = tl.program_id(0) // u_blocks, tl.program_id(0) % u_blocks
    row, rows, first = m_block.to(tl.int64) * BM, tl.arange(0, BM).to(INDEX), (u_block * BU).to(INDEX)
    m_m = rows < remaining(B, row, BM)
    columns, m_n = gate_columns(tl.arange(0, GATES * BU).to(INDEX), first, C, BU)
    units = first + tl.arange(0, BU).to(INDEX)
    return m_block, (row, rows, m_m), (columns, m_n), (units, units < C)


@triton.jit
def a_operand(a, t, block, k_range):
    row, rows, m_m = block
    origin = a[0] + t * a[1] + row * a[2]
    return origin, rows[:, None] * a[2] + k_range[None, :] * a[3], m_m[:, None], a[3]


@triton.jit
def plain_product(acc, a, w, K, t, block, columns, PRECISION: tl.constexpr, BK: tl.constexpr):
    """acc + a w^T of a [T, B, K] at a step, and w [N, K]."""
    k_range = tl.arange(0, BK).to(block[1].dtype)
    of_a = a_operand(a, t, block, k_range)
    of_b = w[0], columns[0][None, :] * w[1] + k_range[:, None] * w[2], columns[1][None, :], 0, w[2]
    acc, _ = accumulate(acc, acc, of_a, of_b, None, None, None, 1, 0, K, True, "plain", PRECISION, BK)
    return acc


@triton.jit
def products(
    first,  # (a, w, K) of weight_hm and weight_mh
    second,  # (a, w, K) of weight_hh; a is the context of the dense product, too
    dense,  # (x, w, X), w (pointer, strides of n, i and k)
    t,
    block,
    columns,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BM, BN], the sum of the products that there are."""
    acc = tl.zeros((BM, BN), ACCUMULATE)
    if first[1] is not None:
        acc = plain_product(acc, first[0], first[1], first[2], t, block, columns, PRECISION, BK)
    if dense[1] is not None:
        w, z = dense[1], second[0]
        k_range = tl.arange(0, BK).to(block[1].dtype)
        of_a = a_operand(dense[0], t, block, k_range)
        of_b = w[0], columns[0][None, :] * w[1] + k_range[:, None] * w[3], columns[1][None, :], w[2], w[3]
        s = z[0] + t * z[1] + block[0] * z[2], block[1] * z[2], block[2], z[3]
        acc, _ = accumulate(
            acc, acc, of_a, of_b, None, s, None, second[2], 0, dense[2], True, "promoted", PRECISION, BK
        )
    if second[1] is not None:
        acc = plain_product(acc, second[0], second[1], second[2], t, block, columns, PRECISION, BK)
    return acc


@triton.jit(do_not_specialize=UNSPECIALISED)
def _step_kernel(
    step,
    a1,
    w1,
    K1,
    a2,
    w2,
    K2,
    x,
    w,
    X,
    lengths,
    h,  # states before the step, and after it
    h_next,
    c,
    c_next,
    z,  # scratch of a GRU
    result,  # scratch: what the next launch reads
    gates_x,
    factors_x,
    integration,
    out,
    gates,
    products_,
    cells,
    T,
    B,
    C,  # columns of the launch: units, features of the state or factors
    ROLE: tl.constexpr,
    GATES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, block, g, u = block_of(B, C, BM, BU, GATES, INDEX)
    row, rows, m_m = block
    t = tl.cast(step, tl.int64)
    ends = ends_of(lengths, T, row, rows, m_m)
    g_tile = tile_of(t, row, rows, m_m, ends, g[0], g[1])
    u_tile = tile_of(t, row, rows, m_m, ends, u[0], u[1])
    first, second, dense = (a1, w1, K1), (a2, w2, K2), (x, w, X)
    acc = products(
        first, second, dense, t, block, g, BM, GATES * BU, BK, ACCUMULATE, PRECISION
    )  # fmt: skip
    if ROLE == "factor":
        store(result, u_tile, factor_step(acc, u_tile, factors_x, products_))
    elif ROLE == "reset":
        b_reset, b_z = reset_step(acc, carried(h, u_tile), g_tile, u_tile, gates_x, integration, products_)
        store(result, u_tile, b_reset)
        store(z, u_tile, b_z)
    else:
        if ROLE == "project":
            new = acc
        elif ROLE == "candidate":
            n_tile, b_z = of_gate(u_tile, 2, C), carried(z, u_tile)
            new = candidate_step(acc, b_z, carried(h, u_tile), n_tile, gates_x, integration, products_)
        else:
            b_c = acc
            if ROLE == "lstm":
                b_c = carried(c, u_tile)
            new, b_c = cell_step(
                acc, b_c, g_tile, u_tile, gates_x, integration, gates, products_, cells, ROLE, ACTIVATION
            )
            if ROLE == "lstm":
                store(c_next, u_tile, b_c)
        if result is not None:
            keep(result, u_tile, new)
        else:
            store(h_next, u_tile, state_step(new, carried(h, u_tile), u_tile, out))


@triton.jit(do_not_specialize=UNSPECIALISED)
def _step_grads_kernel(
    step,
    previous,  # the step that was processed before, or -1; of it are the products of the role state
    a1,
    w1,
    K1,
    a2,
    w2,
    K2,
    x,
    w,
    X,
    lengths,
    grad,
    h,  # gradients of h after the step, but for grad; they are those of h before it in the next launch
    h_next,
    direct,  # what reaches the state of a GRU without a product
    direct_next,
    c,
    c_next,
    gates_x,
    factors_x,
    h0,
    c0,
    out,
    gates,
    products_,
    cells,
    integration,
    r_gates,
    r_factors,
    r_products,
    r_out,
    sums,  # [blocks of rows, 4, columns]
    sums_next,
    N,
    T,
    B,
    C,
    ROLE: tl.constexpr,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
    INDEX: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m_block, block, g, u = block_of(B, C, BM, BU, GATES, INDEX)
    row, rows, m_m = block
    t = tl.cast(step, tl.int64)
    ends = ends_of(lengths, T, row, rows, m_m)
    g_tile = tile_of(t, row, rows, m_m, ends, g[0], g[1])
    u_tile = tile_of(t, row, rows, m_m, ends, u[0], u[1])
    t_a = t
    if ROLE == "state":
        t_a = tl.cast(previous, tl.int64)
        K1, K2, X = tl.where(t_a < 0, 0, K1), tl.where(t_a < 0, 0, K2), tl.where(t_a < 0, 0, X)
    acc = products((a1, w1, K1), (a2, w2, K2), (x, w, X), t_a, block, u, BM, BU, BK, ACCUMULATE, PRECISION)
    partial = sums, sums, N
    if sums is not None:
        partial = sums + m_block.to(tl.int64) * 4 * N, sums_next + m_block.to(tl.int64) * 4 * N, N
    if ROLE == "state":
        p_tile = tile_of(tl.where(t_a < 0, T, t_a), row, rows, m_m, ends, u[0], u[1])
        if direct is not None:
            acc += carried(direct, u_tile)
        acc = tl.where(p_tile[5], acc, carried(h, u_tile))
        store(h_next, u_tile, acc)
        if grad is not None:
            acc += loaded(grad, u_tile)
        keep(r_out, u_tile, acc)
    if ROLE == "factor":
        factor_grads(acc, u_tile, factors_x, products_, r_factors, r_products)
    elif ROLE == "reset":
        _, b_direct = reset_grads(
            acc, carried(direct, u_tile), u_tile, gates_x, out, h0, products_, integration, r_gates,
            r_products, partial, REVERSE,
        )  # fmt: skip
        store(direct_next, u_tile, b_direct)
    elif CELL == "gru":
        _, _, b_direct = update_grads(
            acc, u_tile, gates_x, out, h0, products_, integration, r_gates, r_products, partial, C, REVERSE
        )
        store(direct_next, u_tile, b_direct)
    elif CELL is not None:
        b_c = acc
        if CELL == "lstm":
            b_c = carried(c, u_tile)
        b_gates, b_c = cell_grads(
            acc, b_c, g_tile, u_tile, gates_x, out, gates, products_, cells, c0, integration, CELL,
            ACTIVATION, REVERSE,
        )  # fmt: skip
        if CELL == "lstm":
            store(c_next, u_tile, b_c)
        gate_grads(b_gates, g_tile, gates_x, products_, integration, r_gates, r_products, partial)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _step_tangents_kernel(
    step,
    a1,
    w1,
    K1,
    a2,
    w2,
    K2,
    x,
    w,
    X,
    lengths,
    h,
    h_next,
    c,
    c_next,
    z,
    result,
    gates_t,
    factors_t,
    products_t,
    out_t,
    gates_x,
    factors_x,
    h0,
    c0,
    out,
    gates,
    products_,
    cells,
    integration,
    r_out,
    T,
    B,
    C,
    ROLE: tl.constexpr,
    GATES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
    INDEX: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, block, g, u = block_of(B, C, BM, BU, GATES, INDEX)
    row, rows, m_m = block
    t = tl.cast(step, tl.int64)
    ends = ends_of(lengths, T, row, rows, m_m)
    g_tile = tile_of(t, row, rows, m_m, ends, g[0], g[1])
    u_tile = tile_of(t, row, rows, m_m, ends, u[0], u[1])
    first, second, dense = (a1, w1, K1), (a2, w2, K2), (x, w, X)
    acc = products(
        first, second, dense, t, block, g, BM, GATES * BU, BK, ACCUMULATE, PRECISION
    )  # fmt: skip
    if ROLE == "factor":
        store(result, u_tile, factor_tangents(acc, u_tile, factors_x, factors_t, products_, products_t))
    elif ROLE == "reset":
        b_reset, b_z = reset_tangents(
            acc, widened(carried(h, u_tile)), g_tile, u_tile, gates_t, products_t, gates_x, out, h0,
            products_, integration, REVERSE,
        )  # fmt: skip
        store(result, u_tile, b_reset)
        store(z, u_tile, b_z)
    else:
        if ROLE == "project":
            new = added(acc, out_t, u_tile)
        elif ROLE == "candidate":
            new = candidate_tangents(
                acc, carried(z, u_tile), widened(carried(h, u_tile)), u_tile, gates_t, products_t, gates_x,
                out, h0, products_, integration, C, REVERSE,
            )  # fmt: skip
        else:
            b_c = acc
            if ROLE == "lstm":
                b_c = carried(c, u_tile)
            new, b_c = cell_tangents(
                acc, b_c, g_tile, u_tile, gates_t, products_t, gates_x, out, gates, products_, cells, c0,
                integration, ROLE, ACTIVATION, REVERSE,
            )  # fmt: skip
            if ROLE == "lstm":
                store(c_next, u_tile, b_c)
        if result is not None:
            keep(result, u_tile, new)
        else:
            store(h_next, u_tile, state_step(new, carried(h, u_tile), u_tile, r_out))
