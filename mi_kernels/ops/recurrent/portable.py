"""Multiplicative RNNs in plain PyTorch: all steps.

Products are in the dtype of the arguments; what is elementwise, and the cell's state, in its accumulation
dtype. ``schema.py`` has the formulas and the shapes.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from .forms import DENSE, FACTORED, GRU
from .portable_grads import recurrent_grads
from .portable_tangents import recurrent_tangents
from .steps import Maybe, Steps, dense_product, integrate, masked, previous

__all__ = ["integrate", "previous", "recurrent", "recurrent_grads", "recurrent_tangents"]

_ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda p: p,
}


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
    """out, h_n, c_n; gates, products, cells and hidden, where they are kept."""
    weights = weight_hh, weight_hm, weight_mh, weight, weight_hr, integration
    seq = Steps(gates_x, factors_x, *weights, lengths, kind, activation, reverse)
    gates_x.new_empty((*gates_x.shape[:2], h0.shape[1]))  # refused here, not after T steps, where T is absurd
    h, c = h0, seq.up(c0)
    out: dict[int, Tensor] = {}
    kept: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    for t, mask in seq:
        pre, product = _pre_activations(seq, t, h)
        if seq.is_lstm:
            i, f, g, o = gates = seq.gates(pre)
            cell = f * c + i * g
            new = o * cell.tanh()
            c = masked(mask, cell, c)
            kept["cells"][t] = masked(mask, cell)
            if seq.structure == FACTORED:
                kept["gates"][t] = masked(mask, torch.cat(gates, -1))
        elif seq.cell == GRU:
            new, product = _gru(seq, t, h, pre, product)
        else:
            new = _ACTIVATIONS[activation](pre)
        if product is not None:
            kept["products"][t] = masked(mask, product)
        if weight_hr is not None:
            new = new.to(seq.dtype)
            kept["hidden"][t] = masked(mask, new)
            new = seq.product(new, weight_hr)
        new = new.to(seq.dtype)
        h = masked(mask, new, h)
        out[t] = masked(mask, new)
    # A result of an operation is not one of its arguments.
    h_n = h.clone() if h is h0 else h
    c_n = gates_x.new_empty(0) if c is None else c.to(seq.dtype, copy=True)
    return seq.stacked(out, h0.shape[1]), h_n, c_n, *_kept(seq, kept if keep else None)


def _kept(seq: Steps, kept: dict[str, dict[int, Tensor]] | None) -> list[Tensor]:
    """What is kept, in the order of the results; without elements where it is not there."""
    units, features, factored = seq.units, seq.gates_x.shape[2], seq.structure == FACTORED
    widths = {
        "gates": 4 * units if seq.is_lstm and factored else None,
        "products": None if seq.structure == DENSE else seq.factors_x.shape[2] if factored else features,
        "cells": units if seq.is_lstm else None,
        "hidden": None if seq.weight_hr is None else units,
    }
    results = []
    for name, width in widths.items():
        dtype = seq.wide if name == "cells" else seq.dtype
        if kept is None or width is None:
            results.append(seq.gates_x.new_empty(0, dtype=dtype))
        else:
            results.append(seq.stacked(kept[name], width, dtype))
    return results


def _pre_activations(seq: Steps, t: int, h: Tensor) -> tuple[Tensor, Any]:
    """What the activations are applied to, and the product with the state that the backward pass needs.

    Of a GRU they are those of the first two gates.
    """
    gates_x = seq.up(seq.gates_x[t])
    if seq.structure == FACTORED:
        a = seq.product(h, seq.weight_mh)
        pre = gates_x + seq.product(a * seq.up(seq.factors_x[t]), seq.weight_hm)
        return pre if seq.weight_hh is None else pre + seq.product(h, seq.weight_hh), a
    if seq.structure == DENSE:
        pre = gates_x + seq.up(dense_product(h, seq.factors_x[t], seq.weight))
        return pre if seq.weight_hh is None else pre + seq.product(h, seq.weight_hh), None
    width = 2 * seq.units if seq.cell == GRU else gates_x.shape[1]
    q = seq.product(h, seq.weight_hh[:width])
    return integrate(q, gates_x[:, :width], seq.integration[:, :width]), q


def _gru(seq: Steps, t: int, h: Tensor, pre: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    width = 2 * seq.units
    r, z = pre.sigmoid().chunk(2, -1)
    q_n = seq.product(r * seq.up(h), seq.weight_hh[width:])
    n = integrate(q_n, seq.up(seq.gates_x[t, :, width:]), seq.integration[:, width:]).tanh()
    return n + z * (seq.up(h) - n), torch.cat((q, q_n), -1)
