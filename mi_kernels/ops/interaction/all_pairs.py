"""The dense interaction of all pairs of inputs and contexts: a call of the biaffine form (biaffine.py).

Where x and z have leading dimensions that the other one lacks, y is in the order of one of the two sharing plans;
the other one's result is permuted. The kernel of the biaffine form writes y where it belongs, in one node.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mi_kernels.ops.checks import broadcast
from mi_kernels.ops.interaction import biaffine, cost_model, shared
from mi_kernels.ops.rules import Maybe

# Operations that the plan in the order of y may have for one of the cheapest plan, in tenths: both sequences of 50
# to 500 positions 1.2 to 3.0 times as fast with as many operations, 0.8 to 1.1 with 1.4 times as many.
MOST = 11


class Pairs(NamedTuple):
    plan: str  # that of cost_model.py, with layers of the second sequence
    input1: Tensor  # [C, L1, I1]
    input2: Tensor  # [C, L2, I2]
    weight: Tensor  # [O, I1, I2]
    lead: Sequence[int]


def pairs(backend: str, x: Tensor, z: Tensor, weights: Sequence[Maybe]) -> Pairs | None:
    """How a call is one of the biaffine form; None where it is not, or is dearer."""
    weight, weight_z, weight_x, bias = weights
    if weight is None or weight_z is not None or weight_x is not None:
        return None
    if x.shape[:-1] == z.shape[:-1] or not biaffine.is_one_node(backend, x, z, weight, bias):
        return None
    lead = broadcast(x.shape[:-1], z.shape[:-1])
    sharing = None if lead is None else shared.sharing_costs(backend, lead, x, z, weights)
    if lead is None or sharing is None:
        return None
    layout, costs = sharing
    found = cost_model.cheapest(costs)
    if found.plan == cost_model.FUSED or not layout.of_x or not layout.of_z:
        return None
    if is_sorted((*layout.common, *layout.of_z, *layout.of_x)):
        plan, operands = cost_model.PER_X, (layout.contexts(z, 1), layout.rows(x), weight)
    elif is_sorted((*layout.common, *layout.of_x, *layout.of_z)):
        plan, operands = cost_model.PER_Z, (layout.rows(x), layout.contexts(z, 1), weight.mT)
    else:
        return None
    for cost in costs:
        # A single output is in both orders at once.
        is_served = cost.plan == plan or (weight.shape[0] == 1 and cost.plan != cost_model.FUSED)
        if is_served and 10 * cost.operations <= MOST * found.operations:
            return Pairs(plan, *operands, lead)
    return None


def is_sorted(dims: tuple[int, ...]) -> bool:
    return all(one < other for one, other in zip(dims, dims[1:], strict=False))


def interaction(backend: str, x: Tensor, z: Tensor, weights: Sequence[Maybe]) -> Maybe:
    """y [..., O] of x [..., X] and z [..., Z] whose leading dimensions broadcast, or None."""
    found = pairs(backend, x, z, weights)
    if found is None:
        return None
    y = biaffine.biaffine(backend, *found[1:4], weights[3], False, False, False)
    return y.view(*found.lead, y.shape[-1])
