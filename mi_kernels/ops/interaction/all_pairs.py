"""The dense interaction of all pairs of inputs and contexts: a call of the biaffine form (biaffine.py).

Where x and z have leading dimensions that the other one lacks, y is in the order of one of the two sharing
plans; the other one's result is permuted. The kernel of the biaffine form writes y where it belongs, in one
node.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..checks import all_fit, broadcast
from ..rules import Maybe, gradients_wanted
from . import biaffine, cost_model, shared

# Operations that the plan in the order of y may have for one of the cheapest plan, in tenths. One thread, 10
# to 500 positions, time of the plans by this form's: 1.2 to 3.0 with as many operations, 0.8 to 1.1 with 1.4
# times as many.
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
    if not layout.of_x or not layout.of_z:
        return None
    if is_sorted((*layout.common, *layout.of_z, *layout.of_x)):
        plan, operands = cost_model.PER_X, (layout.contexts(z, 1), layout.rows(x), weight)
    elif is_sorted((*layout.common, *layout.of_x, *layout.of_z)):
        plan, operands = cost_model.PER_Z, (layout.rows(x), layout.contexts(z, 1), weight.mT)
    else:
        return None
    return Pairs(plan, *operands, lead) if is_served(plan, costs, weight.shape[0]) else None


def is_served(plan: str, costs: tuple[cost_model.Cost, ...], out: int) -> bool:
    """Whether the plan that is in the order of y is among the cheapest; a single output is in both orders."""
    found = cost_model.cheapest(costs)
    if found.plan == cost_model.FUSED:
        return False
    return any(
        10 * cost.operations <= MOST * found.operations for cost in costs[1:] if cost.plan == plan or out == 1
    )


def eager(
    backend: str | None, x: Tensor, z: Tensor, weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> Maybe:
    """The commonest of these calls without checks that word an error (eager.py), else None:

    y [B, L1, L2, O] of x [B, 1, L2, X] and z [B, L1, 1, Z], or of x [B, L1, 1, X] and z [B, 1, L2, Z].
    """
    if backend is None or weight is None or weight_z is not None or weight_x is not None:
        return None
    try:
        samples, x1, x2, width = x.shape
        _, z1, z2, context = z.shape
        out = weight.shape[0]
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return None
    by_x = x1 == 1
    if not (x1 == z2 == 1 or x2 == z1 == 1) or 1 in (x1 * x2, z1 * z2):
        return None
    shapes = (samples, x1, x2, width), (samples, z1, z2, context), (out, context, width), (out,)
    if not all_fit(x.dtype, (x, z, weight, bias), shapes):
        return None
    if not biaffine.is_one_node(backend, x, z, weight, bias):
        return None
    sizes = cost_model.Sizes(samples, z1 * z2, x1 * x2, context, width, out)
    wanted = cost_model.Wanted(*gradients_wanted((x, z, weight)))
    plan = cost_model.PER_X if by_x else cost_model.PER_Z
    if not is_served(plan, cost_model.all_costs(sizes, wanted, x.dtype, backend, "cpu"), out):
        return None
    if by_x:
        return biaffine.biaffine(backend, z.squeeze(2), x.squeeze(1), weight, bias, False, False, False)
    return biaffine.biaffine(backend, x.squeeze(2), z.squeeze(1), weight.mT, bias, False, False, False)


def is_sorted(dims: tuple[int, ...]) -> bool:
    return all(one < other for one, other in zip(dims, dims[1:], strict=False))


def interaction(backend: str, x: Tensor, z: Tensor, weights: Sequence[Maybe]) -> Maybe:
    """y [..., O] of x [..., X] and z [..., Z] whose leading dimensions broadcast, or None."""
    found = pairs(backend, x, z, weights)
    if found is None:
        return None
    y = biaffine.biaffine(backend, *found[1:4], weights[3], False, False, False)
    return y.view(*found.lead, y.shape[-1])
