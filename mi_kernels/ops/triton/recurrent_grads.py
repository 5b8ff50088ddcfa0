"""The gradients of the family recurrent in Triton: their launches (recurrent.py)."""

from typing import Any

from torch import Tensor

from ..recurrent.forms import GRU, LSTM
from ..recurrent.steps import order
from . import recurrent_steps as steps
from . import recurrent_whole as whole
from .recurrent_problem import NO_PRODUCT, Problem, there, turned
from .recurrent_tiling import rows_of_a_block

Maybe = Tensor | None


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
    """``mi_kernels::recurrent_grads`` (ops/recurrent/schema.py)."""
    weights = weight_hh, weight_hm, weight_mh, weight, weight_hr
    call = Problem(gates_x, factors_x, h0, weights, integration, lengths, kind, activation, reverse)
    given: dict[str, Any] = {
        "gates_x": gates_x,
        "factors_x": factors_x,
        "h0": h0,
        "c0": c0,
        "out": out,
        "gates": gates,
    }
    given |= {"cells": cells, "grad": grad}
    lstm, hr = call.form.cell == LSTM, weight_hr is not None
    found = {
        "r_gates": call.steps_of(call.N),
        "r_factors": call.steps_of(call.M, call.factored),
        "r_products": call.steps_of(call.M if call.factored else call.N, not call.dense),
        "r_out": call.steps_of(call.P, hr),
    }
    wanted: dict[str, Any] = found | {"r_factors": there(found["r_factors"], call.factored)}
    wanted["r_products"] = there(found["r_products"], not call.dense)
    wanted["r_out"] = there(found["r_out"], hr)
    blocks = call.blocks()
    if blocks is not None:
        sums = call.sums(blocks.BM)
        dh = call.empty(call.B, call.P)
        dc = call.empty(call.B, call.H) if lstm else call.empty(0)
        given |= {"grad_h": grad_h, "grad_c": grad_c, "products": products, "sums": sums}
        given |= {"r_h": dh, "r_c": there(dc, lstm)}
        call.launch_whole(whole._whole_grads_kernel, blocks, True, given | wanted)
    else:
        sums = call.sums(rows_of_a_block(call.B))
        dh, dc = _Steps(call, given | {"products_": products}, wanted, sums).run(grad_h, grad_c)
    d_integration = call.empty(0)
    if sums is not None:
        d_integration = sums[call.T % 2].sum(0).to(call.dtype)
    return found["r_gates"], found["r_factors"], found["r_products"], dh, dc, d_integration, found["r_out"]


class _Steps:
    """A step in one, two or three launches, the last step first."""

    def __init__(self, call: Problem, given: dict[str, Any], wanted: dict[str, Any], sums: Maybe) -> None:
        self.call, self.given, self.sums = call, given, sums
        self.d_gates, self.d_factors = wanted["r_gates"], wanted["r_factors"]
        self.d_products, self.d_out = wanted["r_products"], wanted["r_out"]
        self.direct = [call.empty(call.B, call.H, wide=True) for _ in range(2)]
        hh, self.n_rows = call.split_hh()
        self.state_products: dict[str, Any] = {"second": (self.d_gates, turned(hh), call.columns)}
        if call.factored:
            self.state_products["first"] = (self.d_products, turned(call.weight_mh), call.M)
        elif call.dense:
            self.state_products["dense"] = (call.factors_x, turned(call.weight), call.M)
        else:
            self.state_products["second"] = (self.d_products, turned(hh), call.columns)

    def launch(self, role: str, t: int, columns: int, cell: str | None, **others: Any) -> None:
        call, per_unit = self.call, 1 if cell in (None, GRU) else self.call.gates
        others = {"second": NO_PRODUCT} | others
        constants = {"CELL": cell, "REVERSE": call.reverse}
        if cell is not None or role == "reset":
            others |= self.summed(t) | {"r_gates": self.d_gates}
            others["r_products"] = None if call.factored else self.d_products
            if call.factored:
                others["products_"] = None
        kernel = steps._step_grads_kernel
        call.launch_step(kernel, role, t, columns, per_unit, constants=constants, **others)

    def summed(self, t: int) -> dict[str, Any]:
        """The buffers that the sums of a step are read from and written to."""
        if self.sums is None:
            return {}
        made = t if self.call.reverse else self.call.T - 1 - t
        return {"sums": self.sums[made % 2], "sums_next": self.sums[(made + 1) % 2], "N": self.call.N}

    def run(self, grad_h: Maybe, grad_c: Maybe) -> tuple[Tensor, Tensor]:
        """The gradients of h0 and c0."""
        call, cell = self.call, self.call.form.cell
        h = call.state(grad_h, call.P, True)
        c: list[Any] = call.state(grad_c, call.H, True) if cell == LSTM else [None, None]
        previous, d_h0 = -1, call.empty(call.B, call.P)
        direct = {"direct": self.direct[1]} if cell == GRU else {}
        for t in reversed(order(call.T, call.reverse)):
            state: dict[str, Any] = (
                self.state_products | direct | {"previous": previous, "h": h[0], "h_next": h[1]}
            )
            cells = self.given | {"c": c[0], "c_next": c[1]}
            if call.weight_hr is None:
                more = {"direct_next": self.direct[0]} if cell == GRU else {}
                self.launch("state", t, call.P, cell, **cells, **state, **more)
            else:
                state |= {"grad": self.given["grad"], "r_out": self.d_out}
                self.launch("state", t, call.P, None, **state)
                second = self.d_out, turned(call.weight_hr), call.P
                self.launch("hidden", t, call.H, cell, **cells, second=second)
            self.after(t)
            h.reverse()
            c.reverse()
            previous = t
        last = self.state_products | direct | {"previous": previous, "h": h[0], "h_next": d_h0}
        self.launch("state", max(previous, 0), call.P, None, **last)
        return d_h0, call.empty(0) if c[0] is None else c[0].to(call.dtype, copy=True)

    def after(self, t: int) -> None:
        """What follows the gradients of the gates: those of the factors, or of the reset gate."""
        call = self.call
        if call.factored:
            second = self.d_gates, turned(call.weight_hm), call.N
            results = {"r_factors": self.d_factors, "r_products": self.d_products}
            read = {name: self.given[name] for name in ("factors_x", "products_")}
            self.launch("factor", t, call.M, None, second=second, **read, **results)
        elif call.form.cell == GRU:
            assert self.d_products is not None
            second = self.d_products[..., call.columns :], turned(self.n_rows), call.H
            buffers = {"direct": self.direct[0], "direct_next": self.direct[1]}
            self.launch("reset", t, call.H, None, second=second, **self.given, **buffers)
