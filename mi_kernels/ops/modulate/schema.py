"""Schemas and fakes of modulation, of mixtures, and their adjoints.

All tensors of a call have the same number of dimensions; each size of ``scale`` and ``shift`` is 1 or that of
``x``. The activation is one of ``activations.ELEMENTWISE``. With R the sum over the dimensions in which an
operand has size 1:

    modulate        y = (c act(scale) + s) * x + shift                                as x
    modulate_grads  dx = (c act(scale) + s) g,  dscale = c act'(scale) R[x g],  dshift = R[g]
    mix             y = b + act(gate) (a - b), b as a, gate as scale                  as a
    mix_grads       da = act(gate) g,  db = g - act(gate) g,  dgate = act'(gate) R[(a - b) g]

c is ``scale_factor``, s ``scale_offset``. y and dx have the memory format of ``torch.empty_like(x)``, and y,
da and db of a mixture that of ``a``. A result that is not wanted has no elements.
"""

import torch

from .. import activations
from ..checks import BROADCAST, LIKE, axes_like, check_activation, match_sizes
from ..dtypes import FLOATING
from ..flops import elementwise
from ..library import define, define_family
from . import portable


def _modulate_fake(x, scale, shift, activation, scale_offset, scale_factor=1.0):
    return torch.empty_like(x)


def _mix_fake(a, b, gate, activation):
    return torch.empty_like(a)


def _modulate_grads_fake(
    grad, x, scale, shift_size, activation, scale_offset, want_x, want_scale, want_shift, scale_factor=1.0
):
    return (
        torch.empty_like(x) if want_x else x.new_empty(0),
        x.new_empty(scale.shape if want_scale else (0,)),
        x.new_empty(shift_size if want_shift else (0,)),
    )


def _mix_grads_fake(grad, a, b, gate, activation, want_a, want_b, want_gate):
    return (
        torch.empty_like(a) if want_a else a.new_empty(0),
        torch.empty_like(a) if want_b else a.new_empty(0),
        a.new_empty(gate.shape if want_gate else (0,)),
    )


def _check(x, scale, shift, activation, scale_offset, scale_factor=1.0):
    check_activation("modulate", activation, activations.ELEMENTWISE)


def _check_mix(a, b, gate, activation):
    check_activation("mix", activation, activations.ELEMENTWISE)


def _check_mix_grads(grad, a, b, gate, activation, want_a, want_b, want_gate):
    check_activation("mix_grads", activation, activations.ELEMENTWISE)


def _check_grads(
    grad, x, scale, shift_size, activation, scale_offset, want_x, want_scale, want_shift, scale_factor=1.0
):
    op = "modulate_grads"
    check_activation(op, activation, activations.ELEMENTWISE)
    if want_shift:
        match_sizes(op, "shift_size", shift_size, axes_like(x.shape), or_one=True)


def _gradient_sizes(arguments):
    sizes = arguments["x"].shape, arguments["scale"].shape, arguments["shift_size"]
    flags = arguments["want_x"], arguments["want_scale"], arguments["want_shift"]
    return [size if flag else None for size, flag in zip(sizes, flags, strict=True)]


def _mix_gradient_sizes(arguments):
    names = ("a", "b", "gate")
    return [arguments[name].shape if arguments[f"want_{name}"] else None for name in names]


define_family("modulate")
define(
    "modulate",
    "(Tensor x, Tensor scale, Tensor? shift, str activation, float scale_offset,"
    " float scale_factor=1.0) -> Tensor",
    portable.modulate,
    _modulate_fake,
    {"x": LIKE, "scale": BROADCAST, "shift": BROADCAST},
    _check,
    dtypes=FLOATING,
    flops=elementwise,
    results=lambda arguments: [arguments["x"].shape],
)
define(
    "modulate_grads",
    "(Tensor grad, Tensor x, Tensor scale, SymInt[] shift_size, str activation, float scale_offset,"
    " bool want_x, bool want_scale, bool want_shift, float scale_factor=1.0) -> (Tensor, Tensor, Tensor)",
    portable.modulate_grads,
    _modulate_grads_fake,
    {"grad": LIKE, "x": LIKE, "scale": BROADCAST},
    _check_grads,
    dtypes=FLOATING,
    flops=elementwise,
    results=_gradient_sizes,
)
define(
    "mix",
    "(Tensor a, Tensor b, Tensor gate, str activation) -> Tensor",
    portable.mix,
    _mix_fake,
    {"a": LIKE, "b": LIKE, "gate": BROADCAST},
    _check_mix,
    dtypes=FLOATING,
    flops=elementwise,
    results=lambda arguments: [arguments["a"].shape],
)
define(
    "mix_grads",
    "(Tensor grad, Tensor a, Tensor b, Tensor gate, str activation, bool want_a, bool want_b, bool want_gate)"
    " -> (Tensor, Tensor, Tensor)",
    portable.mix_grads,
    _mix_grads_fake,
    {"grad": LIKE, "a": LIKE, "b": LIKE, "gate": BROADCAST},
    _check_mix_grads,
    dtypes=FLOATING,
    flops=elementwise,
    results=_mix_gradient_sizes,
)
