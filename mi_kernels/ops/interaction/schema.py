"""Schemas and fakes of the three primitives of the dense interaction.

Sizes: rows B, context Z, input X, output O. All tensors may have one more leading dimension of G groups, as
in a batched matrix product: group k of the activations is multiplied by group k of the weights.
``torch.vmap`` folds the mapped dimension into rows or groups.

    forward        y  = z^T W x + U z + V x + c                          [G, B, O]
    input_grads    dx = sum_oi g z W + g V,  dz = sum_oj g W x + g U     [G, B, X], [G, B, Z]
    weight_grads   dW = sum_b g z x,  dU = g^T z,  dV = g^T x,  dc = sum_b g

All are partial derivatives of L(g, x, z, W, U, V, c) = sum_b g . y, so their own derivatives are again these
three (docs/mathematics.md). `interaction_packed` is the forward pass with W packed beforehand
(packed_weight.py), for inference without groups. `interaction_by_segment` and its two gradients are for
groups of rows of unequal length, each with its own weights (by_segment.py). A result that is not wanted has
no elements.
"""

import math

from .. import precision  # noqa: F401  (defines an operation that the CUDA kernels call)
from ..checks import check_index, check_needed, check_shape, check_tensors
from ..dtypes import DTYPES
from ..flops import products
from ..library import Axes, define, define_family
from . import by_segment, portable


def _forward_fake(x, z, weight, weight_z, weight_x, bias):
    return x.new_empty((*x.shape[:-1], portable.out_features(weight, weight_z, weight_x, bias)))


def _packed_forward_fake(x, z, weight, packed_weight, weight_z, weight_x, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[-3]))


def _input_grads_fake(grad, x, z, weight, weight_z, weight_x, want_x, want_z):
    return (
        x.new_empty(x.shape if want_x else (0,)),
        z.new_empty(z.shape if want_z else (0,)),
    )


def _weight_grads_fake(grad, x, z, want_weight, want_weight_z, want_weight_x, want_bias):
    groups = grad.shape[:-2]
    o, i, j = grad.shape[-1], z.shape[-1], x.shape[-1]
    return (
        grad.new_empty((*groups, o, i, j) if want_weight else (0,)),
        grad.new_empty((*groups, o, i) if want_weight_z else (0,)),
        grad.new_empty((*groups, o, j) if want_weight_x else (0,)),
        grad.new_empty((*groups, o) if want_bias else (0,)),
    )


_WEIGHTS = {"weight": "OZX", "weight_z": "OZ", "weight_x": "OX"}
_FORWARD = {"x": "BX", "z": "BZ", **_WEIGHTS, "bias": "O"}
_GRADS = {"grad": "BO", "x": "BX", "z": "BZ"}


def _check_forward(x, z, weight, weight_z, weight_x, bias):
    check_needed("interaction", (*_WEIGHTS, "bias"), (weight, weight_z, weight_x, bias))


# The packed weight has its own dtype and row length, checked by the kernel that reads it.
def _check_packed(x, z, weight, packed_weight, weight_z, weight_x, bias):
    op = "interaction_packed"
    check_tensors(op, ("packed_weight",), (packed_weight,), 1, DTYPES)
    if packed_weight.device != x.device:
        raise ValueError(
            f"{op}: packed_weight: expected device {x.device} (that of x), got {packed_weight.device}"
        )
    if packed_weight.dim() != 3:
        raise ValueError(
            f"{op}: packed_weight: expected 3 dimensions, as mi.pack makes them,"
            f" got {list(packed_weight.shape)}"
        )


def _forward_flops(x, z, weight, weight_z, weight_x, bias, **_):
    return products(x, weight, weight_z, weight_x)


def _packed_forward_flops(x, z, weight, packed_weight, weight_z, weight_x, bias, **_):
    return products(x, weight, weight_z, weight_x)


def _input_grads_flops(grad, x, z, weight, weight_z, weight_x, want_x, want_z, **_):
    return products(x, weight, weight_z if want_z else None, weight_x if want_x else None)


def _weight_grads_flops(grad, x, z, want_weight, want_weight_z, want_weight_x, want_bias, **_):
    out, context, width = grad[-1], z[-1], x[-1]
    each = want_weight * context * width + want_weight_z * context + want_weight_x * width
    return 2 * math.prod(grad[:-1]) * out * each


_BY_SEGMENT = {"weight": "GOZX", "weight_z": "GOZ", "weight_x": "GOX", "bias": "GO"}
_ROWS = "Tensor row_index, Tensor offsets"


def _check_order(op, like, row_index, offsets):
    check_index(op, "row_index", row_index, like)
    check_index(op, "offsets", offsets, like)
    check_shape(op, "row_index", row_index, {"N": like.shape[0]})
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"{op}: offsets: expected shape [G + 1], got {list(offsets.shape)}")


def _check_by_segment(x, z, weight, weight_z, weight_x, bias, row_index, offsets):
    op, weights = "interaction_by_segment", (weight, weight_z, weight_x, bias)
    check_needed(op, (*_WEIGHTS, "bias"), weights)
    _check_order(op, x, row_index, offsets)
    for name, tensor in zip((*_WEIGHTS, "bias"), weights, strict=True):
        if tensor is not None and tensor.shape[0] != offsets.shape[0] - 1:
            raise ValueError(
                f"{op}: offsets: expected G + 1 = {tensor.shape[0] + 1} elements (G is that of {name}),"
                f" got {offsets.shape[0]}"
            )


