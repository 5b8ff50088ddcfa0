"""One call of the dense interaction: chooses the plan for its leading dimensions and runs it."""

import math
from collections.abc import Sequence

from torch import Tensor

from mi_kernels.ops.checks import broadcast
from mi_kernels.ops.interaction import autograd, cost_model, segments, shared
from mi_kernels.ops.interaction.arguments import INTERACTION, check_arguments
from mi_kernels.ops.library import traceable
from mi_kernels.ops.rules import Maybe


def _check(backend, x, z, weight, weight_z, weight_x, bias, segment_ids, packed_weight, force):
    check_arguments(INTERACTION, x, z, weight, weight_z, weight_x, bias, segment_ids=segment_ids)
    if force not in (None, cost_model.FUSED, cost_model.PER_Z, cost_model.PER_X):
        expected = f"None, {cost_model.FUSED}, {cost_model.PER_Z} or {cost_model.PER_X}"
        raise ValueError(f"interaction: force: expected {expected}, got {force!r}")


@traceable(
    "differentiable_interaction",
    "(str backend, Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x,"
    " Tensor? bias, Tensor? segment_ids, Tensor? packed_weight, str? force) -> Tensor",
    _check,
)
def interaction(
    backend: str,
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
    segment_ids: Maybe,
    packed_weight: Maybe,  # W packed by packed_weight.py
    force: str | None,  # a plan of cost_model.py by name, for tests and benchmarks; else the cheapest one
) -> Tensor:
    """y [..., O], differentiable. The caller has checked the arguments."""
    weights = weight, weight_z, weight_x, bias
    if segment_ids is not None:
        return segments.interaction(backend, segment_ids, x, z, *weights, force=force)
    lead = broadcast(x.shape[:-1], z.shape[:-1])
    assert lead is not None, "checked by the caller"
    # Fast path. Not len(x), which would specialise a symbolic size.
    alike = len(lead) == 1 and x.dim() == z.dim() == 2 and x.shape[0] == z.shape[0]
    sharing = None if alike else shared.sharing_costs(backend, lead, x, z, weights)
    if sharing is not None:
        layout, found = sharing
        how = force or cost_model.cheapest(found).plan
        if how != cost_model.FUSED:
            return shared.interaction(backend, how, layout, x, z, *weights)
    y = autograd.forward(backend, flatten_rows(x, lead), flatten_rows(z, lead), *weights, packed_weight)
    return y if len(lead) == 1 else y.view(*lead, y.shape[-1])


def flatten_rows(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """A tensor [..., F] as the rows [B, F] of a call whose leading dimensions are ``lead``."""
    if len(lead) == 1 and tensor.shape[0] == lead[0] and tensor.dim() == 2:
        return tensor
    return tensor.expand(*lead, tensor.shape[-1]).reshape(math.prod(lead), tensor.shape[-1])
