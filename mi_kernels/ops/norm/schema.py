"""Schemas and fakes of normalisation with modulation and a gated residual before it.

    x_new = x + gate h,   n = (x_new - mean) rstd,   v = n w + b,   y = v F + shift,   F = act(scale) + s

A *set* that is normalised has the channels of one group, which are dimension ``dim`` of x in ``groups``
equal parts, and all positions behind ``dim``. Layer norm is one group of the last dimension; rms leaves the
mean out (``center``). Without h, x_new is x and no result; without a gate it is x + h; without scale F is 1.

The contexts gate, scale and shift have one size: before ``dim`` that of x or 1, then the channels, then 1.
weight w and bias b have size 1 but for the channels. mean and rstd are [*x.shape[:dim], groups] in the
accumulation dtype; of rms mean is None, and has no elements as a result. With m the mean over a set, R the
sum over the dimensions in which a context has size 1, and ``grad_x`` the cotangent of x_new,
norm_modulate_grads is

    a = g F w,  dx = rstd (a - m(a) - n m(a n)) + grad_x,  dh = gate dx,  dgate = R[h dx],
    dscale = act'(scale) R[g v],  dshift = R[g],  dweight = sum g F n,  dbias = sum g F

Its x is x_new. Of shift only the size is read. A result that is not wanted has no elements.
"""

import torch
from torch import Tensor

from .. import activations
from ..checks import BROADCAST, LIKE, check_activation, check_shape
from ..dtypes import FLOATING, accumulation_dtype
from ..flops import elementwise
from ..library import define, define_family
from . import portable
from .layout import result_like

CONTEXTS = ("gate", "scale", "shift")
GRADIENTS = ("x", "h", *CONTEXTS, "weight", "bias")


def check_form(op: str, x: Tensor, dim: int, groups: int) -> None:
    """The normalised dimensions are there, and the channels fall into groups."""
    if not 0 <= dim < x.dim():
        raise ValueError(f"{op}: dim: expected a dimension of x from 0 to {x.dim() - 1}, got {dim}")
    if groups < 1 or x.shape[dim] % groups != 0:
        raise ValueError(f"{op}: groups: expected a positive divisor of C={x.shape[dim]}, got {groups}")


def _check_operands(op, x, h, contexts, affine, dim, groups, activation):
    check_activation(op, activation, activations.ELEMENTWISE)
    check_form(op, x, dim, groups)
    if h is None and contexts["gate"] is not None:
        raise ValueError(f"{op}: h: expected a tensor beside gate, got None")
    channels = {str(dim): x.shape[dim]}
    behind = {str(d): 1 for d in range(dim + 1, x.dim())}
    size = None
    for name, tensor in contexts.items():
        if tensor is None:
            continue
        size = size or {str(d): tensor.shape[d] for d in range(dim)} | channels | behind
        check_shape(op, name, tensor, size)
    for name, tensor in affine.items():
        check_shape(op, name, tensor, {str(d): 1 for d in range(dim)} | channels | behind)


def _check(x, h, gate, scale, shift, weight, bias, dim, groups, center, eps, activation, scale_offset):
    contexts, affine = {"gate": gate, "scale": scale, "shift": shift}, {"weight": weight, "bias": bias}
    _check_operands("norm_modulate", x, h, contexts, affine, dim, groups, activation)


def _fake(x, h, gate, scale, shift, weight, bias, dim, groups, center, eps, activation, scale_offset):
    size, wide = (*x.shape[:dim], groups), accumulation_dtype(x.dtype)
    x_new = x.new_empty(0) if h is None else result_like(x, dim)
    mean = x.new_empty(size if center else (0,), dtype=wide)
    return result_like(x, dim), x_new, mean, x.new_empty(size, dtype=wide)


def _check_grads(
    grad,
    x,
    grad_x,
    h,
    gate,
    scale,
    shift,
    weight,
    bias,
    mean,
    rstd,
    dim,
    groups,
    center,
    activation,
    _,
    *want,
):
    op = "norm_modulate_grads"
    contexts, affine = {"gate": gate, "scale": scale, "shift": shift}, {"weight": weight, "bias": bias}
    _check_operands(op, x, h, contexts, affine, dim, groups, activation)
    expected = {str(d): x.shape[d] for d in range(dim)} | {"groups": groups}
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        if tensor is None:
            if center or name == "rstd":
                beside = " where the mean is subtracted" if name == "mean" else ""
                raise ValueError(f"{op}: {name}: expected a tensor{beside}, got None")
            continue
        if tensor.layout is not torch.strided:
            raise TypeError(f"{op}: {name}: expected a dense (strided) tensor, got {tensor.layout}")
        if tensor.dtype != accumulation_dtype(x.dtype):
            raise TypeError(f"{op}: {name}: expected {accumulation_dtype(x.dtype)}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name}: expected device {x.device} (that of x), got {tensor.device}")
        check_shape(op, name, tensor, expected)
    given = {"x": x, "h": gate} | contexts | affine  # without a gate dh is dx
    for name, wanted in zip(GRADIENTS, want, strict=True):
        if wanted and given[name] is None:
            needed = "gate" if name == "h" else name
            raise ValueError(f"{op}: {needed}: expected a tensor, as want_{name} is set, got None")


def _grads_fake(
    grad,
    x,
    grad_x,
    h,
    gate,
    scale,
    shift,
    weight,
    bias,
    mean,
    rstd,
    dim,
    groups,
    center,
    activation,
    _,
    *want,
):
    want_x, want_h, *others = want
    tensors = gate, scale, shift, weight, bias
    return (
        result_like(x, dim) if want_x else x.new_empty(0),
        result_like(x, dim) if want_h else x.new_empty(0),
        *(x.new_empty(t.shape if wanted else (0,)) for t, wanted in zip(tensors, others, strict=True)),
    )


def _result_sizes(arguments):
    x, dim = arguments["x"].shape, arguments["dim"]
    size = (*x[:dim], arguments["groups"])
    return [x, None if arguments["h"] is None else x, size if arguments["center"] else None, size]


def _gradient_sizes(arguments):
    sizes = {name: arguments["x" if name == "h" else name] for name in GRADIENTS}
    return [sizes[name].shape if arguments[f"want_{name}"] else None for name in GRADIENTS]


define_family("norm", "modulate")
define(
    "norm_modulate",
    "(Tensor x, Tensor? h, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, int dim,"
    " int groups, bool center, float eps, str activation, float scale_offset)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    portable.norm_modulate,
    _fake,
    {"x": LIKE, "h": LIKE} | dict.fromkeys((*CONTEXTS, "weight", "bias"), BROADCAST),
    _check,
    dtypes=FLOATING,
    flops=elementwise,
    results=_result_sizes,
)
define(
    "norm_modulate_grads",
    "(Tensor grad, Tensor x, Tensor? grad_x, Tensor? h, Tensor? gate, Tensor? scale, Tensor? shift,"
    " Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd, int dim, int groups, bool center,"
    " str activation, float scale_offset, bool want_x, bool want_h, bool want_gate, bool want_scale,"
    " bool want_shift, bool want_weight, bool want_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    portable.norm_modulate_grads,
    _grads_fake,
    dict.fromkeys(("grad", "x", "grad_x", "h"), LIKE)
    | dict.fromkeys((*CONTEXTS, "weight", "bias"), BROADCAST),
    _check_grads,
    dtypes=FLOATING,
    flops=elementwise,
    results=_gradient_sizes,
)
