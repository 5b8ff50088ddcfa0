"""Plans of the dense interaction with weights of each sample, or by index."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import backend as backends
from ..plan import Plan
from ..rules import Maybe, gradients_wanted
from . import batched, cost_model, segments

_SAMPLES = "one weight for each sample: one grouped product, each weight is read once, in place"
_COMMON = "weights of all samples: as without leading dimensions"
_BIAS = "a bias of each sample is added to the result"
_MAPPED = "values that vmap maps over cannot be sorted: each row gets its own copy of its weights"


def by_segment(backend: str, what: str) -> str:
    """How rows are multiplied by what their group has."""
    if backends.get(backend).planner.ragged:
        return f"the rows of a {what} are one product, wherever they are; each {what} is read in place"
    return f"groups of similar length are one product, for which their rows and each {what} are copied"


_SHARED = {
    cost_model.PER_Z: "; W' = z W + V is generated once for each weight and context, then applied",
    cost_model.PER_X: "; W x + U is generated once for each weight and input, then applied",
}
_EINSUM = "the formula term by term: the oracle, not meant to be fast"


def plan(
    backend: str,
    lead: torch.Size,
    x: Tensor,
    z: Tensor,
    weights: Sequence[Maybe],
    segment_ids: Maybe,
    weight_ids: Maybe,
) -> Plan:
    """The plan of checked arguments; y has the leading dimensions ``lead``."""
    if segment_ids is not None:
        z = torch.empty((*lead, z.shape[-1]), dtype=z.dtype, device="meta", requires_grad=z.requires_grad)
    if weight_ids is not None:
        varying = weight_ids.shape
        chosen = [w if own else None for w, own in zip(weights, batched.of_groups(weights), strict=True)]
        choice = batched.choose(backend, varying, x, z, chosen, None)
        mapped = segments.is_mapped(weight_ids)
        whys = [(_MAPPED if mapped else by_segment(backend, "weight")) + _SHARED.get(choice.plan, "")]
        if any(w is not None and not own for w, own in zip(weights, batched.of_groups(weights), strict=True)):
            whys.append(_COMMON)
    else:
        whys, varying, choice = _per_sample(backend, x, z, weights)
    algorithm, why = choice.plan, "; and ".join(whys)
    if backends.get(backend).is_reference:
        algorithm, why, choice = "einsum", _EINSUM, choice._replace(costs=())
    rows, features = math.prod(lead), (z.shape[-1] * x.shape[-1], z.shape[-1], x.shape[-1])
    out = next(w.shape[w.dim() - r] for w, r in zip(weights, batched.RANKS, strict=True) if w is not None)
    present = [tensor for tensor in (x, z, *weights) if tensor is not None]
    moved = (sum(tensor.numel() for tensor in present) + rows * out) * x.element_size()
    contracted = [
        _operations(rows, out, sizes, lead, choice.plan, varying, x, z) * (w is not None)
        for sizes, w in zip(features, weights[:3], strict=True)
    ]
    want_x, want_z, *want = gradients_wanted((x, z, *weights))

    def step(op: str, operations: int) -> Plan:
        return Plan(op, backend, algorithm, operations, moved, None, why)

    backward = []
    if want_x or want_z:
        backward.append(step("input_grads", sum(contracted)))
    if any(want):
        backward.append(step("weight_grads", sum(c for c, w in zip(contracted, want, strict=False) if w)))
    forward = step("forward", sum(contracted) + rows * out * (weights[3] is not None))
    return replace(forward, backward=tuple(backward), alternatives=choice.costs)


def _per_sample(
    backend: str, x: Tensor, z: Tensor, weights: Sequence[Maybe]
) -> tuple[list[str], torch.Size, batched.Choice]:
    """The reasons of all products, and leading dimensions and plan of the first."""
    products, bias = batched.split(weights)
    whys, found = [], []
    for main, together in products:
        first = together[main]
        assert first is not None
        lead = batched.lead_of(first, batched.RANKS[main])
        own = batched.with_lead(together, () if math.prod(lead) == 1 else lead)
        choice = batched.choose(backend, lead, x, z, own, None)
        common = math.prod(lead) == 1
        whys.append(_COMMON if common else _SAMPLES + _SHARED.get(choice.plan, ""))
        found.append((lead, choice))
    if bias is not None:
        whys.append(_BIAS)
    lead, choice = found[0] if found else (torch.Size(), batched.Choice(cost_model.FUSED, ()))
    return whys, lead, choice


def _operations(
    rows: int, out: int, features: int, lead: torch.Size, plan: str, varying: torch.Size, x: Tensor, z: Tensor
) -> int:
    """Of one term; W' is generated for fewer rows than it is applied to."""
    if plan == cost_model.FUSED or features != z.shape[-1] * x.shape[-1]:
        return 2 * rows * out * features
    one, other = (z, x) if plan == cost_model.PER_Z else (x, z)
    contexts = math.prod(batched.leads(varying, one.shape[:-1]))
    return 2 * out * (contexts * features + rows * other.shape[-1])
