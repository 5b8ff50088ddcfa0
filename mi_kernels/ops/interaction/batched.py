"""The dense interaction with weights of each sample, or weights that each sample chooses by number.

Where x (or z) varies along leading dimensions that the weights and z (or x) do not have, W' = z W + V is generated
once for each pair of weight and context, then applied, as in shared.py. Else each row is multiplied by its own
weights: rows of one weight are a group of a grouped product, or of by_segment.py, so no weight is copied.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mi_kernels.ops.checks import broadcast
from mi_kernels.ops.interaction import autograd, cost_model, segments, shared
from mi_kernels.ops.rules import Maybe, add, gradients_wanted, without_features

RANKS = (3, 2, 2, 1)  # of W, U, V and c of one sample


def lead_of(weight: Tensor, rank: int) -> torch.Size:
    return weight.shape[: weight.dim() - rank]


def leads(*shapes: torch.Size) -> torch.Size:
    """The broadcast of leading dimensions; the caller has checked that they do."""
    lead = torch.Size()
    for shape in shapes:
        common = broadcast(lead, shape)
        assert common is not None, "checked by the caller"
        lead = common
    return lead


def has_leading_dimensions(weights: Sequence[Maybe]) -> bool:
    for weight, rank in zip(weights, RANKS, strict=True):
        if weight is not None and weight.dim() > rank:
            return True
    return False


class Choice(NamedTuple):
    """The plan of a product with W, and the costs of all plans; none where only one is possible."""

    plan: str
    costs: tuple[cost_model.Cost, ...]


def choose(
    backend: str, weight_lead: torch.Size, x: Tensor, z: Tensor, weights: Sequence[Maybe], force: str | None
) -> Choice:
    """``weight_lead``: the leading dimensions along which weights vary."""
    weight = weights[0]
    lead = leads(x.shape[:-1], z.shape[:-1], weight_lead)
    if weight is None:
        return Choice(cost_model.FUSED, ())
    wanted = cost_model.Wanted(*gradients_wanted((x, z, *weights[:3])))
    how = x.dtype, backend, x.device.type
    found = []
    for plan, one, other in ((cost_model.PER_Z, z, x), (cost_model.PER_X, x, z)):
        layout = shared.layout_of(other.shape[:-1], leads(weight_lead, one.shape[:-1]), lead)
        sizes = layout.sizes(one.shape[-1], other.shape[-1], weight.shape[-3])
        mirrored = plan == cost_model.PER_X
        if mirrored:
            sizes = sizes.mirrored()
        cost = cost_model.shared(plan, shared.known(sizes), wanted, *how)
        if not found:
            found.append(cost_model.fused(shared.known(sizes), wanted, *how))
        if cost is not None:
            found.append(cost)
    costs = tuple(found)
    return Choice(force or cost_model.cheapest(costs).plan, costs if len(costs) > 1 else ())


def interaction(backend: str, x: Tensor, z: Tensor, *weights: Maybe, force: str | None = None) -> Tensor:
    """y [..., O] of weights W [..., O, Z, X], U [..., O, Z], V [..., O, X] and c [..., O]."""
    parts = []
    while True:
        main = next((index for index in range(3) if weights[index] is not None), None)
        if main is None:
            break
        lead = lead_of(weights[main], RANKS[main])
        together, rest = [], []
        for weight, rank in zip(weights, RANKS, strict=True):
            with_main = weight is not None and broadcast(lead_of(weight, rank), lead) == lead
            together.append(weight if with_main else None)
            rest.append(None if with_main else weight)
        parts.append(_together(backend, lead, x, z, together, force))
        weights = tuple(rest)
    y, bias = add(*parts), weights[3]
    if bias is not None:
        y = bias if y is None else y + bias
    full = leads(x.shape[:-1], z.shape[:-1], y.shape[:-1])
    y = y.expand(*full, y.shape[-1])
    return y.clone() if not parts else y.contiguous()


def _together(
    backend: str, lead: torch.Size, x: Tensor, z: Tensor, weights: Sequence[Maybe], force: str | None
) -> Tensor:
    """The terms whose weights have the leading dimensions ``lead``, or fewer."""
    if math.prod(lead) == 1:
        plain = [
            None if w is None else w.reshape(w.shape[w.dim() - r :])
            for w, r in zip(weights, RANKS, strict=True)
        ]
        return shared.by_leading_dimensions(backend, x, z, plain, force=force)
    weights = [
        None if w is None else w.expand(*lead, *w.shape[w.dim() - r :])
        for w, r in zip(weights, RANKS, strict=True)
    ]
    plan = choose(backend, lead, x, z, weights, force).plan
    if plan == cost_model.PER_X:
        weight, weight_z, weight_x, bias = weights
        assert weight is not None
        x, z, weights = z, x, (weight.mT, weight_x, weight_z, bias)
    if plan != cost_model.FUSED:
        return _apply(backend, x, *_generate(backend, lead, z, *weights))
    return _rows(backend, lead, x, z, *weights)


def _apply(backend: str, x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """y [..., O] of x [..., X], W' [..., O, X] and b' [..., O]."""
    contexts = weight.shape[:-2]
    layout = shared.layout_of(x.shape[:-1], contexts, leads(x.shape[:-1], contexts))
    offset = None if bias is None else layout.contexts(bias, 1)
    return layout.result(shared.apply_generated(backend, layout.rows(x), layout.contexts(weight, 2), offset))


def _grouped(
    lead: torch.Size, full: torch.Size, weights: Sequence[Maybe]
) -> tuple[shared.Layout, list[Maybe]]:
    """The layout of rows [G, R] with dimensions ``full``, and the weights as [G, ...]."""
    layout = shared.layout_of(full, lead, full)
    grouped: list[Maybe] = []
    for weight, rank in zip(weights, RANKS, strict=True):
        grouped.append(None if weight is None else layout.contexts(weight, rank).squeeze(1))
    return layout, grouped


def _rows(backend: str, lead: torch.Size, x: Tensor, z: Tensor, *weights: Maybe) -> Tensor:
    """Each row by its own weights."""
    full = leads(x.shape[:-1], z.shape[:-1], lead)
    layout, grouped = _grouped(lead, full, weights)
    x, z = (layout.rows(t.expand(*full, t.shape[-1])) for t in (x, z))
    y = autograd.forward(backend, x, z, *grouped)
    return layout.result(y.unsqueeze(1))


def _generate(
    backend: str, lead: torch.Size, z: Tensor, weight: Maybe, weight_z: Maybe, weight_x: Maybe, bias: Maybe
) -> tuple[Tensor, Maybe]:
    """W' [..., O, X] and b' [..., O] of contexts z [..., Z], each with its own weights."""
    assert weight is not None
    full = leads(z.shape[:-1], lead)
    layout, (weight, weight_z, weight_x, bias) = _grouped(lead, full, (weight, weight_z, weight_x, bias))
    z = layout.rows(z.expand(*full, z.shape[-1]))  # [G, S, Z]
    assert weight is not None
    groups, out, context, width = weight.shape
    if _merges(weight, 1, 3):  # one product for each weight: O and X are one dimension
        matrix = weight.transpose(2, 3).reshape(groups, out * width, context)
        offset = None if weight_x is None else weight_x.reshape(groups, out * width)
        generated = shared.linear(backend, z, matrix, offset).unflatten(2, (out, width))
    else:  # one for each weight and output
        per_output = z.unsqueeze(1).expand(groups, out, *z.shape[1:]).flatten(0, 1)
        matrix = weight.transpose(2, 3).flatten(0, 1)
        offset = None if weight_x is None else weight_x.flatten(0, 1)
        generated = (
            shared.linear(backend, per_output, matrix, offset).unflatten(0, (groups, out)).transpose(1, 2)
        )
    shift = None
    if weight_z is not None:
        shift = shared.linear(backend, z, weight_z, bias)
    elif bias is not None:
        shift = bias.unsqueeze(1).expand(*z.shape[:2], out)
    return layout.restored(generated), None if shift is None else layout.restored(shift)


def _merges(tensor: Tensor, first: int, second: int) -> bool:
    """Whether two dimensions are one in memory."""
    return tensor.stride(first) == tensor.shape[second] * tensor.stride(second)


def by_ids(
    backend: str, weight_ids: Tensor, x: Tensor, z: Tensor, *weights: Maybe, force: str | None = None
) -> Tensor:
    """y [..., O] of weights [G, ...] chosen by weight_ids [...]; weights without G are those of all rows."""
    of_group = [w is not None and w.dim() > r for w, r in zip(weights, RANKS, strict=True)]
    chosen = [w if own else None for w, own in zip(weights, of_group, strict=True)]
    common = [None if own else w for w, own in zip(weights, of_group, strict=True)]
    if segments.is_mapped(weight_ids):
        return interaction(backend, x, z, *gathered(weights, weight_ids), force=force)
    y = _chosen(backend, weight_ids, x, z, chosen, force)
    if any(weight is not None for weight in common):
        y = y + shared.by_leading_dimensions(backend, x, z, common, force=force)
    return y


def gathered(weights: Sequence[Maybe], weight_ids: Tensor) -> list[Maybe]:
    """The weights of each sample, copied."""
    found: list[Maybe] = []
    for weight, rank in zip(weights, RANKS, strict=True):
        if weight is not None and weight.dim() > rank:
            rows = segments.gather_rows(weight, weight_ids.flatten())
            weight = rows.view(*weight_ids.shape, *weight.shape[1:])
        found.append(weight)
    return found


def _chosen(
    backend: str, weight_ids: Tensor, x: Tensor, z: Tensor, weights: Sequence[Maybe], force: str | None
) -> Tensor:
    """The terms whose weights are chosen by number."""
    plan = choose(backend, weight_ids.shape, x, z, weights, force).plan
    if plan == cost_model.PER_X:
        weight, weight_z, weight_x, bias = weights
        assert weight is not None
        x, z, weights = z, x, (weight.mT, weight_x, weight_z, bias)
    if plan != cost_model.FUSED:
        return _apply(backend, x, *_generate_by_ids(backend, weight_ids, z, *weights))
    full = leads(x.shape[:-1], z.shape[:-1], weight_ids.shape)
    count = math.prod(full)
    ids, x, z = weight_ids.expand(full).reshape(count), _as_rows(x, full), _as_rows(z, full)
    groups = next(weight.shape[0] for weight in weights if weight is not None)
    y = autograd.forward_by_segment(backend, *segments.grouping(ids, groups), x, z, *weights)
    return y.view(*full, y.shape[-1])


def _as_rows(tensor: Tensor, lead: torch.Size) -> Tensor:
    return tensor.expand(*lead, tensor.shape[-1]).reshape(math.prod(lead), tensor.shape[-1])


def _generate_by_ids(
    backend: str,
    weight_ids: Tensor,
    z: Tensor,
    weight: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> tuple[Tensor, Maybe]:
    """W' [..., O, X] and b' [..., O] of contexts z [..., Z] and numbers of weights."""
    assert weight is not None
    full = leads(z.shape[:-1], weight_ids.shape)
    ids, rows = weight_ids.expand(full).reshape(math.prod(full)), _as_rows(z, full)
    groups, out, context, width = weight.shape
    # A view if O and X are one dimension in memory; else a copy of W, or of fewer weights.
    if len(ids) < groups and not (_merges(weight, 1, 3) or _merges(weight, 3, 1)):
        numbers, ids = torch.arange(len(ids), device=ids.device), ids
        weight, weight_z, weight_x, bias = (
            None if w is None else segments.gather_rows(w, ids) for w in (weight, weight_z, weight_x, bias)
        )
        assert weight is not None
        ids, groups = numbers, len(ids)
    matrix = weight.transpose(2, 3).reshape(groups, out * width, context)
    offset = None if weight_x is None else weight_x.reshape(groups, out * width)
    generated = segments.linear_by_segment(backend, ids, rows, matrix, offset).view(*full, out, width)
    if weight_z is None and bias is None:
        return generated, None
    features = without_features(rows) if weight_z is None else rows
    matrix_z = bias.new_empty(groups, out, 0) if weight_z is None and bias is not None else weight_z
    assert matrix_z is not None
    shift = segments.linear_by_segment(backend, ids, features, matrix_z, bias)
    return generated, shift.view(*full, out)
