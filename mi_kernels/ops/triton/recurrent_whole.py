"""All steps in one launch, for weights that fit on chip: a program has a block of rows, and all their units.

The weights are loaded before the loop, the states stay in registers; a step reads what depends on x and
writes its results. Nothing that is written is read again but the sums for ``integration``, by the program
that wrote them, behind a barrier.
"""

import triton
import triton.language as tl

from .elementwise import widened
from .engine import remaining
from .recurrent_cells import (
    candidate_step,
    carried,
    cell_step,
    ends_of,
    factor_step,
    gate_columns,
    joined_halves,
    keep,
    live,
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


@triton.jit
def held(w, i_n, m_n, i_k, m_k):
    """A whole weight [N, K] as a tile [BK, BN], or None."""
    if w is None:
        return None
    else:
        p = w[0] + i_n[None, :] * w[1] + i_k[:, None] * w[2]
        return tl.load(p, mask=m_n[None, :] & m_k[:, None], other=0.0)


@triton.jit
def held_dense(w, size, context, BU: tl.constexpr, BI: tl.constexpr, i_k, m_k):
    """W [N, I, K] as a tile [BK, BI BU], or None."""
    if w is None:
        return None
    else:
        columns = tl.arange(0, BI * BU)
        i_i, i_n = columns // BU, columns % BU
        p = w[0] + i_n[None, :] * w[1] + i_i[None, :] * w[2] + i_k[:, None] * w[3]
        return tl.load(p, mask=((i_n < size) & (i_i < context))[None, :] & m_k[:, None], other=0.0)


@triton.jit
def dot(a, b_w, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(b_w.dtype), b_w, input_precision=PRECISION, out_dtype=ACCUMULATE)


@triton.jit
def dense_dot(z, x, b_w, tile, context, BI: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr):
    """sum_i z_i (W_i x): z is rounded as an operand, but not its products."""
    part = dot(loaded(x, tile), b_w, ACCUMULATE, PRECISION)
    part = tl.reshape(part, (part.shape[0], BI, part.shape[1] // BI))
    # W_i x is NaN for i that do not exist, where x is infinite.
    used = tl.arange(0, BI)[None, :, None] < context
    z = z.to(b_w.dtype).to(ACCUMULATE)
    return tl.sum(tl.where(used, part * z[:, :, None], 0.0), 1)


@triton.jit
def frame(
    lengths,
    T,
    B,
    H,
    P,
    M,
    GATES: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """First row, rows, their mask and ends; columns of gates, units, state and factors with their masks."""
    row, rows = tl.program_id(0).to(tl.int64) * BM, tl.arange(0, BM).to(INDEX)
    m_m = rows < remaining(B, row, BM)
    i_n, m_n = gate_columns(tl.arange(0, GATES * BU).to(INDEX), 0, H, BU)
    i_u, i_p, i_k = tl.arange(0, BU).to(INDEX), tl.arange(0, BP).to(INDEX), tl.arange(0, BK).to(INDEX)
    block = row, rows, m_m, ends_of(lengths, T, row, rows, m_m)
    return block, (i_n, m_n), (i_u, i_u < H), (i_p, i_p < P), (i_k, i_k < M)


@triton.jit
def at(t, block, columns):
    """The tile of a step."""
    return tile_of(t, block[0], block[1], block[2], block[3], columns[0], columns[1])


@triton.jit(do_not_specialize=("T", "B"))
def _whole_kernel(
    gates_x,
    factors_x,
    h0,
    c0,
    weight_hh,  # of a GRU, of its first two gates
    weight_n,  # of its last
    weight_hm,
    weight_mh,
    weight,
    weight_hr,
    integration,
    lengths,
    out,
    h_n,
    c_n,
    gates,
    products,
    cells,
    hidden,
    T,
    B,
    H,
    P,
    M,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
    INDEX: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, n, u, p, k = frame(lengths, T, B, H, P, M, GATES, BM, BU, BP, BK, INDEX)
    w_hh, w_n = held(weight_hh, n[0], n[1], p[0], p[1]), held(weight_n, u[0], u[1], p[0], p[1])
    w_hm, w_mh = held(weight_hm, n[0], n[1], k[0], k[1]), held(weight_mh, k[0], k[1], p[0], p[1])
    w_hr, w = held(weight_hr, p[0], p[1], u[0], u[1]), held_dense(weight, H, P, BU, BP, k[0], k[1])
    first = tl.cast(0, tl.int64)
    b_h = carried(h0, at(first, block, p))
    b_c = tl.zeros((BM, BU), ACCUMULATE)
    if c0 is not None:
        b_c = widened(carried(c0, at(first, block, u)))
    for step in range(T):
        t = tl.cast(step, tl.int64)
        if REVERSE:
            t = T - 1 - t
        g_tile, u_tile = at(t, block, n), at(t, block, u)
        p_tile, k_tile = at(t, block, p), at(t, block, k)
        acc = tl.zeros((BM, GATES * BU), ACCUMULATE)
        if w_mh is not None:
            a = factor_step(dot(b_h, w_mh, ACCUMULATE, PRECISION), k_tile, factors_x, products)
            acc += dot(a, w_hm, ACCUMULATE, PRECISION)
        if w is not None:
            acc += dense_dot(b_h, factors_x, w, k_tile, P, BP, ACCUMULATE, PRECISION)
        if w_hh is not None:
            acc += dot(b_h, w_hh, ACCUMULATE, PRECISION)
        if CELL == "gru":
            b_reset, b_z = reset_step(acc, b_h, g_tile, u_tile, gates_x, integration, products)
            acc_n, n_tile = dot(b_reset, w_n, ACCUMULATE, PRECISION), of_gate(u_tile, 2, H)
            new = candidate_step(acc_n, b_z, b_h, n_tile, gates_x, integration, products)
        else:
            kept = products
            if w_mh is not None:
                kept = None
            new, b_c = cell_step(
                acc, b_c, g_tile, u_tile, gates_x, integration, gates, kept, cells, CELL, ACTIVATION
            )
        if w_hr is not None:
            keep(hidden, u_tile, new)
            new = dot(live(u_tile, new), w_hr, ACCUMULATE, PRECISION)
        b_h = state_step(new, b_h, p_tile, out)
    store(h_n, at(first, block, p), b_h)
    if c0 is not None:
        store(c_n, at(first, block, u), b_c)


@triton.jit(do_not_specialize=("T", "B"))
def _whole_grads_kernel(
    grad,
    grad_h,
    grad_c,
    gates_x,
    factors_x,
    h0,
    c0,
    out,
    gates,
    products,
    cells,
    weight_hh,  # transposed, as all weights here
    weight_n,
    weight_hm,
    weight_mh,
    weight,
    weight_hr,
    integration,
    lengths,
    r_gates,
    r_factors,
    r_products,
    r_h,
    r_c,
    r_out,
    sums,  # [2, blocks of rows, 4, N]
    T,
    B,
    H,
    P,
    M,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
    INDEX: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, n, u, p, k = frame(lengths, T, B, H, P, M, GATES, BM, BU, BP, BK, INDEX)
    w_hh, w_n = held(weight_hh, p[0], p[1], n[0], n[1]), held(weight_n, p[0], p[1], u[0], u[1])
    w_hm, w_mh = held(weight_hm, k[0], k[1], n[0], n[1]), held(weight_mh, p[0], p[1], k[0], k[1])
    w_hr, w = held(weight_hr, u[0], u[1], p[0], p[1]), held_dense(weight, P, H, BP, BU, k[0], k[1])
    first = tl.cast(0, tl.int64)
    b_h, b_c = tl.zeros((BM, BP), ACCUMULATE), tl.zeros((BM, BU), ACCUMULATE)
    if grad_h is not None:
        b_h = widened(carried(grad_h, at(first, block, p)))
    if grad_c is not None:
        b_c = widened(carried(grad_c, at(first, block, u)))
    for step in range(T):
        t = tl.cast(step, tl.int64)
        if not REVERSE:
            t = T - 1 - t
        g_tile, u_tile = at(t, block, n), at(t, block, u)
        p_tile, k_tile = at(t, block, p), at(t, block, k)
        partial = None, None, GATES * H
        if integration is not None:
            N = GATES * H
            if CELL == "gru":
                N += H
            own, half = tl.program_id(0).to(tl.int64) * 4 * N, tl.num_programs(0).to(tl.int64) * 4 * N
            partial = sums + (step % 2) * half + own, sums + ((step + 1) % 2) * half + own, N
        total = b_h
        if grad is not None:
            total += loaded(grad, p_tile)
        if w_hr is not None:
            keep(r_out, p_tile, total)
            total = dot(live(p_tile, total), w_hr, ACCUMULATE, PRECISION)
        if CELL == "gru":
            d_z, d_n, direct = update_grads(
                total, u_tile, gates_x, out, h0, products, integration, r_gates, r_products, partial, H,
                REVERSE,
            )  # fmt: skip
            d_reset = dot(d_n, w_n, ACCUMULATE, PRECISION)
            d_r, direct = reset_grads(
                d_reset, direct, u_tile, gates_x, out, h0, products, integration, r_gates, r_products,
                partial, REVERSE,
            )  # fmt: skip
            acc = direct + dot(joined_halves(d_r, d_z), w_hh, ACCUMULATE, PRECISION)
        else:
            d_pre, b_c = cell_grads(
                total, b_c, g_tile, u_tile, gates_x, out, gates, products, cells, c0, integration, CELL,
                ACTIVATION, REVERSE,
            )  # fmt: skip
            d_gates = gate_grads(d_pre, g_tile, gates_x, products, integration, r_gates, r_products, partial)
            acc = tl.zeros((BM, BP), ACCUMULATE)
            if w_mh is not None:
                d_m = dot(d_gates, w_hm, ACCUMULATE, PRECISION)
                d_a = factor_grads(d_m, k_tile, factors_x, products, r_factors, r_products)
                acc += dot(d_a, w_mh, ACCUMULATE, PRECISION)
            if w is not None:
                acc += dense_dot(d_gates, factors_x, w, k_tile, H, BU, ACCUMULATE, PRECISION)
            if w_hh is not None:
                acc += dot(d_gates, w_hh, ACCUMULATE, PRECISION)
        b_h = tl.where(p_tile[5], acc, b_h)
        if integration is not None:
            tl.debug_barrier()
    store(r_h, at(first, block, p), b_h)
    if c0 is not None:
        store(r_c, at(first, block, u), b_c)


@triton.jit(do_not_specialize=("T", "B"))
def _whole_tangents_kernel(
    gates_t,
    factors_t,
    products_t,
    out_t,
    h0_t,
    c0_t,
    gates_x,
    factors_x,
    h0,
    c0,
    out,
    gates,
    products,
    cells,
    weight_hh,
    weight_n,
    weight_hm,
    weight_mh,
    weight,
    weight_hr,
    integration,
    lengths,
    r_out,
    r_h,
    r_c,
    T,
    B,
    H,
    P,
    M,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
    INDEX: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, n, u, p, k = frame(lengths, T, B, H, P, M, GATES, BM, BU, BP, BK, INDEX)
    w_hh, w_n = held(weight_hh, n[0], n[1], p[0], p[1]), held(weight_n, u[0], u[1], p[0], p[1])
    w_hm, w_mh = held(weight_hm, n[0], n[1], k[0], k[1]), held(weight_mh, k[0], k[1], p[0], p[1])
    w_hr, w = held(weight_hr, p[0], p[1], u[0], u[1]), held_dense(weight, H, P, BU, BP, k[0], k[1])
    first = tl.cast(0, tl.int64)
    b_h = carried(h0_t, at(first, block, p))
    b_c = tl.zeros((BM, BU), ACCUMULATE)
    if c0_t is not None:
        b_c = widened(carried(c0_t, at(first, block, u)))
    for step in range(T):
        t = tl.cast(step, tl.int64)
        if REVERSE:
            t = T - 1 - t
        g_tile, u_tile = at(t, block, n), at(t, block, u)
        p_tile, k_tile = at(t, block, p), at(t, block, k)
        acc = tl.zeros((BM, GATES * BU), ACCUMULATE)
        if w_mh is not None:
            acc_m = dot(b_h, w_mh, ACCUMULATE, PRECISION)
            b_m = factor_tangents(acc_m, k_tile, factors_x, factors_t, products, products_t)
            acc += dot(b_m, w_hm, ACCUMULATE, PRECISION)
        if w is not None:
            acc += dense_dot(b_h, factors_x, w, k_tile, P, BP, ACCUMULATE, PRECISION)
        if w_hh is not None:
            acc += dot(b_h, w_hh, ACCUMULATE, PRECISION)
        if CELL == "gru":
            b_reset, b_z = reset_tangents(
                acc, widened(b_h), g_tile, u_tile, gates_t, products_t, gates_x, out, h0, products,
                integration, REVERSE,
            )  # fmt: skip
            new = candidate_tangents(
                dot(b_reset, w_n, ACCUMULATE, PRECISION), b_z, widened(b_h), u_tile, gates_t, products_t,
                gates_x, out, h0, products, integration, H, REVERSE,
            )  # fmt: skip
        else:
            new, b_c = cell_tangents(
                acc, b_c, g_tile, u_tile, gates_t, products_t, gates_x, out, gates, products, cells, c0,
                integration, CELL, ACTIVATION, REVERSE,
            )  # fmt: skip
        if w_hr is not None:
            new = added(dot(live(u_tile, new), w_hr, ACCUMULATE, PRECISION), out_t, p_tile)
        b_h = state_step(new, b_h, p_tile, r_out)
    store(r_h, at(first, block, p), b_h)
    if c0_t is not None:
        store(r_c, at(first, block, u), b_c)
