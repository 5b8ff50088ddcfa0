"""All pairs of two sequences, y[b, l, m, o] = [x1[b, l] | 1]^T W_o [x2[b, m] | 1]; either 1 is optional.

Layers are generated for each position of one sequence and applied to the other one, as in shared.py:

    generate   P[b,m,o,i] = sum_j W[o,i,j] [x2[b,m] | 1]_j         rows (b, m), outputs (o, i)
    apply      y[b,l,m,o] = sum_i P[b,m,o,i] [x1[b,l] | 1]_i       in groups b: rows l, outputs (m, o)

The 1 of an input is a column of a matrix that becomes the bias of its product, so that no input is copied.
Both products are linear forms of the primitives in autograd.py, and derivatives of all orders follow. Layers
of the first sequence are the rows (o, l) of a product with the second one, which is y with channels first.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import all_fit, broadcast, check_rank, check_shape, check_tensors
from ..library import traceable
from ..rules import Maybe, Rule, recorded, transformed, wanted
from . import autograd as dense
from . import linear, shared

Ones = tuple[bool, bool]


def check_arguments(
    input1: Any, input2: Any, weight: Any, bias: Any, one1: bool, one2: bool, least: int = 2
) -> torch.Size:
    """Returns the leading dimensions, which broadcast. ``bias``: of shape [O], or a single number."""
    op = "biaffine"
    check_tensors(op, ("input1", "input2", "weight", "bias"), (input1, input2, weight, bias), 3)
    check_rank(op, "input1", input1, least)
    check_rank(op, "input2", input2, least)
    lead = broadcast(input1.shape[:-2], input2.shape[:-2])
    if lead is None:
        expected = f"leading dimensions that broadcast with those of input1 {list(input1.shape[:-2])}"
        raise ValueError(f"{op}: input2: expected {expected}, got {list(input2.shape[:-2])}")
    axes: list[tuple[str, int | None]] = [("O", None)]
    for name, x, one in (("I1", input1, one1), ("I2", input2, one2)):
        axes.append((f"{name} + 1", x.shape[-1] + 1) if one else (name, x.shape[-1]))
    check_shape(op, "weight", weight, axes)
    if bias is not None and bias.dim() > 0:
        if bias.dim() > 1 or (bias.shape[0] != 1 and bias.shape[0] != weight.shape[0]):
            expected = f"shape [O={weight.shape[0]}], [1] or []"
            raise ValueError(f"{op}: bias: expected {expected}, got {list(bias.shape)}")
    return lead


def fits(input1: Any, input2: Any, weight: Any, bias: Any, ones: Any) -> bool:
    """Whether the arguments of a call are right, [B, L1, I1], [B, L2, I2] and [O]: a fast path of checks."""
    try:
        one1, one2 = ones
        samples, length1, width1 = input1.shape
        length2, width2 = input2.shape[1:]
        out = weight.shape[0]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    if not (isinstance(one1, bool) and isinstance(one2, bool)):
        return False
    matrix = out, width1 + one1, width2 + one2
    shapes = (samples, length1, width1), (samples, length2, width2), matrix, (out,)
    return all_fit(input1.dtype, (input1, input2, weight, bias), shapes)


def _check_direct(backend, input1, input2, weight, bias, one1, one2, channels_first):
    check_arguments(input1, input2, weight, bias, one1, one2, 3)
    check_shape("biaffine", "input1", input1, {"B": None, "L1": None, "I1": None})
    check_shape("biaffine", "input2", input2, {"B": input1.shape[0], "L2": None, "I2": None})
    check_shape("biaffine", "bias", bias, {"O": weight.shape[0]})


@traceable(
    "differentiable_biaffine",
    "(str backend, Tensor input1, Tensor input2, Tensor weight, Tensor? bias, bool one1, bool one2,"
    " bool channels_first) -> Tensor",
    _check_direct,
)
def biaffine(
    backend: str,
    input1: Tensor,  # [B, L1, I1]
    input2: Tensor,  # [B, L2, I2]
    weight: Tensor,  # [O, I1 (+ 1), I2 (+ 1)]
    bias: Maybe,  # [O]
    one1: bool,
    one2: bool,
    channels_first: bool,
) -> Tensor:
    """y [B, L1, L2, O] or [B, O, L1, L2], contiguous. The caller has checked the arguments."""
    arguments = input1, input2, weight, bias
    by_first = generates_first(backend, *arguments[:3], one2, channels_first)
    if not (by_first and one2) and is_one_node(backend, *arguments):
        return _run(by_first, one1, one2, channels_first, *arguments)
    single = weight.shape[0] == 1
    if by_first if single else channels_first:
        y = _of_first(backend, *arguments, (one1, one2))
        return y if channels_first else y.squeeze(1).unsqueeze(-1)
    y = _of_second(backend, *arguments, (one1, one2))
    return y.squeeze(-1).unsqueeze(1) if channels_first else y


def generates_first(
    backend: str, input1: Tensor, input2: Tensor, weight: Tensor, one2: bool, channels_first: bool
) -> bool:
    """Whether the layers are those of the first sequence. A single output is in both orders at once."""
    if weight.shape[0] != 1:
        return channels_first and backend != linear.BACKEND
    length1, length2 = input1.shape[1], input2.shape[1]
    # The rows of a contiguous W are read in place. But a one of input2 would be a pass of its own.
    if not (type(length1) is int and type(length2) is int):  # comparing symbolic sizes would add a guard
        return not one2
    width1, width2 = input1.shape[2], input2.shape[2]
    first, second = length1 * width2 * (width1 + length2), length2 * width1 * (width2 + length1)
    return 2 * first < second if one2 else first <= 2 * second


def _affine(backend: str, x: Tensor, matrix: Tensor, bias: Maybe, one: bool) -> Tensor:
    """[x | 1] M^T + bias of x [(G,) R, I] and M [(G,) N, I + 1], or without the 1 of M [(G,) N, I]."""
    if not one:
        return shared.linear(backend, x, matrix, bias)
    weight, offset = matrix.split((x.shape[-1], 1), -1)
    offset = offset.squeeze(-1)
    return shared.linear(backend, x, weight, offset if bias is None else offset + bias)


def _layers(backend: str, x: Tensor, weight: Tensor, bias: Maybe, one_applied: bool, one: bool) -> Tensor:
    """P [B, L, O, I] of x [B, L, J] and W [O, I, J (+ 1)]; bias is in the last column if that is a one."""
    out, columns, depth = weight.shape
    offset = None
    if bias is not None and one_applied:
        offset = torch.nn.functional.pad(bias.unsqueeze(-1), (columns - 1, 0)).flatten()
    rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    generated = _affine(backend, rows, weight.reshape(out * columns, depth), offset, one)
    return generated.view(*x.shape[:2], out, columns)


def _of_second(
    backend: str, input1: Tensor, input2: Tensor, weight: Tensor, bias: Maybe, ones: Ones
) -> Tensor:
    """y [B, L1, L2, O] by layers of the second sequence."""
    layers = _layers(backend, input2, weight, bias, *ones)
    samples, length, out, columns = layers.shape
    lanes = None
    if bias is not None and not ones[0]:
        lanes = bias.expand(samples, length, out).reshape(samples, length * out)
    y = _affine(backend, input1, layers.view(samples, length * out, columns), lanes, ones[0])
    return y.view(*input1.shape[:2], length, out)


def _of_first(
    backend: str, input1: Tensor, input2: Tensor, weight: Tensor, bias: Maybe, ones: Ones
) -> Tensor:
    """y [B, O, L1, L2] by layers of the first sequence."""
    samples, length1, width1 = input1.shape
    (length2, width2), (out, columns) = input2.shape[1:], (weight.shape[0], weight.shape[2])
    # One product for each output, which reads W in place.
    rows = input1.reshape(samples * length1, width1)
    offset = None
    if bias is not None and ones[1]:
        offset = torch.nn.functional.pad(bias.unsqueeze(-1), (columns - 1, 0))
    if out == 1:
        offset = None if offset is None else offset.squeeze(0)
        generated = _affine(backend, rows, weight.squeeze(0).mT, offset, ones[0])
    else:
        generated = _affine(backend, rows.expand(out, *rows.shape), weight.mT, offset, ones[0])
    layers = generated.view(out, samples, length1, columns).transpose(0, 1)
    layers = layers.reshape(samples, out * length1, columns)
    # What each row adds is a second term, of a feature that is 1 at each position.
    added = None
    if ones[1]:
        layers, added = layers.split((width2, 1), -1)
    elif bias is not None:
        added = bias.view(out, 1).expand(samples, out, length1).reshape(samples, out * length1, 1)
    if added is None:
        y = shared.linear(backend, layers, input2, None)
    else:
        one = added.new_ones(()).expand(samples, length2, 1)
        y = dense.forward(backend, layers, added, None, one, input2, None)
    return y.view(samples, out, length1, length2)


def is_one_node(backend: str, *tensors: Maybe) -> bool:
    """Whether a call is one of the kernels, or one node of a graph that is differentiated backwards."""
    if torch.compiler.is_compiling() or backend != linear.BACKEND or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return linear.is_plain(*tensors) and not transformed()


def _run(*arguments: Any) -> Tensor:
    return BiaffineRule.record(*arguments)[0] if recorded(arguments[4:]) else _kernel(False, *arguments)[0]


def _kernel(
    keep: bool,
    by_first: bool,
    one1: bool,
    one2: bool,
    channels_first: bool,
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Maybe,
) -> tuple[Tensor, Tensor]:
    """y [B, L1, L2, O] or [B, O, L1, L2] and, if they are to be kept, the layers.

    These are [B, L2, O, I1 (+ 1)], or, ``by_first``, [B, L1, 1, I2].
    """
    if by_first:
        input1, input2, one1, one2, weight = input2, input1, one2, one1, weight.mT
    out, columns, depth = weight.shape
    if out != 1:
        weight = weight.reshape(out * columns, depth).view(out, columns, depth)
    offset = lanes = None
    if one2:
        weight, offset = weight[..., :-1], weight[..., -1]
    if bias is not None and one1:
        padded = torch.nn.functional.pad(bias.unsqueeze(-1), (columns - 1, 0))
        offset = padded if offset is None else offset + padded
    elif bias is not None:
        lanes = bias.repeat((input1 if by_first else input2).shape[1])
    return linear.BIAFFINE(input1, input2, weight, offset, lanes, channels_first, by_first, keep)


def _affine_grads(
    backend: str, want: tuple[bool, bool], grad: Tensor, x: Tensor, matrix: Tensor, one: bool
) -> tuple[Maybe, Maybe]:
    """(dx, dM) of `_affine`, each None where it is not wanted. Differentiable."""
    weight = matrix[..., :-1] if one else matrix
    return linear.linear_grads(backend, (*want, False), grad, x, weight, one)[:2]


class BiaffineRule(Rule):
    """`biaffine` of plain tensors in calls that nothing transforms: without jvp and vmap."""

    @staticmethod
    def forward(*arguments):
        return _kernel(True, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.by_first, *ctx.ones, ctx.channels_first, input1, input2, weight, bias = inputs
        layers = output[1]
        ctx.mark_non_differentiable(layers)
        ctx.save_for_backward(input1, input2, weight, bias, layers)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 8
        input1, input2, weight, bias, layers = ctx.saved_tensors
        need = wanted(ctx, layers.numel() * max(input1.shape[1], *weight.shape[1:]))[4:]
        if ctx.channels_first:
            grad = grad.permute(0, 2, 3, 1)  # copied below, where there are several outputs
        if ctx.by_first:
            results = _grads_by_first(ctx.ones[0], need, grad, input1, input2, weight, layers)
        else:
            results = _grads(tuple(ctx.ones), need, grad, input1, input2, weight, bias, layers)
        return None, None, None, None, *results


def _grads(
    ones: Ones,
    need: Sequence[bool],
    grad: Tensor,  # [B, L1, L2, O]
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Maybe,
    layers: Tensor,  # [B, L2, O, I1 (+ 1)]
) -> tuple[Maybe, ...]:
    """The gradients of input1, input2, W and c. Differentiable."""
    samples, length1, length2, out = grad.shape
    columns, depth = weight.shape[1:]
    if torch.is_grad_enabled():  # a constant would end the second derivatives
        layers = _layers(linear.BACKEND, input2, weight, bias, *ones)
    of_layers = need[1] or need[2] or (need[3] and ones[0])
    flat = grad.reshape(samples, length1, length2 * out)
    matrices = layers.view(samples, length2 * out, columns)
    d1, dp = _affine_grads(linear.BACKEND, (need[0], of_layers), flat, input1, matrices, ones[0])
    d2 = dw = dbias = None
    if dp is not None:
        rows, matrix = (
            input2.reshape(samples * length2, input2.shape[2]),
            weight.reshape(out * columns, depth),
        )
        of_rows = dp.view(samples * length2, out * columns)
        d2, dw = _affine_grads(linear.BACKEND, (need[1], need[2]), of_rows, rows, matrix, ones[1])
        d2 = None if d2 is None else d2.view(input2.shape)
        dw = None if dw is None else dw.view(weight.shape)
    if need[3]:
        terms = dp.view(*layers.shape)[..., -1] if dp is not None and ones[0] else grad
        dbias = terms.sum(tuple(range(terms.dim() - 1)))
    return d1, d2, dw, dbias


def _grads_by_first(
    one1: bool,
    need: Sequence[bool],
    grad: Tensor,  # [B, L1, L2, 1]
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    layers: Tensor,  # [B, L1, 1, I2]
) -> tuple[Maybe, ...]:
    """The same of one output by layers of the first sequence, the rows of their product with input2."""
    matrix, flat = weight.squeeze(0).mT, grad.squeeze(-1)
    if torch.is_grad_enabled():
        layers = _layers(linear.BACKEND, input1, matrix.unsqueeze(0), None, False, one1)
    dp, d2 = _affine_grads(
        linear.BACKEND, (need[0] or need[2], need[1]), flat, layers.squeeze(2), input2, False
    )
    d1 = dw = None
    if dp is not None:
        rows, of_rows = (t.reshape(t.shape[0] * t.shape[1], t.shape[2]) for t in (input1, dp))
        d1, dw = _affine_grads(linear.BACKEND, (need[0], need[2]), of_rows, rows, matrix, one1)
        d1 = None if d1 is None else d1.view(input1.shape)
        dw = None if dw is None else dw.mT.unsqueeze(0)
    return d1, d2, dw, grad.sum((0, 1, 2)) if need[3] else None


def sizes(input1: Tensor, input2: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Of layers of the second sequence: their elements, operations to make and to apply them."""
    out, columns, depth = weight.shape
    layers = math.prod(input2.shape[:2]) * out * columns
    return layers, 2 * layers * depth, 2 * layers * input1.shape[1]
