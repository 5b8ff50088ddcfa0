"""Schemas and fakes of the gated forms, rows B, context Z, features X.

    diagonal            p = z A^T + x G^T + a,            y = (act(p) + s) * x + (z C^T + c)      [B, X]
    gated_interaction   p = z^T W x + U z + V x + c,      y = act(p) * x                          [B, X]

Both return y and p: with ``keep_gate`` p in the dtype of x, which saves the backward pass a product, else an
empty [0, X]. Their derivatives are those of the dense interaction and of modulation (autograd.py).
"""

from .. import activations
from ..checks import check_activation, check_needed
from ..dtypes import FLOATING
from ..flops import products
from ..library import Axes, define, define_family
from . import portable

# Gradients of gates are products of the dense interaction; so are gate and shift of shared contexts, which
# modulation applies.
define_family("diagonal", "interaction", "modulate")
define_family("gated_interaction", "interaction", "modulate")


def _fake(x, keep_gate):
    return x.new_empty(x.shape), x.new_empty(x.shape[0] if keep_gate else 0, x.shape[1])


def _results(arguments):
    return [Axes("BX"), Axes("BX" if arguments["keep_gate"] else "0X")]  # [0, X]


def _diagonal_cuts(arguments):
    elementwise = arguments["weight_x"] is None and arguments["activation"] != "softmax"
    return "BX" if elementwise else "B"


def _diagonal_fake(
    x, z, weight, bias, shift_weight, shift_bias, weight_x, activation, scale_offset, keep_gate
):
    return _fake(x, keep_gate)


def _check_diagonal(
    x, z, weight, bias, shift_weight, shift_bias, weight_x, activation, scale_offset, keep_gate
):
    check_activation("diagonal", activation, activations.NAMES)


def _diagonal_flops(x, z, weight, bias, shift_weight, shift_bias, weight_x, *_, **__):
    return products(x, weight, shift_weight, weight_x)


define(
    "diagonal",
    "(Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor? shift_weight, Tensor? shift_bias,"
    " Tensor? weight_x, str activation, float scale_offset, bool keep_gate) -> (Tensor, Tensor)",
    portable.diagonal,
    _diagonal_fake,
    {
        "x": "BX",
        "z": "BZ",
        "weight": "XZ",
        "bias": "X",
        "shift_weight": "XZ",
        "shift_bias": "X",
        "weight_x": "XX",
    },
    _check_diagonal,
    dtypes=FLOATING,
    flops=_diagonal_flops,
    cuts=_diagonal_cuts,
    results=_results,
)


_WEIGHTS = {"weight": "XZX", "weight_z": "XZ", "weight_x": "XX", "bias": "X"}


def _gated_fake(x, z, weight, weight_z, weight_x, bias, activation, keep_gate):
    return _fake(x, keep_gate)


def _check_gated(x, z, weight, weight_z, weight_x, bias, activation, keep_gate):
    check_needed("gated_interaction", tuple(_WEIGHTS), (weight, weight_z, weight_x, bias))
    check_activation("gated_interaction", activation, activations.NAMES)


def _gated_flops(x, z, weight, weight_z, weight_x, *_, **__):
    return products(x, weight, weight_z, weight_x)


define(
    "gated_interaction",
    "(Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x, Tensor? bias,"
    " str activation, bool keep_gate) -> (Tensor, Tensor)",
    portable.gated_interaction,
    _gated_fake,
    {"x": "BX", "z": "BZ", **_WEIGHTS},
    _check_gated,
    dtypes=FLOATING,
    flops=_gated_flops,
    cuts="B",
    results=_results,
)
