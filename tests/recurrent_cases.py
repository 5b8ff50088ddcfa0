"""Calls of the operations of the family recurrent, judged by the portable implementation.

In float64 to 1e-12, in other dtypes by its own error. ``module`` is what has recurrent, recurrent_grads and
recurrent_tangents: a module, or a namespace of torch.ops.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from mi_kernels.ops.recurrent import portable
from mi_kernels.ops.recurrent.forms import DENSE, FACTORED, KINDS, LSTM, Form
from mi_kernels.testing.errors import FLOAT64_LIMIT, relative_error
from mi_kernels.testing.samples import lay_out

STATES = ("h0", "c0")
INPUTS = ("gates_x", "factors_x", *STATES)
WEIGHTS = ("weight_hh", "weight_hm", "weight_mh", "weight", "weight_hr", "integration")


@dataclass(frozen=True)
class Case:
    """A call: ``state`` P where there is a weight_hr, ``hh`` a weight_hh where it is not needed."""

    kind: str
    T: int = 3
    B: int = 3
    H: int = 17
    factors: int = 5  # M or X
    state: int | None = None
    low: bool = False  # factors of W of a second-order cell
    hh: bool = False
    lengths: tuple[int, ...] | None = None
    reverse: bool = False
    activation: str = "tanh"
    layout: str = "contiguous"  # of the weights

    def __str__(self):
        parts = [self.kind, f"T{self.T}", f"B{self.B}", f"H{self.H}", f"M{self.factors}"]
        parts += [f"P{self.state}"] if self.state else []
        parts += [] if self.layout == "contiguous" else [self.layout]
        return "-".join([*parts, *(n for n in ("low", "hh", "lengths", "reverse") if getattr(self, n))])

    @property
    def form(self) -> Form:
        form = KINDS[self.kind]
        return Form(FACTORED, form.cell) if self.low else form

    @property
    def rule(self) -> tuple[Any, ...]:
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        return lengths, self.kind, self.activation, self.reverse

    def only(self, kept: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """Gates, products and cells, as the derivatives take them."""
        structure, cell = self.form
        there = cell == LSTM and structure == FACTORED, structure != DENSE, cell == LSTM
        return [t if one else None for one, t in zip(there, kept[:3], strict=True)]

    def operands(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """The tensors of a forward call, rounded to the dtype."""
        generator = torch.Generator().manual_seed(seed)
        T, B, H, M, P, form = self.T, self.B, self.H, self.factors, self.state or self.H, self.form
        N = H * form.gates
        sizes: dict[str, tuple[int, ...]] = {"gates_x": (T, B, N), "h0": (B, P)}
        sizes |= {"c0": (B, H)} if form.cell == LSTM else {}
        if form.structure == FACTORED:
            sizes |= {"factors_x": (T, B, M), "weight_hm": (N, M), "weight_mh": (M, P)}
        elif form.structure == DENSE:
            sizes |= {"factors_x": (T, B, M), "weight": (H, P, M)}
        else:
            sizes |= {"weight_hh": (N, P), "integration": (4, N)}
        sizes |= {"weight_hh": (N, P)} if self.hh else {}
        sizes |= {"weight_hr": (P, H)} if self.state else {}
        found: dict[str, Any] = dict.fromkeys((*INPUTS, *WEIGHTS))
        for name, size in sizes.items():
            # Long sums are as large as those of 16 terms: gates that are all 0 or 1 would hide errors.
            depth = math.prod(size[1:]) if name.startswith("weight") else 0
            scale = 0.7 * min(1.0, (16 / max(depth, 1)) ** 0.5)
            tensor = (scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype)
            found[name] = lay_out(tensor, self.layout) if depth else tensor
        return found


def given(operands, *names):
    return [operands[name] for name in names]


def forward(module, case, operands, keep=True):
    return module.recurrent(*given(operands, *INPUTS, *WEIGHTS), *case.rule, keep)


def saved_of(case, operands):
    """What the derivatives read, from the portable forward pass."""
    out, _, _, *kept = forward(portable, case, operands)
    return {"out": out} | dict(zip(("gates", "products", "cells"), case.only(kept), strict=True))


def drawn(like, seed):
    if like is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def backward(module, case, operands, saved, grads=None):
    grads = given(saved | operands, "out", *STATES) if grads is None else grads
    grads = [drawn(t, 50 + index) for index, t in enumerate(grads)]
    return module.recurrent_grads(*grads, *given(operands | saved, *INPUTS, *saved, *WEIGHTS), *case.rule)


def tangents(module, case, operands, saved):
    """Of all that has tangents."""
    factored, hr = case.form.structure == FACTORED, case.state is not None
    like = operands | saved | {"out": saved["out"] if hr else None}
    like["factors_x"] = operands["factors_x"] if factored else None
    names = ("gates_x", "factors_x", "products", "out", *STATES)
    given_t = [drawn(t, 70 + index) for index, t in enumerate(given(like, *names))]
    return module.recurrent_tangents(
        *given_t, *given(operands | saved, *INPUTS, *saved, *WEIGHTS), *case.rule
    )


class InDouble:
    """The portable operations on the same numbers in float64."""

    def __getattr__(self, name):
        def call(*arguments):
            wide = (
                t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments
            )
            return getattr(portable, name)(*wide)

        return call


def results(module, case, dtype, seed=0):
    """Forward, backward and tangents; the derivatives read what the portable forward pass kept."""
    operands = case.operands(dtype, seed)
    saved = saved_of(case, operands)
    derivatives = (call(module, case, operands, saved) for call in (backward, tangents))
    return *forward(module, case, operands), *(t for found in derivatives for t in found)


def check(module, case, dtype, draws=1):
    """Twice the portable error in L2 over all draws, or the rounding of the result."""
    found = []
    for one in (module, portable, InDouble()):
        runs = [results(one, case, dtype, seed) for seed in range(draws)]
        found.append([torch.cat([t.flatten() for t in parts]) for parts in zip(*runs, strict=True)])
    for index, (ours, theirs, exact) in enumerate(zip(*found, strict=True)):
        assert ours.shape == exact.shape and ours.dtype == theirs.dtype, index
        own, allowed = relative_error(ours, exact), FLOAT64_LIMIT
        if dtype != torch.float64:
            allowed = max(2 * relative_error(theirs, exact), torch.finfo(ours.dtype).eps / 2)
        assert own <= allowed, f"result {index}: error {own:.3g}, allowed {allowed:.3g}"
