"""What the backward pass of a step and its tangents do beside their products: derivatives of cells.

Tiles and operands: recurrent_cells.py. All slopes follow from values of the forward pass: the gates of a lstm
that were kept, those that follow from the products, and h of a plain cell.
"""

import triton
import triton.language as tl

from .activations import sigmoid, tanh
from .recurrent_cells import (
    before,
    halves,
    integrate,
    joined_quarters,
    keep,
    live,
    loaded,
    of_gate,
    open_gates,
    quarters,
    vector,
)


@triton.jit
def slope_of_value(name: tl.constexpr, y):
    """f' of y = f(p)."""
    if name == "tanh":
        return 1.0 - y * y
    elif name == "relu":
        return tl.where(y > 0.0, 1.0, 0.0).to(y.dtype)
    elif name == "sigmoid":
        return y * (1.0 - y)
    else:
        tl.static_assert(name == "identity", "unknown activation")
        return tl.full(y.shape, 1.0, y.dtype)


@triton.jit
def kept_gates(g_tile, gates_x, gates, products, integration):
    if gates is not None:
        return quarters(loaded(gates, g_tile))
    else:
        q, x = loaded(products, g_tile), loaded(gates_x, g_tile)
        return open_gates(integrate(q, x, integration, g_tile))


@triton.jit
def gate_of_gru(tile, gates_x, products, integration):
    """Before its activation."""
    return integrate(loaded(products, tile), loaded(gates_x, tile), integration, tile)