def _check_by_segment_grads(grad, x, z, *others):
    _check_order("interaction_by_segment", x, *others[-2:])


def _by_segment_fake(x, z, weight, weight_z, weight_x, bias, row_index, offsets):
    return _forward_fake(x, z, weight, weight_z, weight_x, bias)


def _by_segment_input_grads_fake(grad, x, z, weight, weight_z, weight_x, want_x, want_z, row_index, offsets):
    return _input_grads_fake(grad, x, z, weight, weight_z, weight_x, want_x, want_z)


def _by_segment_weight_grads_fake(grad, x, z, *others):
    *wanted, _, offsets = others
    return tuple(map(grad.new_empty, by_segment.weight_shapes(grad, x, z, wanted, offsets)))


def _of_one_group(weights):
    return [None if weight is None else weight[1:] for weight in weights]


def _by_segment_flops(x, z, weight, weight_z, weight_x, bias, *_, **__):
    return products(x, *_of_one_group((weight, weight_z, weight_x)))


def _by_segment_input_grads_flops(grad, x, z, weight, weight_z, weight_x, want_x, want_z, *_, **__):
    weights = _of_one_group((weight, weight_z, weight_x))
    return _input_grads_flops(grad, x, z, weights[0], weights[1], weights[2], want_x, want_z)


def _by_segment_weight_grads_flops(grad, x, z, *others, **_):
    return _weight_grads_flops(grad, x, z, *others[:4])


_TERMS = ("x", "z", "weight"), ("z", "weight_z"), ("x", "weight_x"), ("bias",)
_Y = [Axes("BO", _TERMS)]
_INPUTS = {
    "want_x": Axes("BX", (("grad", "z", "weight"), ("grad", "weight_x"))),
    "want_z": Axes("BZ", (("grad", "x", "weight"), ("grad", "weight_z"))),
}
_OF_WEIGHTS = {
    "want_weight": Axes("OZX", (("x", "z", "grad"),)),
    "want_weight_z": Axes("OZ", (("z", "grad"),)),
    "want_weight_x": Axes("OX", (("x", "grad"),)),
    "want_bias": Axes("O", (("grad",),)),
}
_OF_GROUPS = {flag: Axes("G" + axes.letters, axes.terms) for flag, axes in _OF_WEIGHTS.items()}


def _wanted(results):
    return lambda arguments: [axes if arguments[flag] else None for flag, axes in results.items()]


define_family("interaction")
define(
    "interaction",
    "(Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x, Tensor? bias) -> Tensor",
    portable.forward,
    _forward_fake,
    _FORWARD,
    _check_forward,
    groups=True,
    flops=_forward_flops,
    cuts="BOZX",
    results=lambda arguments: _Y,
)
define(
    "interaction_packed",
    "(Tensor x, Tensor z, Tensor weight, Tensor packed_weight, Tensor? weight_z, Tensor? weight_x,"
    " Tensor? bias) -> Tensor",
    portable.packed_forward,
    _packed_forward_fake,
    _FORWARD,
    _check_packed,
    flops=_packed_forward_flops,
    cuts="B",
    results=lambda arguments: _Y,
)
define(
    "interaction_input_grads",
    "(Tensor grad, Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x,"
    " bool want_x, bool want_z) -> (Tensor, Tensor)",
    portable.input_grads,
    _input_grads_fake,
    _GRADS | _WEIGHTS,
    groups=True,
    flops=_input_grads_flops,
    cuts="BOZX",
    results=_wanted(_INPUTS),
)
define(
    "interaction_weight_grads",
    "(Tensor grad, Tensor x, Tensor z, bool want_weight, bool want_weight_z, bool want_weight_x,"
    " bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    portable.weight_grads,
    _weight_grads_fake,
    _GRADS,
    groups=True,
    flops=_weight_grads_flops,
    cuts="BOZX",
    results=_wanted(_OF_WEIGHTS),
)
define(
    "interaction_by_segment",
    "(Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x, Tensor? bias,"
    f" {_ROWS}) -> Tensor",
    by_segment.forward,
    _by_segment_fake,
    {"x": "BX", "z": "BZ", **_BY_SEGMENT},
    _check_by_segment,
    composed=True,
    flops=_by_segment_flops,
    cuts="OZX",
    results=lambda arguments: _Y,
)
define(
    "interaction_by_segment_input_grads",
    "(Tensor grad, Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x,"
    f" bool want_x, bool want_z, {_ROWS}) -> (Tensor, Tensor)",
    by_segment.input_grads,
    _by_segment_input_grads_fake,
    _GRADS | {name: axes for name, axes in _BY_SEGMENT.items() if name != "bias"},
    _check_by_segment_grads,
    composed=True,
    flops=_by_segment_input_grads_flops,
    cuts="OZX",
    results=_wanted(_INPUTS),
)
define(
    "interaction_by_segment_weight_grads",
    "(Tensor grad, Tensor x, Tensor z, bool want_weight, bool want_weight_z, bool want_weight_x,"
    f" bool want_bias, {_ROWS}) -> (Tensor, Tensor, Tensor, Tensor)",
    by_segment.weight_grads,
    _by_segment_weight_grads_fake,
    _GRADS,
    _check_by_segment_grads,
    composed=True,
    flops=_by_segment_weight_grads_flops,
    cuts="OZX",
    results=_wanted(_OF_GROUPS),
)
