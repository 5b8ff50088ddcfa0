"""Multiplicative RNNs in Triton: all steps that depend on the state, their gradients and their tangents.

Compiled ahead of time and run in Triton's interpreter, not on a GPU. Two forms of the same steps:

* Where a program can hold all weights of a step on chip (recurrent_tiling.whole), one launch makes all steps
  of a block of rows (recurrent_whole.py).
* Else a step is one launch; two where a product reads what follows another one (factors, the reset gate of
  a GRU), and one more with ``weight_hr`` (recurrent_steps.py).

Launches depend on sizes alone: nothing is read back, lengths stay on the device and mask rows in the kernels.
So a call can be captured in a CUDA graph, which a step a launch needs for its speed. Sums are in a fixed
order: those over rows and steps for ``integration`` in float64, one block of rows after the other.
"""

from typing import Any

from torch import Tensor

from ..recurrent.forms import GRU, LSTM
from ..recurrent.steps import order
from . import recurrent_steps as steps
from . import recurrent_whole as whole
from .recurrent_grads import recurrent_grads
from .recurrent_problem import Problem, there
from .recurrent_tangents import recurrent_tangents

__all__ = ["recurrent", "recurrent_grads", "recurrent_tangents"]

Maybe = Tensor | None


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
    """``mi_kernels::recurrent`` (ops/recurrent/schema.py)."""
    weights = weight_hh, weight_hm, weight_mh, weight, weight_hr
    call = Problem(gates_x, factors_x, h0, weights, integration, lengths, kind, activation, reverse)
    lstm, factored = call.form.cell == LSTM, call.factored
    wanted = {
        "gates": keep and lstm and factored,
        "products": keep and not call.dense,
        "cells": keep and lstm,
        "hidden": keep and weight_hr is not None,
    }
    widths = {
        "gates": call.N,
        "products": call.M if factored else call.N,
        "cells": call.H,
        "hidden": call.H,
    }
    kept = {name: call.steps_of(widths[name], wanted[name], name == "cells") for name in wanted}
    given: dict[str, Any] = {name: there(t, wanted[name]) for name, t in kept.items()} | {
        "out": call.steps_of(call.P)
    }
    blocks = call.blocks()
    if blocks is not None:
        h_n = call.empty(call.B, call.P)
        c_n = call.empty(call.B, call.H) if lstm else call.empty(0)
        given |= {"gates_x": gates_x, "factors_x": factors_x, "h0": h0, "c0": c0, "h_n": h_n}
        call.launch_whole(whole._whole_kernel, blocks, False, given | {"c_n": there(c_n, lstm)})
    else:
        h_n, c_n = _steps(call, h0, c0, given)
    return given["out"], h_n, c_n, *kept.values()


def _steps(call: Problem, h0: Tensor, c0: Maybe, kept: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A step a launch; writes ``out`` and what is kept, and returns the last states."""
    h, lstm, gru = call.state(h0, call.P, False), call.form.cell == LSTM, call.form.cell == GRU
    c = call.state(c0, call.H, True) if lstm else [None, None]
    m = call.empty(call.B, call.M) if call.factored else None
    reset = call.empty(call.B, call.H) if gru else None
    z = call.empty(call.B, call.H, wide=True) if gru else None
    hidden = kept["hidden"]
    if hidden is None and call.weight_hr is not None:
        hidden = call.empty(call.B, call.H)
    kernel, n_rows = steps._step_kernel, call.split_hh()[1]
    out = kept["out"]
    products: dict[str, Any] = {"products_": kept["products"]}
    for t in order(call.T, call.reverse):
        states: dict[str, Any] = {"h": h[0], "h_next": h[1], "out": out}
        cell: dict[str, Any] = {
            "gates_x": call.like,
            "gates": kept["gates"],
            "cells": kept["cells"],
            "c": c[0],
            "c_next": c[1],
        }
        if call.factored:
            second = h[0], call.weight_mh, call.P
            more = products | {"factors_x": call.factors_x, "result": m}
            call.launch_step(kernel, "factor", t, call.M, second=second, **more)
        else:
            cell |= products
        terms = call.cell_products(m, h[0])
        if gru:
            gates_x = {"gates_x": call.like, "z": z} | products
            call.launch_step(kernel, "reset", t, call.H, 2, **terms, h=h[0], result=reset, **gates_x)
            call.launch_step(
                kernel, "candidate", t, call.H, second=(reset, n_rows, call.H), **states, **gates_x
            )
        elif call.weight_hr is None:
            call.launch_step(kernel, call.form.cell, t, call.H, call.gates, **terms, **states, **cell)
        else:
            call.launch_step(kernel, call.form.cell, t, call.H, call.gates, **terms, **cell, result=hidden)
            second = hidden, call.weight_hr, call.H
            call.launch_step(kernel, "project", t, call.P, second=second, **states)
        h.reverse()
        c.reverse()
    c_n = call.empty(0) if c[0] is None else c[0].to(call.dtype, copy=True)
    return h[0], c_n
