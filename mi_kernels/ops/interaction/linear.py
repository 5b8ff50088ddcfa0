"""Small eager products without W, y = V x + c, and what is made of them: generated layers and generation.

Each view outside of a Function is a node of the backward pass, and each operation a call of the dispatcher;
on the CPU these take longer than the products of a few rows. So the compiled kernels have operations that
take tensors as they are (`cpu_linear`, `cpu_linear_add`, `cpu_linear_grads`), and the rules here have their
views inside. No derivative is new: what is differentiated again is calls of the primitives of autograd.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_tensors
from ..library import LIBRARY, NAMESPACE
from ..rules import Maybe, Rule, add, differentiating, recorded, wanted, without_features
from . import autograd as dense
from . import memory_order

BACKEND = "cpu"  # whose kernels take a call as it is
_PLAIN = Tensor, torch.nn.Parameter  # no subclass, with rules of its own for the registered operations


def _define(op: str, arguments: str, results: str, fake: Callable[..., Any]) -> Any:
    """An operation of the compiled CPU library alone."""
    names = [argument.split()[1] for argument in arguments.split(", ") if argument.startswith("Tensor")]
    required = arguments.count("Tensor ")

    def refuse(*given: Any) -> None:
        check_tensors(op, names, given[: len(names)], required)
        raise ValueError(f"{op}: {names[0]}: expected a tensor on the CPU, and its compiled library")

    def checked(*given: Any) -> Any:
        check_tensors(op, names, given[: len(names)], required)
        return fake(*given)

    LIBRARY.define(f"{op}({arguments}) -> {results}")
    LIBRARY.impl(op, refuse, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{op}", checked, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), op).default


def _linear_fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[-2]))


def _grads_fake(grad, x, weight, want_x, want_weight, want_bias, one=False):
    groups = x.shape[:1] if (x if weight is None else weight).dim() == 3 else ()
    out = grad.shape[-1]
    return (
        x.new_empty(x.shape if want_x else (0,)),
        x.new_empty((*groups, out, x.shape[-1] + 1 if one else x.shape[-1]) if want_weight else (0,)),
        x.new_empty((*groups, out) if want_bias else (0,)),
    )


def _biaffine_fake(input1, input2, weight, offset, bias, channels_first, layers_as_rows, keep):
    out, columns, _ = weight.shape
    samples, pairs = input1.shape[0], (input1.shape[1], input2.shape[1])
    pairs = pairs[::-1] if layers_as_rows else pairs
    y = input1.new_empty((samples, out, *pairs) if channels_first else (samples, *pairs, out))
    return y, input1.new_empty((*input2.shape[:2], out, columns) if keep else (0,))


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
LINEAR = _define("cpu_linear", "Tensor x, Tensor weight, Tensor? bias", "Tensor", _linear_fake)
GRADS = _define(
    "cpu_linear_grads",
    "Tensor grad, Tensor x, Tensor? weight, bool want_x, bool want_weight, bool want_bias, bool one=False",
    "(Tensor, Tensor, Tensor)",
    _grads_fake,
)
ADD = _define(  # low_rank_weights.py
    "cpu_linear_add",
    "Tensor x, Tensor weight, Tensor addend",
    "Tensor",
    lambda x, weight, addend: addend.new_empty(addend.shape),
)
BIAFFINE = _define(  # biaffine.py
    "cpu_biaffine",
    "Tensor input1, Tensor input2, Tensor weight, Tensor? offset, Tensor? bias, bool channels_first,"
    " bool layers_as_rows, bool keep",
    "(Tensor, Tensor)",
    _biaffine_fake,
)


def is_plain(*tensors: Maybe) -> bool:
    """Whether no type of the tensors has rules of its own, nor is one wrapped by a transform."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or _is_wrapped(tensor)):
            return False
    return True


def is_direct(backend: str, *tensors: Maybe) -> bool:
    """Whether a call may go to the kernels: nothing traces, differentiates or watches it."""
    if torch.compiler.is_compiling() or backend != BACKEND or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return is_plain(*tensors) and not differentiating(tensors)


def _missing_dim(x: Tensor, grouped: bool) -> int | None:
    """The dimension of rows that x lacks: [X] has a single one, and so has each of the groups [G, X]."""
    rows = 1 if grouped else 0
    return rows if x.dim() == rows + 1 else None


