"""What a call of a gate or a modulation will do, as :func:`mi_kernels.explain` tells it."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from mi_kernels.ops.interaction import plan as dense
from mi_kernels.ops.interaction.plan import Plan, answer
from mi_kernels.ops.interaction.shared import gradients_wanted
from mi_kernels.testing import counts

Maybe = Tensor | None

_FUSED = ("cpu", "triton", "cuda")  # backends with kernels of these operations
_WHY = {
    "one pass": "x is read once and y written once; the activation is taken of scale as it lies, once for all"
    " rows that share it",
    "one pass, sums": "x and g are read once: dx is written, the sums of dscale and dshift are taken on the"
    " way",
    "elementwise": "PyTorch's own operations, one after the other",
    "gate in the epilogue": "gate and shift are made tile by tile; activation, product and shift follow while"
    " the tile is in cache",
    "rows after the tiles": "softmax needs whole rows: gate and shift are made by tiles and wait in memory",
    "per context": "the context is shared: gate and shift are made once for each, then x is modulated",
    "kept gate": "what the activation was taken of was kept; gradients of modulation and of the dense"
    " interaction follow",
}


def modulate(backend: str, shape: torch.Size, x: Tensor, scale: Tensor, shift: Maybe) -> Plan:
    """The plan of checked arguments on ``backend``."""
    elements, item = math.prod(shape), x.element_size()
    sizes = (elements, scale.numel(), 0 if shift is None else shift.numel())
    count = counts.modulate(sizes, item)
    wanted = gradients_wanted((x, scale, shift))
    backward: tuple[Plan, ...] = ()
    native = backend in _FUSED
    if any(wanted):
        back = counts.modulate_grads(sizes, item)
        algorithm = "one pass, sums" if native else "elementwise"
        step = _plan("modulate_grads", backend, algorithm, back, None)
        backward = (step,)
    return replace(
        _plan("modulate", backend, "one pass" if native else "elementwise", count, 0 if native else None),
        backward=backward,
    )


def diagonal(
    backend: str,
    activation: str,
    lead: torch.Size,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Maybe,
    c: Maybe,
    d: Maybe,
    g: Maybe,
) -> Plan:
    """The plan of checked arguments on ``backend``."""
    rows, width, context = math.prod(lead), x.shape[-1], z.shape[-1]
    shared = g is None and z.shape[:-1] != lead
    contexts = math.prod(z.shape[:-1]) if shared else rows
    parameters = sum(t.numel() for t in (weight, bias, c, d, g) if t is not None)
    count = counts.diagonal(
        rows, contexts, context, width, c is not None, g is not None, parameters, x.element_size()
    )
    algorithm = "per context" if shared else _algorithm(backend, activation)
    backward: tuple[Plan, ...] = ()
    if any(gradients_wanted((x, z, weight, bias, c, d, g))):
        gate = dense.plan(backend, x, z, (None, weight, g, bias))
        grads = counts.modulate_grads((rows * width, rows * width, 0), x.element_size())
        backward = (_plan("gate_grads", backend, "kept gate", grads, None), *gate.backward)
    scratch = None
    if backend in _FUSED and not shared:
        terms = (False, True, g is not None, c is not None or d is not None, c is not None)
        scratch = _gate_scratch(backend, rows, context, x, terms, activation)
    return replace(_plan("diagonal", backend, algorithm, count, scratch), backward=backward)


def gated(backend: str, activation: str, lead: torch.Size, x: Tensor, z: Tensor, *weights: Maybe) -> Plan:
    """The plan of checked arguments on ``backend``."""
    product = dense.plan(backend, x, z, weights)
    elements = math.prod(lead) * x.shape[-1]
    algorithm = _algorithm(backend, activation)
    forward = replace(product, op="gated_interaction", algorithm=f"{product.algorithm}, {algorithm}")
    why = f"{product.why}; {_WHY[algorithm]}"
    forward = replace(forward, operations=product.operations + elements, why=why)
    if backend in _FUSED:
        terms = (*(t is not None for t in weights[:3]), False, False)
        scratch = _gate_scratch(backend, math.prod(lead), z.shape[-1], x, terms, activation)
        forward = replace(forward, scratch=scratch)
    if not product.backward:
        return forward
    grads = counts.modulate_grads((elements, elements, 0), x.element_size())
    return replace(
        forward, backward=(_plan("gate_grads", backend, "kept gate", grads, None), *product.backward)
    )


def _algorithm(backend: str, activation: str) -> str:
    if backend in ("triton", "cuda") and activation == "softmax":
        return "rows after the tiles"
    return "gate in the epilogue" if backend in _FUSED else "elementwise"


def _gate_scratch(
    backend: str, rows: int, context: int, x: Tensor, terms: tuple[bool, ...], activation: str
) -> int:
    """Bytes that the forward pass of a gate takes; terms are W, U, V, a shift, and C in it."""
    width = x.shape[-1]
    if backend == "triton":
        return _triton_gate_scratch(rows, context, x, terms, activation)
    bits = sum(bit << place for place, bit in enumerate(terms))
    sizes, softmax = [rows, context, width], activation == "softmax"
    if backend == "cuda":
        return answer(dense.cuda("cuda_gate_plan")(sizes, x.dtype, bits, softmax, *dense.gpu(x.device)))[1]
    return answer(torch.ops.mi_kernels.cpu_gate_plan(sizes, x.dtype, bits, softmax))[1]


def _triton_gate_scratch(
    rows: int, context: int, like: Tensor, terms: tuple[bool, ...], activation: str
) -> int:
    from mi_kernels.ops.triton.plan import record, without_data  # needs the package triton
    from mi_kernels.ops.triton.products import Gate, gated

    width = like.shape[-1]
    x, z = without_data((rows, width), (rows, context), dtype=like.dtype)
    sizes = ((width, context, width), (width, context), (width, width), (width,), (width, context))
    has_w, has_u, has_v, has_shift, has_c = terms
    there = (has_w, has_u, has_v, has_shift, has_c)
    w, u, v, d, c = without_data(
        *(s if t else None for s, t in zip(sizes, there, strict=True)), dtype=like.dtype
    )
    assert x is not None
    return record(gated, (Gate(activation, 0.0, x, c, d, False), z, w, u, v, None), like.device)[1]


def _plan(op: str, backend: str, algorithm: str, count: counts.Count, scratch: int | None) -> Plan:
    return Plan(op, backend, algorithm, count.operations, count.bytes, scratch, _WHY[algorithm])
