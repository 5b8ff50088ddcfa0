"""One call of the dense interaction: the plan for its leading dimensions, and what it comes to."""

import math
from collections.abc import Sequence

from torch import Tensor

from mi_kernels.ops.interaction import autograd, costs, ragged, shared
from mi_kernels.ops.interaction.arguments import INTERACTION, check
from mi_kernels.ops.library import traceable
from mi_kernels.ops.rules import Maybe
from mi_kernels.validation import broadcast


def _check(backend, x, z, weight, weight_z, weight_x, bias, segment_ids, words, force):
    check(INTERACTION, x, z, weight, weight_z, weight_x, bias, segment_ids=segment_ids)
    if force not in (None, costs.FUSED, costs.PER_Z, costs.PER_X):
        expected = f"None, {costs.FUSED}, {costs.PER_Z} or {costs.PER_X}"
        raise ValueError(f"interaction: force: expected {expected}, got {force!r}")


@traceable(
    "differentiable_interaction",
    "(str backend, Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x,"
    " Tensor? bias, Tensor? segment_ids, Tensor? words, str? force) -> Tensor",
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
    words: Maybe,  # W as packed.py lays it out
    force: str | None,  # a plan of costs.py by name, for tests and benchmarks; else the cheapest one
) -> Tensor:
    """y [..., O], differentiable. The arguments were checked by the caller."""
    weights = weight, weight_z, weight_x, bias
    if segment_ids is not None:
        return ragged.interaction(backend, segment_ids, x, z, *weights, force=force)
    lead = broadcast(x.shape[:-1], z.shape[:-1])
    assert lead is not None, "checked by the caller"
    # Sooner told than by whole shapes. Not len() of x: it would make a symbolic size a number.
    alike = len(lead) == 1 and x.dim() == z.dim() == 2 and x.shape[0] == z.shape[0]
    sharing = None if alike else shared.compare(backend, lead, x, z, weights)
    if sharing is not None:
        places, found = sharing
        how = force or costs.cheapest(found).plan
        if how != costs.FUSED:
            return shared.interaction(backend, how, places, x, z, *weights)
    y = autograd.forward(backend, rows_of(x, lead), rows_of(z, lead), *weights, words)
    return y if len(lead) == 1 else y.view(*lead, y.shape[-1])


def rows_of(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """A tensor [..., F] as the rows [B, F] of a call whose leading dimensions are ``lead``."""
    if len(lead) == 1 and tensor.shape[0] == lead[0] and tensor.dim() == 2:
        return tensor
    return tensor.expand(*lead, tensor.shape[-1]).reshape(math.prod(lead), tensor.shape[-1])
