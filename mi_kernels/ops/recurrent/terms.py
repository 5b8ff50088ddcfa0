"""Calls of the kernels of multiplicative RNNs, and the products over all steps that complete derivatives.

`gradients` and `tangents` have no derivatives of their own; autograd.py has.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..interaction import autograd as dense
from ..interaction.linear import linear, linear_grads
from ..library import overloads
from ..rules import Maybe, add
from . import schema  # noqa: F401  (defines the operations)
from .forms import DENSE, FACTORED, GRU, Form, form_of
from .steps import integrate, previous

_RECURRENT = overloads("recurrent")
_GRADS = overloads("recurrent_grads")
_TANGENTS = overloads("recurrent_tangents")
_MODULATE = overloads("modulate")


class Setting(NamedTuple):
    """All arguments but the tensors."""

    kind: str
    activation: str
    reverse: bool


class Operands(NamedTuple):
    gates_x: Tensor  # [T, B, N]
    factors_x: Maybe  # [T, B, M]
    h0: Tensor  # [B, P]
    c0: Maybe  # [B, H]
    weight_hh: Maybe  # [N, P]
    weight_hm: Maybe  # [N, M]
    weight_mh: Maybe  # [M, P]
    weight: Maybe  # [H, P, M]
    weight_hr: Maybe  # [P, H]
    integration: Maybe  # [4, N]
    lengths: Maybe  # [B]

    def form(self, setting: Setting) -> Form:
        return form_of(setting.kind, self.weight_hm)


class Kept(NamedTuple):
    """What the forward pass leaves for the others, all [T, B, ...]; None: the form does not have it."""

    out: Tensor
    gates: Maybe
    products: Maybe
    cells: Maybe
    hidden: Maybe


# The number of operands that have derivatives; the others follow them.
DIFFERENTIABLE = len(Operands._fields) - 1


def kernel(backend: str, setting: Setting, keep: bool, *operands: Any) -> tuple[Tensor, ...]:
    """out, h_n, c_n and what is kept; what is not there has no elements."""
    return _RECURRENT[backend](*operands, *setting, keep)


def _rows(tensor: Any) -> Any:
    """[T, B, ...] as [T B, ...]."""
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], tensor.shape[2])


def gradients(
    backend: str,
    setting: Setting,
    want: Sequence[bool],
    grads: Sequence[Maybe],  # of out, h_n and c_n
    operands: Operands,
    kept: Kept,
) -> list[Maybe]:
    """The wanted gradients of the operands."""
    results = kernel_grads(backend, setting, grads, operands, kept)
    return completed(backend, setting, want, results, operands, kept)


def kernel_grads(
    backend: str, setting: Setting, grads: Sequence[Maybe], operands: Operands, kept: Kept
) -> tuple[Tensor, ...]:
    """The results of ``recurrent_grads``."""
    gates_x, factors_x, h0, c0, *weights = operands
    return _GRADS[backend](*grads, gates_x, factors_x, h0, c0, *kept[:4], *weights, *setting)


def completed(
    backend: str,
    setting: Setting,
    want: Sequence[bool],
    results: Sequence[Tensor],
    operands: Operands,
    kept: Kept,
) -> list[Maybe]:
    """The wanted gradients, of the results of ``recurrent_grads``: those of the weights are products."""
    d_gates, d_factors, d_products, dh0, dc0, d_integration, d_out = results
    _, want_factors, _, _, want_hh, want_hm, want_mh, want_weight, want_hr, _ = want
    structure, cell = operands.form(setting)
    factors_x = operands.factors_x
    found: dict[str, Any] = {"gates_x": d_gates, "h0": dh0, "c0": dc0, "integration": d_integration}

    def product(grad: Tensor, features: Tensor) -> Maybe:
        return linear_grads(backend, (False, True, False), _rows(grad), _rows(features), None)[1]

    before = None
    if want_hh or want_mh or want_weight or (want_factors and structure == DENSE):
        before = previous(operands.h0, kept.out, operands.lengths, setting.reverse)
    if structure == FACTORED:
        assert factors_x is not None and kept.products is not None
        found["factors_x"] = d_factors
        if want_hm:
            found["weight_hm"] = product(d_gates, factors_x * kept.products)
        if want_mh:
            assert before is not None
            found["weight_mh"] = product(d_products, before)
    if structure == DENSE:
        assert factors_x is not None
        if before is not None and (want_weight or want_factors):
            rows = _rows(d_gates), _rows(factors_x), _rows(before)
            wants = (want_weight, False, False, False)
            found["weight"] = dense.weight_grads(backend, wants, *rows, (operands.weight, None, None))[0]
            found["factors_x"] = dense.input_grads(
                backend, (want_factors, False), *rows, operands.weight, None, None
            )[0]
            if want_factors:
                found["factors_x"] = found["factors_x"].view(factors_x.shape)
    if want_hh:
        assert before is not None
        if cell == GRU:
            width = 2 * (d_products.shape[-1] // 3)
            reset = _reset(backend, operands, kept.products, before)
            parts = (product(d_products[..., :width], before), product(d_products[..., width:], reset))
            found["weight_hh"] = torch.cat(parts)  # type: ignore[arg-type]
        else:
            found["weight_hh"] = product(d_gates if structure in (FACTORED, DENSE) else d_products, before)
    if want_hr:
        found["weight_hr"] = product(d_out, kept.hidden)  # type: ignore[arg-type]
    names = Operands._fields[:DIFFERENTIABLE]
    return [found[name] if wanted else None for name, wanted in zip(names, want, strict=True)]


def _reset(backend: str, operands: Operands, products: Any, before: Tensor) -> Tensor:
    """r h [T, B, H] of a GRU, by a kernel whose bits, unlike those of torch.sigmoid, depend on no threads."""
    units, wide = before.shape[2], torch.promote_types(products.dtype, torch.float32)
    parts = (products[..., :units], operands.gates_x[..., :units], operands.integration[:, :units])  # type: ignore[index]
    pre_activation = integrate(*(part.to(wide) for part in parts))
    gated = _MODULATE[backend](before.to(wide), pre_activation, None, "sigmoid", 0.0)
    return gated.to(before.dtype)


def tangents(
    backend: str, setting: Setting, along: Sequence[Maybe], operands: Operands, kept: Kept
) -> tuple[Tensor, ...]:
    """The tangents of out, h_n and c_n for those of the operands."""
    return kernel_tangents(
        backend, setting, tangent_terms(backend, setting, along, operands, kept), operands, kept
    )


def kernel_tangents(
    backend: str, setting: Setting, terms: Sequence[Maybe], operands: Operands, kept: Kept
) -> tuple[Tensor, ...]:
    """The results of ``recurrent_tangents``; ``terms`` are those of `tangent_terms`."""
    gates_x, factors_x, h0, c0, *weights = operands
    return _TANGENTS[backend](*terms, gates_x, factors_x, h0, c0, *kept[:4], *weights, *setting)


def tangent_terms(
    backend: str, setting: Setting, along: Sequence[Maybe], operands: Operands, kept: Kept
) -> tuple[Maybe, ...]:
    """gates_t, factors_t, products_t, out_t, h0_t and c0_t: tangents of data, and products with weights'."""
    gates_t, factors_t, h0_t, c0_t, hh_t, hm_t, mh_t, weight_t, hr_t, integration_t = along
    structure, cell = operands.form(setting)
    gates_x, factors_x, products = operands.gates_x, operands.factors_x, kept.products

    def product(features: Any, weight: Maybe) -> Maybe:
        if weight is None:
            return None
        y = linear(backend, _rows(features), weight, None)
        return y.view(*features.shape[:-1], y.shape[-1])

    before: Any = None
    if any(t is not None for t in (hh_t, mh_t, weight_t)) or (structure == DENSE and factors_t is not None):
        before = previous(operands.h0, kept.out, operands.lengths, setting.reverse)
    products_t = None
    if structure == FACTORED:
        products_t = product(before, mh_t)
        by_hm = None if hm_t is None else product(factors_x * products, hm_t)  # type: ignore[operator]
        gates_t = add(gates_t, by_hm, product(before, hh_t))
    elif structure == DENSE:
        for x, weight in ((factors_x, weight_t), (factors_t, operands.weight)):
            if x is not None and weight is not None:
                y = dense.forward(backend, _rows(x), _rows(before), weight, None, None, None)
                gates_t = add(gates_t, y.view(gates_x.shape))
        gates_t, factors_t = add(gates_t, product(before, hh_t)), None
    else:
        assert products is not None and operands.integration is not None
        if hh_t is not None and cell == GRU:
            width = 2 * (products.shape[-1] // 3)
            reset = _reset(backend, operands, products, before)
            parts: Any = (product(before, hh_t[:width]), product(reset, hh_t[width:]))
            products_t = torch.cat(parts, -1)
        else:
            products_t = product(before, hh_t)
        gates_t = _integrated_tangent(operands.integration, gates_t, integration_t, gates_x, products)
    rows = gates_x.shape[:2]
    if gates_t is None:
        gates_t = gates_x.new_zeros(gates_x.shape)
    if h0_t is None:
        h0_t = gates_x.new_zeros(operands.h0.shape)
    if c0_t is None and operands.c0 is not None:
        c0_t = gates_x.new_zeros(operands.c0.shape)
    assert gates_t.shape[:2] == rows
    return gates_t, factors_t, products_t, product(kept.hidden, hr_t), h0_t, c0_t


def _integrated_tangent(
    integration: Tensor, gates_t: Maybe, integration_t: Maybe, gates_x: Tensor, products: Tensor
) -> Maybe:
    """What an integrated form adds to its pre-activations, but for the terms of the tangents of products."""
    by_x = by_vectors = None
    if gates_t is not None:
        by_x = gates_t * (integration[0] * products + integration[2])
    if integration_t is not None:
        by_vectors = integrate(products, gates_x, integration_t)
    return add(by_x, by_vectors)
