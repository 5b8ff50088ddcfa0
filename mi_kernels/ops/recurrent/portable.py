"""Multiplicative RNNs in plain PyTorch: steps, their gradients and their tangents.

Products are in the dtype of the arguments; what is elementwise, and the cell's state, in its accumulation
dtype. ``schema.py`` has the formulas and the shapes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_kernels.ops.dtypes import accumulation_dtype
from mi_kernels.ops.recurrent.forms import DENSE, FACTORED, GRU, LSTM, PLAIN, form_of

Maybe = Tensor | None
_CHUNK = 1 << 20  # elements of a temporary, unless W has more

_ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda p: p,
}
# f' of y = f(p).
_SLOPES = {
    "tanh": lambda y: 1 - y * y,
    "relu": lambda y: (y > 0).to(y.dtype),
    "sigmoid": lambda y: y * (1 - y),
    "identity": torch.ones_like,
}


def order(steps: int, reverse: bool) -> Sequence[int]:
    """The steps in the order in which they are made."""
    return range(steps - 1, -1, -1) if reverse else range(steps)


def previous(state: Tensor, out: Tensor, lengths: Maybe, reverse: bool) -> Tensor:
    """[T, B, P], the state before each step."""
    if out.shape[0] == 0:
        return out
    if not reverse:
        return torch.cat((state[None], out[:-1]))
    before = torch.cat((out[1:], state[None]))
    if lengths is None:
        return before
    steps = torch.arange(out.shape[0], device=out.device)[:, None, None]
    return torch.where(steps == lengths[:, None] - 1, state, before)


def dense_product(h: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """h^T W x of W [O, Z, X], by rows, so that nothing larger than W is kept."""
    out, context, width = weight.shape
    rows = max(context, _CHUNK // max(out * width, 1), 1)
    parts = [
        torch.einsum("bz,ozx,bx->bo", h[b : b + rows], weight, x[b : b + rows])
        for b in range(0, h.shape[0], rows)
    ]
    return torch.cat(parts) if parts else h.new_empty(0, out)


def integrate(q: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """alpha * x * q + beta_h * q + beta_x * x + b."""
    alpha, beta_h, beta_x, bias = vectors
    return q * (alpha * x + beta_h) + (beta_x * x + bias)


class _Sequence:
    """The arguments that the three passes have in common."""

    def __init__(
        self,
        gates_x: Tensor,
        factors_x: Maybe,
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
    ) -> None:
        self.structure, self.cell = form_of(kind, weight_hm)
        self.gates_x, self.factors_x = gates_x, factors_x
        self.weight_hh, self.weight_hm, self.weight_mh = weight_hh, weight_hm, weight_mh
        self.weight, self.weight_hr = weight, weight_hr
        self.dtype, self.wide = gates_x.dtype, accumulation_dtype(gates_x.dtype)
        self.integration = None if integration is None else integration.to(self.wide)
        self.lengths, self.activation, self.reverse = lengths, activation, reverse
        self.units = gates_x.shape[2] // form_of(kind, weight_hm).gates

    def up(self, tensor: Any) -> Any:
        return None if tensor is None else tensor.to(self.wide)

    def product(self, h: Tensor, weight: Tensor) -> Tensor:
        return F.linear(h.to(self.dtype), weight).to(self.wide)

    def steps(self) -> Iterator[tuple[int, Maybe]]:
        """Each step, with the mask [B, 1] of the rows that make it."""
        for t in order(self.gates_x.shape[0], self.reverse):
            yield t, None if self.lengths is None else (t < self.lengths)[:, None]

    def gates(self, pre: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = pre.chunk(4, -1)
        return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()

    def slope(self, y: Tensor) -> Tensor:
        return _SLOPES[self.activation](y)


def _masked(mask: Maybe, value: Tensor, other: Tensor | None = None) -> Tensor:
    if mask is None:
        return value
    return torch.where(mask, value, torch.zeros_like(value) if other is None else other)


def _stacked(
    seq: _Sequence, parts: dict[int, Tensor], width: int, dtype: torch.dtype | None = None
) -> Tensor:
    steps, rows = seq.gates_x.shape[:2]
    if not parts:
        return seq.gates_x.new_zeros(steps, rows, width, dtype=dtype or seq.dtype)
    return torch.stack([parts[t] for t in range(steps)]).to(dtype or seq.dtype)


def recurrent(
    gates_x: Tensor,
    factors_x: Maybe,
    h0: Tensor,
    c0: Maybe,
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
    keep: bool,
) -> tuple[Tensor, ...]:
    seq = _Sequence(
        gates_x,
        factors_x,
        weight_hh,
        weight_hm,
        weight_mh,
        weight,
        weight_hr,
        integration,
        lengths,
        kind,
        activation,
        reverse,
    )
    h, c = h0, seq.up(c0)
    out: dict[int, Tensor] = {}
    kept: dict[str, dict[int, Tensor]] = {"gates": {}, "products": {}, "cells": {}, "hidden": {}}
    for t, mask in seq.steps():
        pre, product = _pre_activations(seq, t, h)
        if seq.cell == LSTM:
            i, f, g, o = gates = seq.gates(pre)
            cell = f * c + i * g
            new = o * cell.tanh()
            c = _masked(mask, cell, c)
            kept["cells"][t] = _masked(mask, cell)
            if seq.structure == FACTORED:
                kept["gates"][t] = _masked(mask, torch.cat(gates, -1))
        elif seq.cell == GRU:
            new, product = _gru(seq, t, h, pre, product)
        else:
            new = _ACTIVATIONS[activation](pre)
        if product is not None:
            kept["products"][t] = _masked(mask, product)
        if weight_hr is not None:
            new = new.to(seq.dtype)
            kept["hidden"][t] = _masked(mask, new)
            new = F.linear(new, weight_hr)
        new = new.to(seq.dtype)
        h = _masked(mask, new, h)
        out[t] = _masked(mask, new)
    units = seq.units
    # A result of an operation is not one of its arguments.
    h_n = h.clone() if h is h0 else h
    c_n = gates_x.new_empty(0) if c is None else c.to(seq.dtype, copy=True)
    nothing = gates_x.new_empty(0)
    factored = seq.structure == FACTORED
    widths = {
        "gates": 4 * units if seq.cell == LSTM and factored else None,
        "products": None if seq.structure == DENSE else factors_x.shape[2] if factored else gates_x.shape[2],
        "cells": units if seq.cell == LSTM else None,
        "hidden": None if weight_hr is None else units,
    }
    results = [_stacked(seq, out, h0.shape[1]), h_n, c_n]
    for name, width in widths.items():
        dtype = seq.wide if name == "cells" else None
        if keep and width is not None:
            results.append(_stacked(seq, kept[name], width, dtype))
        else:
            results.append(nothing.to(dtype or seq.dtype, copy=True))
    return tuple(results)


def _pre_activations(seq: _Sequence, t: int, h: Tensor) -> tuple[Tensor, Maybe]:
    """What the activations are applied to, and the product with the state that the backward pass needs.

    Of a GRU they are those of the first two gates.
    """
    gates_x = seq.up(seq.gates_x[t])
    if seq.structure == FACTORED:
        a = seq.product(h, seq.weight_mh)
        pre = gates_x + seq.product(a * seq.up(seq.factors_x[t]), seq.weight_hm)
        return pre if seq.weight_hh is None else pre + seq.product(h, seq.weight_hh), a
    if seq.structure == DENSE:
        q = seq.up(dense_product(h, seq.factors_x[t], seq.weight))
        return gates_x + q if seq.weight_hh is None else gates_x + q + seq.product(h, seq.weight_hh), None
    width = 2 * seq.units if seq.cell == GRU else gates_x.shape[1]
    q = seq.product(h, seq.weight_hh[:width])
    return integrate(q, gates_x[:, :width], seq.integration[:, :width]), q


def _gru(seq: _Sequence, t: int, h: Tensor, pre: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    width = 2 * seq.units
    r, z = pre.sigmoid().chunk(2, -1)
    q_n = seq.product(r * seq.up(h), seq.weight_hh[width:])
    n = integrate(q_n, seq.up(seq.gates_x[t, :, width:]), seq.integration[:, width:]).tanh()
    return n + z * (seq.up(h) - n), torch.cat((q, q_n), -1)


def recurrent_grads(
    grad: Maybe,
    grad_h: Maybe,
    grad_c: Maybe,
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
) -> tuple[Tensor, ...]:
    seq = _Sequence(
        gates_x,
        factors_x,
        weight_hh,
        weight_hm,
        weight_mh,
        weight,
        weight_hr,
        integration,
        lengths,
        kind,
        activation,
        reverse,
    )
    before = previous(h0, out, lengths, reverse)
    cells_before = None if cells is None else previous(seq.up(c0), cells, lengths, reverse)
    rows = gates_x.shape[1]
    dh = gates_x.new_zeros(h0.shape, dtype=seq.wide) if grad_h is None else seq.up(grad_h)
    dc = None
    if c0 is not None:
        dc = gates_x.new_zeros(rows, seq.units, dtype=seq.wide) if grad_c is None else seq.up(grad_c)
    found: dict[str, dict[int, Tensor]] = {name: {} for name in ("gates", "factors", "products", "out")}
    sums = None if integration is None else torch.zeros_like(seq.integration, dtype=torch.float64)
    for t, mask in reversed(list(seq.steps())):
        total = dh if grad is None else dh + _masked(mask, seq.up(grad[t]))
        d_out = total.to(seq.dtype)
        d_hidden = total if weight_hr is None else seq.up(d_out @ weight_hr)
        x_t = seq.up(gates_x[t])
        direct = None  # what reaches the state before the step without a product
        q = None if products is None else seq.up(products[t])
        if seq.cell == LSTM:
            values = (
                seq.up(gates[t]).chunk(4, -1)
                if gates is not None
                else seq.gates(integrate(q, x_t, seq.integration))
            )
            dpre, dc_before = _lstm_grads(values, cells_before[t], cells[t], d_hidden, dc)
            dc = _masked(mask, dc_before, dc)
        elif seq.cell == PLAIN:
            dpre = d_hidden * seq.slope(seq.up(out[t]))
        else:
            dpre, direct = _gru_grads(seq, before[t], q, x_t, d_hidden)
        dpre = _masked(mask, dpre)
        d_gates = dpre.to(seq.dtype)
        if seq.structure == FACTORED:
            dm = seq.up(d_gates @ weight_hm)
            da = _masked(mask, dm * seq.up(factors_x[t]))
            found["factors"][t] = _masked(mask, dm * q)
            found["products"][t] = da
            dh_before = seq.up(da.to(seq.dtype) @ weight_mh)
            if weight_hh is not None:
                dh_before = dh_before + seq.up(d_gates @ weight_hh)
        elif seq.structure == DENSE:
            dh_before = seq.up(dense_product(d_gates, factors_x[t], weight.transpose(0, 1)))
            if weight_hh is not None:
                dh_before = dh_before + seq.up(d_gates @ weight_hh)
        else:
            alpha, beta_h, beta_x, _ = seq.integration
            dq = dpre * (alpha * x_t + beta_h)
            found["products"][t] = dq
            width = 2 * seq.units if seq.cell == GRU else dq.shape[1]
            dh_before = seq.up(dq[:, :width].to(seq.dtype) @ weight_hh[:width])
            for row, term in enumerate((dpre * x_t * q, dpre * q, dpre * x_t, dpre)):
                sums[row] += _masked(mask, term).sum(0, dtype=torch.float64)
            dpre = dpre * (alpha * q + beta_x)
        if direct is not None:
            dh_before = dh_before + direct
        found["gates"][t] = _masked(mask, dpre)
        found["out"][t] = _masked(mask, d_out)
        dh = _masked(mask, dh_before, dh)
    nothing = gates_x.new_empty(0)
    factored = seq.structure == FACTORED
    return (
        _stacked(seq, found["gates"], gates_x.shape[2]),
        _stacked(seq, found["factors"], factors_x.shape[2]) if factored else nothing,
        nothing.clone()
        if seq.structure == DENSE
        else _stacked(seq, found["products"], factors_x.shape[2] if factored else gates_x.shape[2]),
        dh.to(seq.dtype, copy=True),
        nothing.clone() if dc is None else dc.to(seq.dtype, copy=True),
        nothing.clone() if sums is None else sums.to(seq.dtype),
        nothing.clone() if weight_hr is None else _stacked(seq, found["out"], h0.shape[1]),
    )


def _lstm_grads(
    values: Sequence[Tensor], c_before: Tensor, c: Tensor, dh: Tensor, dc: Tensor
) -> tuple[Tensor, Tensor]:
    i, f, g, o = values
    y = c.tanh()
    dc = dc + dh * o * (1 - y * y)
    parts = (
        dc * g * i * (1 - i),
        dc * c_before * f * (1 - f),
        dc * i * (1 - g * g),
        dh * y * o * (1 - o),
    )
    return torch.cat(parts, -1), dc * f


def _gru_grads(seq: _Sequence, h: Tensor, q: Tensor, x: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the pre-activations, and of h but for the product of the first two gates."""
    width, h = 2 * seq.units, seq.up(h)
    r, z, n = integrate(q, x, seq.integration).split(seq.units, -1)
    r, z, n = r.sigmoid(), z.sigmoid(), n.tanh()
    alpha, beta_h = seq.integration[0, width:], seq.integration[1, width:]
    dn = dh * (1 - z) * (1 - n * n)
    dq = dn * (alpha * x[:, width:] + beta_h)
    d_reset = seq.up(dq.to(seq.dtype) @ seq.weight_hh[width:])  # of r h
    dr, dz = d_reset * h * r * (1 - r), dh * (h - n) * z * (1 - z)
    return torch.cat((dr, dz, dn), -1), dh * z + d_reset * r


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
    seq = _Sequence(
        gates_x,
        factors_x,
        weight_hh,
        weight_hm,
        weight_mh,
        weight,
        weight_hr,
        integration,
        lengths,
        kind,
        activation,
        reverse,
    )
    before = previous(h0, out, lengths, reverse)
    cells_before = None if cells is None else previous(seq.up(c0), cells, lengths, reverse)
    h_t, c_t = h0_t, seq.up(c0_t)
    found: dict[int, Tensor] = {}
    for t, mask in seq.steps():
        pre_t, x_t = seq.up(gates_t[t]), seq.up(gates_x[t])
        q = None if products is None else seq.up(products[t])
        q_t = None if products_t is None else seq.up(products_t[t])
        if seq.structure == FACTORED:
            a_t = seq.product(h_t, weight_mh) if q_t is None else q_t + seq.product(h_t, weight_mh)
            m_t = a_t * seq.up(factors_x[t])
            if factors_t is not None:
                m_t = m_t + q * seq.up(factors_t[t])
            pre_t = pre_t + seq.product(m_t, weight_hm)
        elif seq.structure == DENSE:
            pre_t = pre_t + seq.up(dense_product(h_t, factors_x[t], weight))
        if seq.structure != "integrated" and weight_hh is not None:
            pre_t = pre_t + seq.product(h_t, weight_hh)
        if seq.structure == "integrated":
            slope = seq.integration[0] * x_t + seq.integration[1]
            width = 2 * seq.units if seq.cell == GRU else x_t.shape[1]
            first = seq.product(h_t, weight_hh[:width])
            first = first if q_t is None else first + q_t[:, :width]
            if seq.cell == GRU:
                values = integrate(q, x_t, seq.integration).split(seq.units, -1)
                r, z, n = values[0].sigmoid(), values[1].sigmoid(), values[2].tanh()
                r_t, z_t = (pre_t[:, :width] + first * slope[:, :width]).chunk(2, -1)
                r_t, z_t = r_t * r * (1 - r), z_t * z * (1 - z)
                h = seq.up(before[t])
                last = seq.product(r_t * h + r * seq.up(h_t), weight_hh[width:])
                last = last if q_t is None else last + q_t[:, width:]
                n_t = (pre_t[:, width:] + last * slope[:, width:]) * (1 - n * n)
                new = n_t + z_t * (h - n) + z * (seq.up(h_t) - n_t)
            else:
                pre_t = pre_t + first * slope
        if seq.cell == LSTM:
            i, f, g, o = (
                seq.up(gates[t]).chunk(4, -1)
                if gates is not None
                else seq.gates(integrate(q, x_t, seq.integration))
            )
            i_t, f_t, g_t, o_t = pre_t.chunk(4, -1)
            y = cells[t].tanh()
            cell_t = (
                f_t * f * (1 - f) * cells_before[t] + f * c_t + i_t * i * (1 - i) * g + i * g_t * (1 - g * g)
            )
            new = o_t * o * (1 - o) * y + o * (1 - y * y) * cell_t
            c_t = _masked(mask, cell_t, c_t)
        elif seq.cell == PLAIN:
            new = pre_t * seq.slope(seq.up(out[t]))
        if weight_hr is not None:
            new = seq.product(new, weight_hr)
            new = new if out_t is None else new + seq.up(out_t[t])
        new = new.to(seq.dtype)
        h_t = _masked(mask, new, h_t)
        found[t] = _masked(mask, new)
    return (
        _stacked(seq, found, h0.shape[1]),
        h_t.clone() if h_t is h0_t else h_t,
        gates_x.new_empty(0) if c_t is None else c_t.to(seq.dtype, copy=True),
    )
