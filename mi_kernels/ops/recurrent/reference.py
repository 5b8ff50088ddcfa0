"""Multiplicative RNNs as the papers write them: a loop over steps and no more."""

from typing import Any

import torch
from torch import Tensor

Maybe = Tensor | None
_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda p: p}


def multiplicative_rnn(
    kind: str,
    x: Tensor,  # [T, B, X] or [T, X]
    state: Any,
    weight_ih: Maybe,
    weight_hh: Maybe,
    bias: Maybe = None,
    *,
    weight_mx: Maybe = None,
    weight_mh: Maybe = None,
    weight_hm: Maybe = None,
    weight: Maybe = None,
    weight_hr: Maybe = None,
    alpha: Maybe = None,
    beta_h: Maybe = None,
    beta_x: Maybe = None,
    lengths: Any = None,
    reverse: bool = False,
    activation: str = "tanh",
    memory: str = "fast",
) -> tuple[Tensor, Any]:
    """The output and the last state of the arguments of :func:`mi_kernels.multiplicative_rnn`."""
    if x.dim() == 2:
        state = None if state is None else [s[None] for s in state] if kind.endswith("lstm") else state[None]
        own = dict(locals()) | {"x": x[:, None], "state": state}
        y, state = multiplicative_rnn(**own)
        return y[:, 0], tuple(s[0] for s in state) if kind.endswith("lstm") else state[0]
    steps, rows, _ = x.shape
    lstm = kind.endswith("lstm")
    lengths = torch.full((rows,), steps) if lengths is None else torch.as_tensor(lengths)
    h, c = _first_state(kind, x, state, weight_ih, weight_hh, weight, weight_hm, weight_hr)
    output = [torch.zeros_like(h)] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        there = (t < lengths.to(x.device))[:, None]
        x_t = torch.where(there, x[t], torch.zeros_like(x[t]))
        if kind in ("mlstm", "mrnn"):
            m = (x_t @ weight_mx.mT) * (h @ weight_mh.mT)  # type: ignore[union-attr]
            p = _sum(_product(weight_ih, x_t), _product(weight_hh, m), bias)
        elif kind == "second_order":
            if weight is None:
                w = torch.einsum("or,ri,rj->oij", weight_hm, weight_mh, weight_mx)
            else:
                w = weight
            dense = torch.einsum("bi,oij,bj->bo", h, w, x_t)
            p = _sum(dense, _product(weight_hh, h), _product(weight_ih, x_t), bias)
        else:
            vectors = alpha, beta_h, beta_x, bias
            p = _integrated(_product(weight_ih, x_t), _product(weight_hh, h), vectors)
        new_c = c
        if lstm:
            i, f, g, o = p.chunk(4, -1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            new = o.sigmoid() * new_c.tanh()
            new = new if weight_hr is None else new @ weight_hr.mT
        elif kind == "mi_gru":
            new = _gru(x_t, h, p, weight_ih, weight_hh, (alpha, beta_h, beta_x, bias))
        else:
            new = _ACTIVATIONS[activation](p)
        output[t] = torch.where(there, new, torch.zeros_like(new))
        h = torch.where(there, new, h)
        c = torch.where(there, new_c, c) if lstm else c
    stacked = torch.stack(output) if steps else x.new_zeros(0, *h.shape)
    return stacked, (h, c) if lstm else h


def _product(weight: Maybe, features: Tensor) -> Any:
    return None if weight is None else features @ weight.mT


def _sum(first: Any, *others: Any) -> Any:
    for term in others:
        first = first if term is None else term if first is None else first + term
    return first


def _integrated(of_x: Tensor, of_h: Tensor, vectors: Any) -> Tensor:
    alpha, beta_h, beta_x, bias = vectors
    product = of_x * of_h if alpha is None else alpha * of_x * of_h
    terms = (None if beta is None else beta * of for beta, of in ((beta_h, of_h), (beta_x, of_x)))
    return _sum(product, *terms, bias)


def _gru(x: Tensor, h: Tensor, p: Tensor, weight_ih: Any, weight_hh: Any, vectors: Any) -> Tensor:
    r, z, _ = p.sigmoid().chunk(3, -1)
    last = slice(2 * r.shape[-1], None)
    of_last = [None if v is None else v[last] for v in vectors]
    n = _integrated(x @ weight_ih[last].mT, (r * h) @ weight_hh[last].mT, of_last).tanh()
    return (1 - z) * n + z * h


def _first_state(
    kind: str,
    x: Tensor,
    state: Any,
    weight_ih: Any,
    weight_hh: Any,
    weight: Any,
    weight_hm: Any,
    weight_hr: Any,
) -> tuple[Tensor, Any]:
    if state is not None:
        return state if kind.endswith("lstm") else (state, None)
    rows = next(w.shape[0] for w in (weight, weight_hm, weight_ih, weight_hh) if w is not None)
    units = rows // {"mlstm": 4, "mi_lstm": 4, "mi_gru": 3}.get(kind, 1)
    h = x.new_zeros(x.shape[1], units if weight_hr is None else weight_hr.shape[0])
    return h, x.new_zeros(x.shape[1], units) if kind.endswith("lstm") else None
