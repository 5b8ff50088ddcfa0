"""Forward mode of multiplicative RNNs in plain PyTorch."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .forms import DENSE, FACTORED, GRU
from .steps import Maybe, Steps, dense_product, masked, previous


def recurrent_tangents(
    gates_t: Tensor,
    factors_t: Maybe,
    products_t: Maybe,
    out_t: Maybe,
    h0_t: Tensor,
    c0_t: Maybe,
    gates_x: Tensor,
    factors_x: Maybe,
    h0: Tensor,
    c0: Maybe,
    out: Tensor,
    gates: Maybe,
    products: Maybe,
    cells: Maybe,
    weight_hh: Maybe,
    weight_hm: Maybe,
    weight_mh: Maybe,
    weight: Maybe,
    weight_hr: Maybe,
    integration: Maybe,
    lengths: Maybe,
    kind: str,
    activation: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangents of out, h_n and c_n."""
    weights = weight_hh, weight_hm, weight_mh, weight, weight_hr, integration
    seq = Steps(gates_x, factors_x, *weights, lengths, kind, activation, reverse)
    before, cells_before = previous(h0, out, lengths, reverse), seq.cells_before(c0, cells)
    h_t, c_t = h0_t, seq.up(c0_t)
    found: dict[int, Tensor] = {}
    for t, mask in seq:
        pre_t = seq.up(gates_t[t])
        q = None if products is None else seq.up(products[t])
        q_t = None if products_t is None else seq.up(products_t[t])
        if seq.structure == FACTORED:
            pre_t = pre_t + _factored(seq, t, h_t, q, q_t, factors_t)
        elif seq.structure == DENSE:
            pre_t = pre_t + seq.up(dense_product(h_t, seq.factors_x[t], seq.weight))
        elif seq.cell != GRU:
            pre_t = pre_t + _added(seq.product(h_t, seq.weight_hh), q_t) * _slope_of_q(seq, t)
        if seq.structure in (FACTORED, DENSE) and weight_hh is not None:
            pre_t = pre_t + seq.product(h_t, weight_hh)
        if cells is not None:
            values = seq.kept_gates(t, gates, q)
            new, cell_t = _lstm(values, pre_t, cells[t], cells_before[t], c_t)
            c_t = masked(mask, cell_t, c_t)
        elif seq.cell == GRU:
            new = _gru(seq, t, pre_t, before[t], h_t, q, q_t)
        else:
            new = pre_t * seq.slope(seq.up(out[t]))
        if weight_hr is not None:
            new = _added(seq.product(new, weight_hr), None if out_t is None else seq.up(out_t[t]))
        new = new.to(seq.dtype)
        h_t = masked(mask, new, h_t)
        found[t] = masked(mask, new)
    return (
        seq.stacked(found, h0.shape[1]),
        h_t.clone() if h_t is h0_t else h_t,
        gates_x.new_empty(0) if c_t is None else c_t.to(seq.dtype, copy=True),
    )


def _added(first: Tensor, second: Maybe) -> Tensor:
    return first if second is None else first + second


def _slope_of_q(seq: Steps, t: int) -> Tensor:
    """The derivative of the pre-activations of an integrated form by its product with the state."""
    return seq.integration[0] * seq.up(seq.gates_x[t]) + seq.integration[1]


def _factored(seq: Steps, t: int, h_t: Tensor, a: Any, a_t: Maybe, factors_t: Maybe) -> Tensor:
    m_t = _added(seq.product(h_t, seq.weight_mh), a_t) * seq.up(seq.factors_x[t])
    if factors_t is not None:
        m_t = m_t + a * seq.up(factors_t[t])
    return seq.product(m_t, seq.weight_hm)


def _lstm(
    values: Sequence[Tensor], pre_t: Tensor, c: Tensor, c_before: Tensor, c_t: Tensor
) -> tuple[Tensor, Tensor]:
    """The tangents of o tanh(c) and of c."""
    i, f, g, o = values
    i_t, f_t, g_t, o_t = pre_t.chunk(4, -1)
    y = c.tanh()
    cell_t = f_t * f * (1 - f) * c_before + f * c_t + i_t * i * (1 - i) * g + i * g_t * (1 - g * g)
    return o_t * o * (1 - o) * y + o * (1 - y * y) * cell_t, cell_t


def _gru(seq: Steps, t: int, pre_t: Tensor, h: Tensor, h_t: Tensor, q: Any, q_t: Maybe) -> Tensor:
    width, h, h_t = 2 * seq.units, seq.up(h), seq.up(h_t)
    slope = _slope_of_q(seq, t)
    first = _added(seq.product(h_t, seq.weight_hh[:width]), None if q_t is None else q_t[:, :width])
    r, z, n = seq.gru_gates(seq.up(seq.gates_x[t]), q)
    r_t, z_t = (pre_t[:, :width] + first * slope[:, :width]).chunk(2, -1)
    r_t, z_t = r_t * r * (1 - r), z_t * z * (1 - z)
    last = seq.product(r_t * h + r * h_t, seq.weight_hh[width:])
    last = _added(last, None if q_t is None else q_t[:, width:])
    n_t = (pre_t[:, width:] + last * slope[:, width:]) * (1 - n * n)
    return n_t + z_t * (h - n) + z * (h_t - n_t)
