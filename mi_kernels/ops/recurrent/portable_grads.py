"""The backward pass of multiplicative RNNs in plain PyTorch, through time."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .forms import DENSE, FACTORED, GRU, INTEGRATED
from .steps import Maybe, Steps, dense_product, masked, previous


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
    """The gradients of gates_x, factors_x, the products, h0, c0, integration, and the states."""
    weights = weight_hh, weight_hm, weight_mh, weight, weight_hr, integration
    seq = Steps(gates_x, factors_x, *weights, lengths, kind, activation, reverse)
    before, cells_before = previous(h0, out, lengths, reverse), seq.cells_before(c0, cells)
    dh = gates_x.new_zeros(h0.shape, dtype=seq.wide) if grad_h is None else seq.up(grad_h)
    dc: Any = None
    if c0 is not None:
        dc = gates_x.new_zeros(c0.shape, dtype=seq.wide) if grad_c is None else seq.up(grad_c)
    found: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    sums = None if integration is None else torch.zeros_like(seq.integration, dtype=torch.float64)
    for t, mask in reversed(list(seq)):
        total = dh if grad is None else dh + masked(mask, seq.up(grad[t]))
        d_hidden = total if weight_hr is None else seq.product_back(total, weight_hr)
        q = None if products is None else seq.up(products[t])
        direct = None  # what reaches the state before the step without a product
        if cells is not None:
            values = seq.kept_gates(t, gates, q)
            dpre, dc_before = _lstm_grads(values, cells_before[t], cells[t], d_hidden, dc)
            dc = masked(mask, dc_before, dc)
        elif seq.cell == GRU:
            dpre, direct = _gru_grads(seq, before[t], q, seq.up(gates_x[t]), d_hidden)
        else:
            dpre = d_hidden * seq.slope(seq.up(out[t]))
        dpre = masked(mask, dpre)
        if sums is None:
            dh_before = _products_back(seq, t, mask, dpre, q, found)
        else:
            dpre, dh_before, of_vectors = _integrated_back(seq, t, dpre, q, found)
            sums = sums + torch.stack([masked(mask, term).sum(0, dtype=torch.float64) for term in of_vectors])
        found["gates"][t] = masked(mask, dpre)
        found["out"][t] = masked(mask, total.to(seq.dtype))
        dh = masked(mask, dh_before if direct is None else dh_before + direct, dh)
    nothing, features = gates_x.new_empty(0), gates_x.shape[2]
    factors = 0 if factors_x is None else factors_x.shape[2]
    factored = seq.structure == FACTORED
    return (
        seq.stacked(found["gates"], features),
        seq.stacked(found["factors"], factors) if factored else nothing,
        nothing.clone()
        if seq.structure == DENSE
        else seq.stacked(found["products"], factors if factored else features),
        dh.to(seq.dtype, copy=True),
        nothing.clone() if dc is None else dc.to(seq.dtype, copy=True),
        nothing.clone() if sums is None else sums.to(seq.dtype),
        nothing.clone() if weight_hr is None else seq.stacked(found["out"], h0.shape[1]),
    )


def _products_back(
    seq: Steps, t: int, mask: Maybe, dpre: Tensor, a: Any, found: dict[str, dict[int, Tensor]]
) -> Tensor:
    """What reaches the state before a step of a factored or a dense form; other gradients are stored."""
    if seq.structure == FACTORED:
        dm = seq.product_back(dpre, seq.weight_hm)
        da = masked(mask, dm * seq.up(seq.factors_x[t]))
        found["factors"][t], found["products"][t] = masked(mask, dm * a), da
        dh = seq.product_back(da, seq.weight_mh)
    else:
        weight = seq.weight.transpose(0, 1)
        dh = seq.up(dense_product(dpre.to(seq.dtype), seq.factors_x[t], weight))
    return dh if seq.weight_hh is None else dh + seq.product_back(dpre, seq.weight_hh)


def _integrated_back(
    seq: Steps, t: int, dpre: Tensor, q: Any, found: dict[str, dict[int, Tensor]]
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """The gradients of gates_x, of the state before the step and, for each row, of the vectors."""
    assert seq.structure == INTEGRATED
    alpha, beta_h, beta_x, _ = seq.integration
    x = seq.up(seq.gates_x[t])
    dq = found["products"][t] = dpre * (alpha * x + beta_h)
    width = 2 * seq.units if seq.cell == GRU else dq.shape[1]
    dh = seq.product_back(dq[:, :width], seq.weight_hh[:width])
    return dpre * (alpha * q + beta_x), dh, (dpre * x * q, dpre * q, dpre * x, dpre)


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


def _gru_grads(seq: Steps, h: Tensor, q: Any, x: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the pre-activations, and of h but for the product of the first two gates."""
    width, h = 2 * seq.units, seq.up(h)
    r, z, n = seq.gru_gates(x, q)
    alpha, beta_h = seq.integration[0, width:], seq.integration[1, width:]
    dn = dh * (1 - z) * (1 - n * n)
    d_reset = seq.product_back(dn * (alpha * x[:, width:] + beta_h), seq.weight_hh[width:])  # of r h
    dr, dz = d_reset * h * r * (1 - r), dh * (h - n) * z * (1 - z)
    return torch.cat((dr, dz, dn), -1), dh * z + d_reset * r