def linear(backend: str, x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """y of x [X], [B, X] and V [O, X], of x [G, X], [G, B, X] and V [G, O, X]. Differentiable."""
    if is_direct(backend, x, weight, bias):
        return LINEAR(x, weight, bias)
    dim = _missing_dim(x, weight.dim() == 3)
    rows = x if dim is None else x.unsqueeze(dim)
    y = dense.forward(backend, rows, without_features(rows), None, None, weight, bias)
    return y if dim is None else y.squeeze(dim)


def linear_grads(
    backend: str, want: tuple[bool, bool, bool], grad: Tensor, x: Tensor, weight: Maybe, one: bool = False
) -> tuple[Maybe, Maybe, Maybe]:
    """(dx, dV, dc), each None where it is not wanted. Differentiable. V is for dx and the order of dV.

    ``one``: x has one more feature, which is 1, and dV is [..., X + 1]; dc is not wanted then.
    """
    if not any(want):
        return None, None, None
    if is_direct(backend, grad, x, weight) and (one or not (want[1] and memory_order.is_n_major(weight))):
        dx, dv, dc = GRADS(grad, x, weight, *want, one)
        return dx if want[0] else None, dv if want[1] else None, dc if want[2] else None
    dim = _missing_dim(x, (x if weight is None else weight).dim() == 3)
    if dim is not None:
        grad, x = grad.unsqueeze(dim), x.unsqueeze(dim)
    z, want_weights = without_features(x), (False, False, want[1], want[1] if one else want[2])
    dx, _ = dense.input_grads(backend, (want[0], False), grad, x, z, None, None, weight)
    _, _, dv, dc = dense.weight_grads(backend, want_weights, grad, x, z, (None, None, weight))
    if one and dv is not None and dc is not None:
        dv, dc = torch.cat((dv, dc.unsqueeze(-1)), -1), None
    return dx if dx is None or dim is None else dx.squeeze(dim), dv, dc


class ApplyGeneratedRule(Rule):
    """`linear` of plain tensors in calls that nothing transforms: without jvp and vmap."""

    @staticmethod
    def forward(x, weight, bias):
        if torch._C._len_torch_dispatch_stack() > 0:  # as a mode would see it elsewhere
            return linear(BACKEND, x, weight, bias)
        return LINEAR(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        return linear_grads(BACKEND, wanted(ctx, grad.numel() * x.shape[-1]), grad, x, weight)


def apply_generated(x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """`linear` of plain tensors as one node, where nothing transforms the call."""
    if recorded((x, weight, bias)):
        return ApplyGeneratedRule.record(x, weight, bias)
    return linear(BACKEND, x, weight, bias)


def generate(
    backend: str, z: Tensor, weight: Tensor, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> tuple[Tensor, Maybe]:
    """W' [(B,) O, X] and b' [(B,) O] of z [(B,) Z] as one node, where nothing transforms the call.

    W is contiguous.
    """
    arguments = backend, z, weight, weight_z, weight_x, bias
    return (GenerateRule.record if recorded(arguments[1:]) else GenerateRule.forward)(*arguments)


class GenerateRule(Rule):
    """As shared.generate; without jvp and vmap."""

    @staticmethod
    def forward(backend, z, weight, weight_z, weight_x, bias):
        contexts = z if z.dim() == 2 else z.unsqueeze(0)
        rows = contexts.expand(weight.shape[0], *contexts.shape)
        # Not views, which could not be changed in place.
        generated = linear(backend, rows, weight.mT, weight_x).transpose_(0, 1)
        generated = generated if z.dim() == 2 else generated.squeeze_(0)
        return generated, None if weight_z is None else linear(backend, z, weight_z, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, z, weight, weight_z, *_ = inputs
        _, of_z, of_weight, of_weight_z, of_weight_x, of_bias = ctx.needs_input_grad
        generated, offset = output
        if not (of_z or of_weight or of_weight_x):
            ctx.mark_non_differentiable(generated)
        elif offset is not None and not (of_z or of_weight_z or of_bias):
            ctx.mark_non_differentiable(offset)
        ctx.save_for_backward(z, weight, weight_z)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, grad_offset):
        z, weight, weight_z = ctx.saved_tensors
        contexts = z if z.dim() == 2 else z.unsqueeze(0)
        backend, need = ctx.backend, wanted(ctx, weight.numel() * contexts.shape[0])[1:]
        dz = dw = of_offset = du = dv = dc = None
        if grad is not None:
            grad = (grad if z.dim() == 2 else grad.unsqueeze(0)).transpose(0, 1)  # [O, B, X]
            rows = contexts.expand(weight.shape[0], *contexts.shape)
            if need[0]:
                dz = linear(backend, grad, weight, None).sum(0)
                dz = dz if z.dim() == 2 else dz.squeeze(0)
            if need[1]:
                _, dw, _ = linear_grads(backend, (False, True, False), rows, grad, None)
            if need[3]:
                _, _, dv = linear_grads(backend, (False, False, True), grad, rows, None)
        if grad_offset is not None:
            of_offset, du, dc = linear_grads(backend, (need[0], need[2], need[4]), grad_offset, z, weight_z)
        return None, add(dz, of_offset), dw, du, dv, dc
