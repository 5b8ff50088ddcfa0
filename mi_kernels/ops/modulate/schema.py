"""Schemas and fakes of modulation and its adjoint.

All tensors of a call have the same number of dimensions; each size of ``scale`` and ``shift`` is 1 or that of
``x``. The activation is one of ``activations.ELEMENTWISE``. With R the sum over the dimensions in which an
operand has size 1:

    modulate        y = (act(scale) + s) * x + shift                                  as x
    modulate_grads  dx = (act(scale) + s) g,  dscale = act'(scale) R[x g],  dshift = R[g]

y and dx have the memory format of ``torch.empty_like(x)``. A result that is not wanted has no elements.
"""

import torch

from mi_kernels.ops import activations
from mi_kernels.ops.checks import BROADCAST, LIKE, axes_like, check_activation, match_sizes
from mi_kernels.ops.dtypes import FLOATING
from mi_kernels.ops.flops import elementwise
from mi_kernels.ops.library import define, define_family
from mi_kernels.ops.modulate import portable


def _modulate_fake(x, scale, shift, activation, scale_offset):
    return torch.empty_like(x)


def _modulate_grads_fake(
    grad, x, scale, shift_size, activation, scale_offset, want_x, want_scale, want_shift
):
    return (
        torch.empty_like(x) if want_x else x.new_empty(0),
        x.new_empty(scale.shape if want_scale else (0,)),
        x.new_empty(shift_size if want_shift else (0,)),
    )


def _check(x, scale, shift, activation, scale_offset):
    check_activation("modulate", activation, activations.ELEMENTWISE)


def _check_grads(grad, x, scale, shift_size, activation, scale_offset, want_x, want_scale, want_shift):
    op = "modulate_grads"
    check_activation(op, activation, activations.ELEMENTWISE)
    if want_shift:
        match_sizes(op, "shift_size", shift_size, axes_like(x.shape), or_one=True)


def _gradient_sizes(arguments):
    sizes = arguments["x"].shape, arguments["scale"].shape, arguments["shift_size"]
    flags = arguments["want_x"], arguments["want_scale"], arguments["want_shift"]
    return [size if flag else None for size, flag in zip(sizes, flags, strict=True)]


define_family("modulate")
define(
    "modulate",
    "(Tensor x, Tensor scale, Tensor? shift, str activation, float scale_offset) -> Tensor",
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
    " bool want_x, bool want_scale, bool want_shift) -> (Tensor, Tensor, Tensor)",
    portable.modulate_grads,
    _modulate_grads_fake,
    {"grad": LIKE, "x": LIKE, "scale": BROADCAST},
    _check_grads,
    dtypes=FLOATING,
    flops=elementwise,
    results=_gradient_sizes,
)
