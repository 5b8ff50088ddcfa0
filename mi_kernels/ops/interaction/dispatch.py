"""One call of the dense interaction: chooses the plan for its leading dimensions and runs it."""

from torch import Tensor

from ..library import traceable
from ..rules import Maybe
from . import all_pairs, batched, cost_model, segments, shared
from .arguments import INTERACTION, check_arguments


def _check(backend, x, z, weight, weight_z, weight_x, bias, segment_ids, weight_ids, packed_weight, force):
    weights = weight, weight_z, weight_x, bias
    check_arguments(INTERACTION, x, z, *weights, segment_ids=segment_ids, weight_ids=weight_ids)
    if force not in (None, cost_model.FUSED, cost_model.PER_Z, cost_model.PER_X):
        expected = f"None, {cost_model.FUSED}, {cost_model.PER_Z} or {cost_model.PER_X}"
        raise ValueError(f"interaction: force: expected {expected}, got {force!r}")


@traceable(
    "differentiable_interaction",
    "(str backend, Tensor x, Tensor z, Tensor? weight, Tensor? weight_z, Tensor? weight_x,"
    " Tensor? bias, Tensor? segment_ids, Tensor? weight_ids, Tensor? packed_weight, str? force) -> Tensor",
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
    weight_ids: Maybe,
    packed_weight: Maybe,  # W packed by packed_weight.py
    force: str | None,  # a plan of cost_model.py by name, for tests and benchmarks; else the cheapest one
) -> Tensor:
    """y [..., O], differentiable. The caller has checked the arguments."""
    weights = weight, weight_z, weight_x, bias
    if weight_ids is None and not batched.has_leading_dimensions(weights):
        if segment_ids is not None:
            return segments.interaction(backend, segment_ids, x, z, *weights, force=force)
        y = None if force else all_pairs.interaction(backend, x, z, weights)
        if y is not None:
            return y
        return shared.by_leading_dimensions(backend, x, z, weights, packed_weight, force)
    if segment_ids is not None:
        z = segments.gather_contexts(z, segment_ids)
    if weight_ids is not None:
        return batched.by_ids(backend, weight_ids, x, z, *weights, force=force)
    return batched.interaction(backend, x, z, *weights, force=force)