@triton.jit
def cell_grads(
    dh,
    dc,
    g_tile,
    u_tile,
    gates_x,
    out,
    gates,
    products,
    cells,
    c0,
    integration,
    CELL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The gradients of what the activations are applied to, and of c before the step."""
    if CELL == "lstm":
        i, f, g, o = kept_gates(g_tile, gates_x, gates, products, integration)
        y = tanh(loaded(cells, u_tile))
        total = dc + dh * o * (1.0 - y * y)
        d_f = total * before(cells, c0, u_tile, REVERSE) * f * (1.0 - f)
        d_i, d_g = total * g * i * (1.0 - i), total * i * (1.0 - g * g)
        d_gates = joined_quarters(d_i, d_f, d_g, dh * y * o * (1.0 - o))
        return d_gates, tl.where(u_tile[5], total * f, dc)
    else:
        return dh * slope_of_value(ACTIVATION, loaded(out, u_tile)), dc


@triton.jit
def add_sums(sums, row, tile, term):
    """One of four sums over rows and steps of a block of rows, in float64, from one buffer to another."""
    source, target, step = sums
    offsets = row * step + tile[3]
    total = tl.load(source + offsets, mask=tile[7], other=0.0)
    tl.store(target + offsets, total + tl.sum(live(tile, term), 0).to(tl.float64), mask=tile[7])


@triton.jit
def gate_grads(d_pre, tile, gates_x, products, integration, r_gates, r_products, sums):
    """Stores the gradients of gates_x, and of q where there is one; returns what the products read."""
    if integration is None:
        keep(r_gates, tile, d_pre)
        return live(tile, d_pre)
    else:
        q, x = loaded(products, tile), loaded(gates_x, tile)
        alpha = vector(integration, 0, tile)
        d_q = d_pre * (alpha * x + vector(integration, 1, tile))
        keep(r_products, tile, d_q)
        keep(r_gates, tile, d_pre * (alpha * q + vector(integration, 2, tile)))
        by_x = d_pre * x
        add_sums(sums, 0, tile, by_x * q)
        add_sums(sums, 1, tile, d_pre * q)
        add_sums(sums, 2, tile, by_x)
        add_sums(sums, 3, tile, d_pre)
        return live(tile, d_q)


@triton.jit
def update_grads(
    dh, tile, gates_x, out, h0, products, integration, r_gates, r_products, sums, size, REVERSE: tl.constexpr
):
    """dq of z and n of a GRU, and what reaches h before the step by z; ``tile`` has the columns of r."""
    z_tile, n_tile = of_gate(tile, 1, size), of_gate(tile, 2, size)
    h = before(out, h0, tile, REVERSE)
    z = sigmoid(gate_of_gru(z_tile, gates_x, products, integration))
    n = tanh(gate_of_gru(n_tile, gates_x, products, integration))
    d_n, d_z = dh * (1.0 - z) * (1.0 - n * n), dh * (h - n) * z * (1.0 - z)
    dq_z = gate_grads(d_z, z_tile, gates_x, products, integration, r_gates, r_products, sums)
    dq_n = gate_grads(d_n, n_tile, gates_x, products, integration, r_gates, r_products, sums)
    return dq_z, dq_n, dh * z


@triton.jit
def reset_grads(
    d_reset,
    direct,
    tile,
    gates_x,
    out,
    h0,
    products,
    integration,
    r_gates,
    r_products,
    sums,
    REVERSE: tl.constexpr,
):
    """dq of r from the gradient of r h, and all that reaches h before the step without a product."""
    r = sigmoid(gate_of_gru(tile, gates_x, products, integration))
    d_r = d_reset * before(out, h0, tile, REVERSE) * r * (1.0 - r)
    dq_r = gate_grads(d_r, tile, gates_x, products, integration, r_gates, r_products, sums)
    return dq_r, direct + d_reset * r


@triton.jit
def factor_grads(d_m, tile, factors_x, products, r_factors, r_products):
    """Of factors_x and of the product with weight_mh; returns the latter."""
    d_a = live(tile, d_m * loaded(factors_x, tile))
    keep(r_factors, tile, d_m * loaded(products, tile))
    keep(r_products, tile, d_a)
    return d_a


@triton.jit
def added(product, p, tile):
    if p is None:
        return product
    else:
        return product + loaded(p, tile)


@triton.jit
def factor_tangents(product, tile, factors_x, factors_t, products, products_t):
    total = added(product, products_t, tile) * loaded(factors_x, tile)
    if factors_t is not None:
        total += loaded(products, tile) * loaded(factors_t, tile)
    return live(tile, total)


@triton.jit
def pre_tangents(product, tile, gates_t, products_t, gates_x, integration):
    if integration is not None:
        by_q = vector(integration, 0, tile) * loaded(gates_x, tile) + vector(integration, 1, tile)
        product = added(product, products_t, tile) * by_q
    return loaded(gates_t, tile) + product


@triton.jit
def cell_tangents(
    product,
    c_t,
    g_tile,
    u_tile,
    gates_t,
    products_t,
    gates_x,
    out,
    gates,
    products,
    cells,
    c0,
    integration,
    CELL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Tangents of h of the step, before it is projected, and of c after it."""
    pre_t = pre_tangents(product, g_tile, gates_t, products_t, gates_x, integration)
    if CELL == "lstm":
        i, f, g, o = kept_gates(g_tile, gates_x, gates, products, integration)
        i_t, f_t, g_t, o_t = quarters(pre_t)
        y = tanh(loaded(cells, u_tile))
        new = f_t * f * (1.0 - f) * before(cells, c0, u_tile, REVERSE) + f * c_t
        new += i_t * i * (1.0 - i) * g + i * g_t * (1.0 - g * g)
        h_t = o_t * o * (1.0 - o) * y + o * (1.0 - y * y) * new
        return h_t, tl.where(u_tile[5], new, c_t)
    else:
        return pre_t * slope_of_value(ACTIVATION, loaded(out, u_tile)), c_t


@triton.jit
def reset_tangents(
    product,
    h_t,
    g_tile,
    u_tile,
    gates_t,
    products_t,
    gates_x,
    out,
    h0,
    products,
    integration,
    REVERSE: tl.constexpr,
):
    """Tangents of r h and of z."""
    pre_t = pre_tangents(product, g_tile, gates_t, products_t, gates_x, integration)
    values = sigmoid(gate_of_gru(g_tile, gates_x, products, integration))
    r, _ = halves(values)
    r_t, z_t = halves(pre_t * values * (1.0 - values))
    h = before(out, h0, u_tile, REVERSE)
    return live(u_tile, r_t * h + r * h_t), z_t


@triton.jit
def candidate_tangents(
    product,
    z_t,
    h_t,
    u_tile,
    gates_t,
    products_t,
    gates_x,
    out,
    h0,
    products,
    integration,
    size,
    REVERSE: tl.constexpr,
):
    """Tangents of h of the step of a GRU; ``u_tile`` has the columns of r."""
    z_tile, n_tile = of_gate(u_tile, 1, size), of_gate(u_tile, 2, size)
    z = sigmoid(gate_of_gru(z_tile, gates_x, products, integration))
    n = tanh(gate_of_gru(n_tile, gates_x, products, integration))
    n_t = pre_tangents(product, n_tile, gates_t, products_t, gates_x, integration) * (1.0 - n * n)
    h = before(out, h0, u_tile, REVERSE)
    return n_t + z_t * (h - n) + z * (h_t - n_t)
