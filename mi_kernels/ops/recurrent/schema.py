"""Schemas and fakes of multiplicative RNNs: all steps that depend on the state.

What depends on x alone comes as products over all steps, gates_x = V x (+ b) [T, B, N] and factors_x. With P
features of the state h, H units and N = H times the gates of the cell, a step is

    factored      a = weight_mh h,  p = gates_x + weight_hm (factors_x a) + weight_hh h    factors_x [T, B, M]
    integrated    q = weight_hh h,  p = alpha gates_x q + beta_h q + beta_x gates_x + b
    dense         p = gates_x + h^T weight factors_x + weight_hh h                         factors_x [T, B, X]

    plain  h = act(p)
    lstm   i, f, g, o = sigmoid(p_i), sigmoid(p_f), tanh(p_g), sigmoid(p_o),  c = f c + i g,  h = o tanh(c)
    gru    r, z = sigmoid(p_r), sigmoid(p_z),  n = tanh(p_n) with q_n = weight_hh_n (r h),  h = n + z (h - n)

``forms.KINDS`` has structure and cell of each kind; "second_order" with weight_hm is factored. alpha, beta_h,
beta_x and b are the rows of ``integration`` [4, N]. With weight_hr of a lstm h is weight_hr (o tanh(c)).
``lengths`` [B], int64 on the device of x, from 0 to T: a row makes the steps t < lengths[b], from the last
one with ``reverse``; its state is that after its last step, and all results of its other steps are zero.

With ``keep`` the results have what the backward pass reads: the values of the gates (factored lstm), the
products a or q, c in the accumulation dtype, o tanh(c) (with weight_hr). What is not kept, or not there, has
no elements, as a result, and is None as an argument.

``recurrent_grads`` has the gradients of gates_x, factors_x (factored), the products a or q, h0, c0 and
integration, and with weight_hr those of h after each step. Those of the weights, and of factors_x of a dense
form, are products of these. ``recurrent_tangents`` has the tangents of its results for gates_t, added to p_t;
factors_t; products_t, added to a_t or q_t; out_t, added to h_t where there is a weight_hr; h0_t and c0_t. It
has no tangents of weights: their terms are in what is added.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_activation, check_tensors, match_sizes
from ..dtypes import FLOATING, accumulation_dtype
from ..flops import products
from ..library import Axes, define, define_family
from . import portable
from .forms import (
    ACTIVATIONS,
    DENSE,
    FACTORED,
    INTEGRATED,
    KINDS,
    LSTM,
    PLAIN,
    form_of,
)

_WEIGHTS = {
    "weight_hh": "NP",
    "weight_hm": "NM",
    "weight_mh": "MP",
    "weight": "HPM",
    "weight_hr": "PH",
    "integration": "QN",
}
_NEEDED = {FACTORED: ("factors_x", "weight_hm", "weight_mh"), INTEGRATED: ("weight_hh", "integration")}
_NEEDED[DENSE] = ("factors_x", "weight")


def check_form(op: str, arguments: dict[str, Any]) -> None:
    """What a kind needs is there, and what it does not have is not."""
    kind, activation, weight_hr = (arguments[name] for name in ("kind", "activation", "weight_hr"))
    if kind not in KINDS:
        raise ValueError(f"{op}: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    form = form_of(kind, arguments["weight_hm"])
    check_activation(op, activation, ACTIVATIONS)
    if form.cell != PLAIN and activation != "tanh":
        raise ValueError(f"{op}: activation: expected tanh for {kind}, got {activation!r}")
    needed = _NEEDED[form.structure]
    optional = () if form.structure == INTEGRATED else ("weight_hh",)
    for name in ("factors_x", *_WEIGHTS):
        if name == "weight_hr":
            continue
        if name in needed and arguments[name] is None:
            raise ValueError(f"{op}: {name}: expected a tensor for {kind}, got None")
        if name not in (*needed, *optional) and arguments[name] is not None:
            raise ValueError(f"{op}: {name}: expected None for {kind}, got a tensor")
    lstm = form.cell == LSTM
    if (arguments["c0"] is not None) != lstm:
        raise ValueError(f"{op}: c0: expected {'a tensor' if lstm else 'None'} for {kind}")
    if weight_hr is not None and not lstm:
        raise ValueError(f"{op}: weight_hr: expected None for {kind}, got a tensor")
    units = arguments["gates_x"].shape[2] // form.gates
    if units * form.gates != arguments["gates_x"].shape[2]:
        raise ValueError(
            f"{op}: gates_x: expected a multiple of {form.gates} features for {kind},"
            f" got {arguments['gates_x'].shape[2]}"
        )
    if weight_hr is None:
        match_sizes(op, "h0", arguments["h0"].shape, [("B", None), ("H", units)])
    for name, letters in (("c0", "BH"), ("weight", "HPM"), ("weight_hr", "PH")):
        if arguments[name] is not None:
            sizes = [(letter, units if letter == "H" else None) for letter in letters]
            match_sizes(op, name, arguments[name].shape, sizes)
    if arguments["integration"] is not None:
        match_sizes(op, "integration", arguments["integration"].shape, [("4", 4), ("N", None)])


def _check_lengths(op: str, lengths: Any, gates_x: Tensor) -> None:
    if lengths is None:
        return
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{op}: lengths: expected a torch.Tensor, got {type(lengths).__name__}")
    if lengths.layout is not torch.strided or lengths.is_nested:
        raise TypeError(f"{op}: lengths: expected a dense (strided) tensor, got {lengths.layout}")
    if lengths.dtype != torch.int64:
        raise TypeError(f"{op}: lengths: expected torch.int64, got {lengths.dtype}")
    if lengths.device != gates_x.device:
        raise ValueError(f"{op}: lengths: expected device {gates_x.device}, got {lengths.device}")
    match_sizes(op, "lengths", lengths.shape, [("B", gates_x.shape[1])])


def _kept_sizes(form: Any, gates_x: Any, factors_x: Any, weight_hr: Any) -> dict[str, tuple[Any, ...] | None]:
    lead, features = tuple(gates_x[:2]), gates_x[2]
    units = features // form.gates
    lstm, factored = form.cell == LSTM, form.structure == FACTORED
    return {
        "gates": (*lead, features) if lstm and factored else None,
        "products": None if form.structure == DENSE else (*lead, factors_x[2] if factored else features),
        "cells": (*lead, units) if lstm else None,
        "hidden": None if weight_hr is None else (*lead, units),
    }


def _named(names: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(names.split(), arguments, strict=True))


_COMMON = "weight_hh weight_hm weight_mh weight weight_hr integration lengths kind activation reverse"
_FORWARD = f"gates_x factors_x h0 c0 {_COMMON} keep"
_SAVED = "gates_x factors_x h0 c0 out gates products cells"
_GRADS = f"grad grad_h grad_c {_SAVED} {_COMMON}"
_TANGENTS = f"gates_t factors_t products_t out_t h0_t c0_t {_SAVED} {_COMMON}"


def _check(*arguments):
    given = _named(_FORWARD, arguments)
    check_form("recurrent", given)
    _check_lengths("recurrent", given["lengths"], given["gates_x"])


def _fake(*arguments):
    given = _named(_FORWARD, arguments)
    gates_x, h0, c0, factors_x = (given[name] for name in ("gates_x", "h0", "c0", "factors_x"))
    form = form_of(given["kind"], given["weight_hm"])
    sizes = _kept_sizes(
        form, gates_x.shape, None if factors_x is None else factors_x.shape, given["weight_hr"]
    )
    kept = [
        gates_x.new_empty(
            size if size is not None and given["keep"] else (0,),
            dtype=accumulation_dtype(gates_x.dtype) if name == "cells" else None,
        )
        for name, size in sizes.items()
    ]
    out = gates_x.new_empty(*gates_x.shape[:2], h0.shape[1])
    return out, gates_x.new_empty(h0.shape), gates_x.new_empty((0,) if c0 is None else c0.shape), *kept


def _check_saved(op, given):
    check_form(op, given)
    gates_x, factors_x = given["gates_x"], given["factors_x"]
    _check_lengths(op, given["lengths"], gates_x)
    form = form_of(given["kind"], given["weight_hm"])
    sizes = _kept_sizes(form, gates_x.shape, None if factors_x is None else factors_x.shape, None)
    sizes.pop("hidden")
    wide = accumulation_dtype(gates_x.dtype)
    for name, size in sizes.items():
        if (given[name] is None) != (size is None):
            raise ValueError(f"{op}: {name}: expected {'None' if size is None else 'a tensor'}")
        if size is not None:
            dtype = wide if name == "cells" else gates_x.dtype
            _check_one(op, name, given[name], dtype, gates_x.device, size)


def _check_one(op, name, tensor, dtype, device, size):
    check_tensors(op, (name,), (tensor,), 1, (dtype,))
    if tensor.device != device:
        raise ValueError(f"{op}: {name}: expected device {device}, got {tensor.device}")
    match_sizes(op, name, tensor.shape, [(str(d), one) for d, one in enumerate(size)])


def _check_grads(*arguments):
    given = _named(_GRADS, arguments)
    _check_saved("recurrent_grads", given)


def _grads_fake(*arguments):
    given = _named(_GRADS, arguments)
    gates_x, factors_x, h0, c0 = (given[name] for name in ("gates_x", "factors_x", "h0", "c0"))
    integration, out = given["integration"], given["out"]
    factored = form_of(given["kind"], given["weight_hm"]).structure == FACTORED
    like = {
        "gates": gates_x,
        "factors": factors_x if factored else None,
        "products": given["products"],
        "h0": h0,
        "c0": c0,
        "integration": integration,
        "out": None if given["weight_hr"] is None else out,
    }
    return tuple(gates_x.new_empty((0,) if t is None else t.shape) for t in like.values())


def _check_tangents(*arguments):
    given = _named(_TANGENTS, arguments)
    _check_saved("recurrent_tangents", given)
    if (given["c0_t"] is None) != (given["c0"] is None):
        raise ValueError("recurrent_tangents: c0_t: expected a tensor exactly where c0 is one")
    if given["products_t"] is not None:
        if given["products"] is None:
            raise ValueError(
                f"recurrent_tangents: products_t: expected None for {given['kind']}, got a tensor"
            )
        like = given["products"]
        _check_one(
            "recurrent_tangents", "products_t", given["products_t"], like.dtype, like.device, like.shape
        )
    if given["factors_t"] is not None and form_of(given["kind"], given["weight_hm"]).structure != FACTORED:
        raise ValueError(f"recurrent_tangents: factors_t: expected None for {given['kind']}, got a tensor")
    if given["out_t"] is not None and given["weight_hr"] is None:
        raise ValueError("recurrent_tangents: out_t: expected None without weight_hr, got a tensor")


def _tangents_fake(*arguments):
    given = _named(_TANGENTS, arguments)
    gates_x, h0, c0 = (given[name] for name in ("gates_x", "h0", "c0"))
    return (
        gates_x.new_empty(given["out"].shape),
        gates_x.new_empty(h0.shape),
        gates_x.new_empty((0,) if c0 is None else c0.shape),
    )


_KEPT_AXES = {"gates": "TBN", "products": "TBK", "cells": "TBH", "hidden": "TBH"}
_ROWS = {**_KEPT_AXES, "lengths": "B"}


def _results(arguments):
    form = form_of(arguments["kind"], arguments["weight_hm"])
    factors = arguments["factors_x"]
    sizes = _kept_sizes(
        form, arguments["gates_x"].shape, None if factors is None else factors.shape, arguments["weight_hr"]
    )
    kept = [
        Axes(_KEPT_AXES[name]) if size is not None and arguments["keep"] else None
        for name, size in sizes.items()
    ]
    return [Axes("TBP"), Axes("BP"), None if arguments["c0"] is None else Axes("BH"), *kept]


def _grads_results(arguments):
    form = form_of(arguments["kind"], arguments["weight_hm"])
    there = {
        "TBN": True,
        "TBM": form.structure == FACTORED,
        "TBK": arguments["products"] is not None,
        "BP": True,
        "BH": arguments["c0"] is not None,
        "QN": arguments["integration"] is not None,
        "TBP": arguments["weight_hr"] is not None,
    }
    return [Axes(letters) if given else None for letters, given in there.items()]


def _tangents_results(arguments):
    return [Axes("TBP"), Axes("BP"), None if arguments["c0"] is None else Axes("BH")]


def _step_flops(gates_x, weights):
    """The products with the state, of all steps."""
    return products((gates_x[0] * gates_x[1], gates_x[2]), *weights[:5])


def _flops(gates_x, factors_x, h0, c0, *weights, **__):
    return _step_flops(gates_x, weights)


def _grads_flops(
    grad, grad_h, grad_c, gates_x, factors_x, h0, c0, out, gates, products_, cells, *weights, **__
):
    return _step_flops(gates_x, weights)


def _tangents_flops(
    gates_t,
    factors_t,
    products_t,
    out_t,
    h0_t,
    c0_t,
    gates_x,
    factors_x,
    h0,
    c0,
    out,
    gates,
    products_,
    cells,
    *weights,
    **__,
):
    return _step_flops(gates_x, weights)


_ARGUMENTS = (
    "Tensor? weight_hh, Tensor? weight_hm, Tensor? weight_mh, Tensor? weight, Tensor? weight_hr,"
    " Tensor? integration, Tensor? lengths, str kind, str activation, bool reverse"
)
_KEPT = (
    "Tensor gates_x, Tensor? factors_x, Tensor h0, Tensor? c0, Tensor out, Tensor? gates, Tensor? products,"
)
_KEPT += f" Tensor? cells, {_ARGUMENTS}"

define_family("recurrent", "interaction", "modulate")
define(
    "recurrent",
    f"(Tensor gates_x, Tensor? factors_x, Tensor h0, Tensor? c0, {_ARGUMENTS}, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    portable.recurrent,
    _fake,
    {"gates_x": "TBN", "h0": "BP", "factors_x": "TBM", "c0": "BH"} | _WEIGHTS,
    _check,
    dtypes=FLOATING,
    more_axes=_ROWS,
    cuts="B",
    flops=_flops,
    results=_results,
)
define(
    "recurrent_grads",
    f"(Tensor? grad, Tensor? grad_h, Tensor? grad_c, {_KEPT})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    portable.recurrent_grads,
    _grads_fake,
    {"gates_x": "TBN", "h0": "BP", "out": "TBP", "factors_x": "TBM", "c0": "BH"}
    | {"grad": "TBP", "grad_h": "BP", "grad_c": "BH"}
    | _WEIGHTS,
    _check_grads,
    dtypes=FLOATING,
    more_axes=_ROWS,
    cuts="B",
    flops=_grads_flops,
    results=_grads_results,
)
define(
    "recurrent_tangents",
    "(Tensor gates_t, Tensor? factors_t, Tensor? products_t, Tensor? out_t, Tensor h0_t, Tensor? c0_t,"
    f" {_KEPT}) -> (Tensor, Tensor, Tensor)",
    portable.recurrent_tangents,
    _tangents_fake,
    {"gates_t": "TBN", "h0_t": "BP", "gates_x": "TBN", "h0": "BP", "out": "TBP", "factors_t": "TBM"}
    | {"out_t": "TBP", "c0_t": "BH", "factors_x": "TBM", "c0": "BH", "gates": "TBN"}
    | _WEIGHTS,
    _check_tangents,
    dtypes=FLOATING,
    more_axes=_ROWS | {"products_t": "TBK"},
    cuts="B",
    flops=_tangents_flops,
    results=_tangents_results,
)
