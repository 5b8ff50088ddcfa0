"""The tangents of the family recurrent in Triton: their launches (recurrent.py)."""

from typing import Any

from torch import Tensor

from ..recurrent.forms import GRU, LSTM
from ..recurrent.steps import order
from . import recurrent_steps as steps
from . import recurrent_whole as whole
from .recurrent_problem import Problem, there

Maybe = Tensor | None


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
    """``mi_kernels::recurrent_tangents`` (ops/recurrent/schema.py)."""
    weights = weight_hh, weight_hm, weight_mh, weight, weight_hr
    call = Problem(gates_x, factors_x, h0, weights, integration, lengths, kind, activation, reverse)
    given: dict[str, Any] = {
        "gates_t": gates_t,
        "factors_t": factors_t,
        "products_t": products_t,
        "out_t": out_t,
    }
    given |= {"gates_x": gates_x, "factors_x": factors_x, "h0": h0, "c0": c0, "out": out, "gates": gates}
    given |= {"cells": cells, "r_out": call.steps_of(call.P)}
    lstm, blocks = call.form.cell == LSTM, call.blocks()
    if blocks is not None:
        h_n = call.empty(call.B, call.P)
        c_n = call.empty(call.B, call.H) if lstm else call.empty(0)
        states = {"h0_t": h0_t, "c0_t": c0_t, "r_h": h_n, "r_c": there(c_n, lstm)}
        others = given | states | {"products": products}
        call.launch_whole(whole._whole_tangents_kernel, blocks, False, others)
    else:
        h_n, c_n = _steps(call, h0_t, c0_t, given | {"products_": products})
    return given["r_out"], h_n, c_n


def _steps(call: Problem, h0_t: Tensor, c0_t: Maybe, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A step a launch; writes ``r_out`` and returns the last states."""
    cell, h = call.form.cell, call.state(h0_t, call.P, False)
    c: list[Any] = call.state(c0_t, call.H, True) if cell == LSTM else [None, None]
    # What the second launch of a step reads: the operand of weight_hm, r h, or o tanh(c).
    rest = call.M if call.factored else call.H
    scratch, hidden = call.empty(call.B, rest), call.empty(call.B, call.H)
    z = call.empty(call.B, call.H, wide=True)
    names = ("factors_x", "factors_t", "products_", "products_t")
    read = {name: given[name] for name in names}
    cells = {name: t for name, t in given.items() if name not in ("out_t", "r_out", *names[:2])}
    if call.factored:
        cells |= {"products_": None, "products_t": None}
    constants, kernel = {"REVERSE": call.reverse}, steps._step_tangents_kernel

    def launch(role: str, t: int, columns: int, per_unit: int = 1, **others: Any) -> None:
        call.launch_step(kernel, role, t, columns, per_unit, constants=constants, **others)

    for t in order(call.T, call.reverse):
        states: dict[str, Any] = {"h": h[0], "h_next": h[1], "r_out": given["r_out"]}
        terms = call.cell_products(scratch, h[0])
        if call.factored:
            second = h[0], call.weight_mh, call.P
            launch("factor", t, call.M, second=second, **read, result=scratch)
        if cell == GRU:
            launch("reset", t, call.H, 2, **terms, **cells, h=h[0], result=scratch, z=z)
            second = scratch, call.split_hh()[1], call.H
            launch("candidate", t, call.H, second=second, **cells, **states, z=z)
        elif call.weight_hr is None:
            launch(cell, t, call.H, call.gates, **terms, **cells, **states, c=c[0], c_next=c[1])
        else:
            launch(cell, t, call.H, call.gates, **terms, **cells, c=c[0], c_next=c[1], result=hidden)
            second = hidden, call.weight_hr, call.H
            launch("project", t, call.P, second=second, **states, out_t=given["out_t"])
        h.reverse()
        c.reverse()
    return h[0], call.empty(0) if c[0] is None else c[0].to(call.dtype, copy=True)
