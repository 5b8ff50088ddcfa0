"""Plans of the gated forms for :func:`mi_kernels.explain`."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .. import backend as backends
from .. import counts
from ..backend import GateCall
from ..interaction import plan as dense
from ..plan import Plan
from ..rules import gradients_wanted

Maybe = Tensor | None

_WHY = {
    "elementwise": "PyTorch's own operations, one after the other",
    "gate in the epilogue": "gate and shift are computed tile by tile; activation, product and shift are"
    " applied while the tile is in cache",
    "rows after the tiles": "softmax needs whole rows: gate and shift are computed by tiles and stored",
    "per context": "contexts are shared: gate and shift are computed once per context, then x is modulated",
    "kept gate": "the gate before its activation was saved; gradients of modulation and of the dense"
    " interaction follow",
}


def diagonal(
    backend: str,
    activation: str,
    lead: torch.Size,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Maybe,
    shift_weight: Maybe,
    shift_bias: Maybe,
    weight_x: Maybe,
) -> Plan:
    """The plan of checked arguments on ``backend``."""
    planner = backends.get(backend).planner
    rows, width, context = math.prod(lead), x.shape[-1], z.shape[-1]
    shared = weight_x is None and z.shape[:-1] != lead
    contexts = math.prod(z.shape[:-1]) if shared else rows
    weights = (weight, bias, shift_weight, shift_bias, weight_x)
    parameters = sum(t.numel() for t in weights if t is not None)
    has_shift, has_x = shift_weight is not None, weight_x is not None
    count = counts.gate(rows, contexts, context, width, has_shift, has_x, parameters, x.element_size())
    algorithm = "per context" if shared else planner.gate_algorithm(activation)
    backward: tuple[Plan, ...] = ()
    if any(gradients_wanted((x, z, *weights))):
        backward = _diagonal_backward(backend, rows, x, z, weights)
    scratch = None
    if not shared:
        terms = (False, True, has_x, has_shift or shift_bias is not None, has_shift)
        scratch = planner.gate_scratch(GateCall(rows, context, x, terms, activation))
    return replace(_plan("diagonal", backend, algorithm, count, scratch), backward=backward)


def _diagonal_backward(
    backend: str, rows: int, x: Tensor, z: Tensor, weights: tuple[Maybe, ...]
) -> tuple[Plan, ...]:
    """The steps of GateRule without W; dz = U dp + C g is one product of two terms."""
    weight, bias, shift_weight, _, weight_x = weights
    steps = [_gate_grads(backend, rows * x.shape[-1], x)]
    if weight is not None and shift_weight is not None and gradients_wanted((z,))[0]:
        like = x.detach().new_empty((1, 1)).expand(rows, x.shape[-1])
        matrices = (None, shift_weight.detach().mT, weight.detach().mT, None)
        steps.append(replace(dense.plan(backend, like, like, matrices), op="input_grads"))
        z = z.detach()
    if weight_x is None:
        x = x.detach()
    return (*steps, *dense.plan(backend, x, z, (None, weight, weight_x, bias)).backward)


def gated(backend: str, activation: str, lead: torch.Size, x: Tensor, z: Tensor, *weights: Maybe) -> Plan:
    """The plan of checked arguments on ``backend``."""
    planner = backends.get(backend).planner
    product = dense.plan(backend, x, z, weights)
    rows = math.prod(lead)
    elements, algorithm = rows * x.shape[-1], planner.gate_algorithm(activation)
    terms = (*(t is not None for t in weights[:3]), False, False)
    scratch = planner.gate_scratch(GateCall(rows, z.shape[-1], x, terms, activation, weights[0]))
    forward = replace(
        product,
        op="gated_interaction",
        algorithm=f"{product.algorithm}, {algorithm}",
        operations=product.operations + elements,
        scratch=product.scratch if scratch is None else scratch,
        why=f"{product.why}; {_WHY[algorithm]}",
    )
    if not product.backward:
        return forward
    return replace(forward, backward=(_gate_grads(backend, elements, x), *product.backward))


def _gate_grads(backend: str, elements: int, x: Tensor) -> Plan:
    count = counts.modulate_grads((elements, elements, 0), x.element_size())
    return _plan("gate_grads", backend, "kept gate", count, None)


def _plan(op: str, backend: str, algorithm: str, count: counts.Count, scratch: int | None) -> Plan:
    return Plan(op, backend, algorithm, count.operations, count.bytes, scratch, _WHY[algorithm])
