"""The dense interaction with weights of each sample, or weights that each sample chooses by index.

Where x (or z) varies along leading dimensions that neither the weights nor z (or x) have, W' = z W + V is
generated once for each weight and context and then applied, as in shared.py. Otherwise each row is multiplied
by its own weights: the rows of one weight are a group of a grouped product, or of by_segment.py, and no
weight is copied.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import broadcast
from ..rules import Maybe, add, gradients_wanted, without_features
from . import autograd, cost_model, segments, shared

RANKS = (3, 2, 2, 1)  # of W, U, V and c of one sample


def lead_of(weight: Tensor, rank: int) -> torch.Size:
    return weight.shape[: weight.dim() - rank]


def with_lead(weights: Sequence[Maybe], lead: Sequence[int]) -> list[Maybe]:
    """The weights with the leading dimensions ``lead``; views."""
    found: list[Maybe] = []
    for weight, rank in zip(weights, RANKS, strict=True):
        if weight is not None:
            own = weight.shape[weight.dim() - rank :]
            weight = weight.expand(*lead, *own) if lead else weight.reshape(own)
        found.append(weight)
    return found


def of_groups(weights: Sequence[Maybe]) -> list[bool]:
    """Which weights have leading dimensions."""
    return [w is not None and w.dim() > rank for w, rank in zip(weights, RANKS, strict=True)]


def leads(*shapes: torch.Size) -> torch.Size:
    """The broadcast of leading dimensions; the caller has checked that they do."""
    lead = torch.Size()
    for shape in shapes:
        common = broadcast(lead, shape)
        assert common is not None, "checked by the caller"
        lead = common
    return lead


def has_leading_dimensions(weights: Sequence[Maybe]) -> bool:
    return any(of_groups(weights))


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
    found: list[cost_model.Cost] = []
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
    products, bias = split(weights)
    parts = [_together(backend, x, z, together, main, force) for main, together in products]
    y = add(*parts, bias)
    assert y is not None
    own = (lead_of(w, rank) for w, rank in zip(weights, RANKS, strict=True) if w is not None)
    y = y.expand(*leads(x.shape[:-1], z.shape[:-1], *own), y.shape[-1])
    return y.contiguous() if parts else y.clone(memory_format=torch.contiguous_format)


def split(weights: Sequence[Maybe]) -> tuple[list[tuple[int, tuple[Maybe, ...]]], Maybe]:
    """The products with their weights, each with the index of the weight that has all leading dimensions;
    and a bias that fits none of them."""
    found = []
    rest: tuple[Maybe, ...] = tuple(weights)
    while (main := next((index for index in range(3) if rest[index] is not None), None)) is not None:
        together, rest = _split(rest, main)
        found.append((main, together))
    return found, rest[3]


def _split(weights: Sequence[Maybe], main: int) -> tuple[tuple[Maybe, ...], tuple[Maybe, ...]]:
    """The weights with the leading dimensions of the weight ``main``, or fewer, and the others."""
    first = weights[main]
    assert first is not None
    lead = lead_of(first, RANKS[main])
    fits = [
        weight is not None and broadcast(lead_of(weight, rank), lead) == lead
        for weight, rank in zip(weights, RANKS, strict=True)
    ]
    return (
        tuple(weight if fit else None for weight, fit in zip(weights, fits, strict=True)),
        tuple(None if fit else weight for weight, fit in zip(weights, fits, strict=True)),
    )


def _together(
    backend: str, x: Tensor, z: Tensor, weights: Sequence[Maybe], main: int, force: str | None
) -> Tensor:
    """The terms of weights with the leading dimensions of the weight ``main``, or fewer."""
    first = weights[main]
    assert first is not None
    lead = lead_of(first, RANKS[main])
    if math.prod(lead) == 1:
        return shared.by_leading_dimensions(backend, x, z, with_lead(weights, ()), force=force)
    weights = with_lead(weights, lead)
    plan = choose(backend, lead, x, z, weights, force).plan
    if plan == cost_model.PER_X:
        x, z, weights = _mirrored(x, z, weights)
    if plan != cost_model.FUSED:
        return _apply(backend, x, *_generate(backend, lead, z, *weights))
    return _rows(backend, lead, x, z, *weights)


def _mirrored(x: Tensor, z: Tensor, weights: Sequence[Maybe]) -> tuple[Tensor, Tensor, Sequence[Maybe]]:
    weight, weight_z, weight_x, bias = weights
    assert weight is not None, "without W there is nothing to share"
    return z, x, (weight.mT, weight_x, weight_z, bias)


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
    matrices = shared.matrices_of(weight, 1)
    if not matrices.groups:  # one product for each weight
        offset = None if weight_x is None else matrices.offsets(weight_x)
        generated = matrices.generated(shared.linear(backend, z, matrices.of(weight), offset), weight)
    else:  # one for each weight and output (or feature of x)
        matrix, offset, each = _flat_matrices(matrices, weight, weight_x)
        rows = z.unsqueeze(1).expand(z.shape[0], each, *z.shape[1:]).flatten(0, 1)
        y = shared.linear(backend, rows, matrix, offset).unflatten(0, (z.shape[0], each)).transpose(1, 2)
        generated = y if matrices.groups == (0,) else y.mT
    shift = None
    if weight_z is not None:
        shift = shared.linear(backend, z, weight_z, bias)
    elif bias is not None:
        shift = bias.unsqueeze(1).expand(*z.shape[:2], bias.shape[-1])
    return layout.restored(generated), None if shift is None else layout.restored(shift)


def _flat_matrices(matrices: shared.Matrices, weight: Tensor, weight_x: Maybe) -> tuple[Tensor, Maybe, int]:
    """The matrices [G n, N, Z] and offsets [G n, N] of weights that are n matrices each, and n."""
    offset = None if weight_x is None else matrices.offsets(weight_x).flatten(0, 1)
    return matrices.of(weight).flatten(0, 1), offset, weight.shape[matrices.groups[0] - 3]


def by_ids(
    backend: str, weight_ids: Tensor, x: Tensor, z: Tensor, *weights: Maybe, force: str | None = None
) -> Tensor:
    """y [..., O] of weights [G, ...] chosen by weight_ids [...]; weights without G are those of all rows."""
    chosen = [w if own else None for w, own in zip(weights, of_groups(weights), strict=True)]
    common = [None if own else w for w, own in zip(weights, of_groups(weights), strict=True)]
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
    """The terms whose weights are chosen by index."""
    plan = choose(backend, weight_ids.shape, x, z, weights, force).plan
    if plan == cost_model.PER_X:
        x, z, weights = _mirrored(x, z, weights)
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
    """W' [..., O, X] and b' [..., O] of contexts z [..., Z] and indices of weights."""
    assert weight is not None
    full = leads(z.shape[:-1], weight_ids.shape)
    ids, rows = weight_ids.expand(full).reshape(math.prod(full)), _as_rows(z, full)
    matrices = shared.matrices_of(weight, 1)
    if not matrices.groups:
        offset = None if weight_x is None else matrices.offsets(weight_x)
        y = segments.linear_by_segment(backend, ids, rows, matrices.of(weight), offset)
        generated = matrices.generated(y, weight)
    else:
        matrix, offset, each = _flat_matrices(matrices, weight, weight_x)
        numbers = (ids.new_ones(each).cumsum(0) - 1) + (ids * each).unsqueeze(1)
        repeated = rows.unsqueeze(1).expand(rows.shape[0], each, rows.shape[1]).flatten(0, 1)
        y = segments.linear_by_segment(backend, numbers.flatten(), repeated, matrix, offset)
        y = y.unflatten(0, (rows.shape[0], each))
        generated = y if matrices.groups == (0,) else y.mT
    generated = generated.unflatten(0, full)
    if weight_z is None and bias is None:
        return generated, None
    if weight_z is None:
        rows, weight_z = without_features(rows), rows.new_empty(*weight.shape[:2], 0)
    shift = segments.linear_by_segment(backend, ids, rows, weight_z, bias)
    return generated, shift.unflatten(0, full)
