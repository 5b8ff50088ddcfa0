"""Plans of the interaction with two contexts for :func:`mi_kernels.explain`."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .. import backend as backends
from ..plan import Plan
from ..rules import Maybe, gradients_wanted
from . import cost_model, third_order

_EINSUM = "the formula term by term: the oracle, not meant to be fast"


def plan(
    backend: str,
    lead: torch.Size,
    x: Tensor,
    z1: Tensor,
    z2: Tensor,
    weight: Tensor,
    *others: Maybe,  # U1, U2, V and c
) -> Plan:
    """The plan of checked arguments; y has the leading dimensions ``lead``."""
    call = third_order.call_of(x, z1, z2, weight)
    costs = call.costs(x.dtype, x.device.type)
    order = cost_model.cheapest(costs).plan
    algorithm, why = order, third_order.folded(order, call)
    if backends.get(backend).is_reference:
        algorithm, why, costs = "einsum", _EINSUM, ()
    results = math.prod(lead) * weight.shape[0]
    tensors = (x, z1, z2, weight, *others)
    moved = (results + sum(t.numel() for t in tensors if t is not None)) * x.element_size()
    # Each linear term once for each row of its operand.
    linear = [
        0 if matrix is None else 2 * math.prod(operand.shape[:-1]) * matrix.numel()
        for operand, matrix in zip((z1, z2, x), others, strict=False)
    ]
    operations = call.operations(order) + sum(linear)
    want = gradients_wanted(tensors)

    def step(op: str, count: int) -> Plan:
        return Plan(op, backend, algorithm, count, moved, None, why)

    backward = []
    if any(want[:3]):
        backward.append(step("input_grads", operations))
    if any(want[3:]):
        backward.append(step("weight_grads", operations))
    forward = step("forward", operations + results * (others[3] is not None))
    return replace(forward, backward=tuple(backward), alternatives=costs)
