"""Ragged groups: rows in any order, each with the index of the group whose context it uses.

Consecutive groups of one length are one grouped product (a bucket). Rows are permuted so that groups of
similar length follow each other, and groups are padded with rows of zeros where that costs less than one more
product (cost_model.padding); rows whose order is good already stay in place. Where W' is not given the
alternative is the fused plan with one context per row (N Z elements); cost_model.py compares them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mi_kernels.ops.checks import check_segments
from mi_kernels.ops.dtypes import accumulation_dtype
from mi_kernels.ops.interaction import autograd, cost_model, shared
from mi_kernels.ops.permute import move
from mi_kernels.ops.rules import Maybe, gradients_wanted

_PROXY = torch._C._TorchDispatchModeKey.PROXY  # active under make_fx


class Bucket(NamedTuple):
    """Consecutive groups, each padded to ``length`` rows."""

    groups: int
    length: int


class Segments(NamedTuple):
    """The non-empty groups in the order of their buckets, and the permutation of the rows."""

    groups: Tensor  # [G'], group indices
    # As in permute.move: dest_index [N], and src_index [P], N for padding. None where rows stay in place and
    # there is no padding.
    dest_index: Tensor | None
    src_index: Tensor | None
    buckets: tuple[Bucket, ...]

    @property
    def rows(self) -> int:
        """The number of rows, including padding."""
        return sum(bucket.groups * bucket.length for bucket in self.buckets)

    def __str__(self) -> str:
        several = "s" if len(self.buckets) != 1 else ""
        return f"{len(self.buckets)} product{several} of {self.rows} rows in all"


def opaque(segment_ids: Tensor) -> bool:
    """Whether the values cannot be read, or would be baked into a graph: under torch.compile and all other
    tracers, under vmap over them, and on the meta device."""
    if torch.compiler.is_compiling() or segment_ids.device.type == "meta" or torch.jit.is_tracing():
        return True
    # A subclass (of tracers, DTensor) may hold no values, or only some of them.
    if type(segment_ids) is not Tensor or torch._C._get_dispatch_mode(_PROXY) is not None:
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(segment_ids)


def check_segment_ids(op: str, segment_ids: object, x: Tensor, groups: int) -> None:
    """``segment_ids`` fits x [N, X] and the number of groups; values are checked where they can be read."""
    look = isinstance(segment_ids, Tensor) and not opaque(segment_ids)
    check_segments(op, segment_ids, x, groups, look)


def segments(segment_ids: Tensor, count: int, padding: int) -> Segments:
    """The order of rows for ``segment_ids``, which are below ``count``.

    ``padding``: the number of padded rows that costs as much as one product.
    """
    lengths = torch.bincount(segment_ids, minlength=count)
    nonempty = lengths.nonzero().squeeze(1)
    by_length = nonempty[torch.argsort(lengths[nonempty], stable=True)]
    buckets = _joined(_buckets(lengths[by_length]), padding)
    ascending = _ascending(segment_ids)
    if ascending:
        runs = _buckets(lengths[nonempty])
        more = len(runs) - len(buckets)
        # Up to twice as many products are cheaper than moving the rows there and back; so are products that
        # cost as much as at most half of the rows that would be moved.
        if more <= len(buckets) or 2 * padding * more <= len(segment_ids):
            return Segments(nonempty, None, None, runs)
    order = None if ascending else torch.argsort(segment_ids, stable=True)
    groups = segment_ids if order is None else segment_ids[order]
    # For each group, its first row in the new order minus its first row in the order of groups.
    shifts = torch.empty_like(lengths)
    counts, padded = torch.tensor(buckets, device=lengths.device).unbind(1)
    padded = padded.repeat_interleave(counts, output_size=len(by_length))
    shifts[by_length] = padded.cumsum(0) - padded
    shifts -= lengths.cumsum(0) - lengths
    dest_index = shifts[groups] + torch.arange(len(groups), device=groups.device)
    if order is not None:
        dest_index = torch.empty_like(dest_index).index_copy_(0, order, dest_index)
    rows = sum(groups * length for groups, length in buckets)
    if rows == len(dest_index) and _ascending(dest_index):
        return Segments(by_length, None, None, buckets)
    src_index = torch.full((rows,), len(dest_index), device=dest_index.device)
    src_index.index_copy_(0, dest_index, torch.arange(len(dest_index), device=dest_index.device))
    return Segments(by_length, dest_index, src_index, buckets)


def _joined(buckets: tuple[Bucket, ...], padding: int) -> tuple[Bucket, ...]:
    """Merges buckets, whose lengths ascend, into fewer and larger ones.

    Merging about doubles the padded rows per bucket, so a bucket may have padding worth two products. At most
    half of its rows are padding.
    """
    joined: list[Bucket] = []
    added = 0
    for groups, length in reversed(buckets):
        more = groups * (joined[-1].length - length) if joined else 0
        if joined and added + more <= min(2 * padding, joined[-1].groups * joined[-1].length // 2):
            added += more
            joined[-1] = Bucket(joined[-1].groups + groups, joined[-1].length)
        else:
            added = 0
            joined.append(Bucket(groups, length))
    return tuple(reversed(joined))


def _ascending(numbers: Tensor) -> bool:
    return bool((numbers[1:] >= numbers[:-1]).all())


def _buckets(lengths: Tensor) -> tuple[Bucket, ...]:
    values, counts = torch.unique_consecutive(lengths, return_counts=True)
    return tuple(map(Bucket, counts.tolist(), values.tolist()))


def _by_bucket(backend: str, order: Segments, x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """y [N, O], with W' [G', O, X] and b' [G', O] in the order of ``order.groups``."""
    dest_index, src_index = order.dest_index, order.src_index
    if dest_index is not None and src_index is not None:
        x = move(x, src_index, dest_index)
    counts = [bucket.groups for bucket in order.buckets]
    # split, not slices: the gradient of each slice would have the size of the whole.
    rows = x.split([bucket.groups * bucket.length for bucket in order.buckets])
    offsets = [None] * len(counts) if bias is None else bias.unsqueeze(1).split(counts)
    parts = []
    for bucket, part, layers, offset in zip(
        order.buckets, rows, weight.unsqueeze(1).split(counts), offsets, strict=True
    ):
        y = shared.apply_generated(backend, part.unflatten(0, tuple(bucket)), layers, offset)
        parts.append(y.reshape(len(part), y.shape[-1]))
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y if dest_index is None or src_index is None else move(y, dest_index, src_index)


def apply_by_segment(backend: str, segment_ids: Tensor, x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """y [N, O] of x [N, X], W' [G, O, X] and b' [G, O]. W' is copied unless its order is that of lengths."""
    if opaque(segment_ids) or len(segment_ids) == 0:
        rows = gather_rows(weight, segment_ids).unsqueeze(1)
        bias = None if bias is None else gather_rows(bias, segment_ids).unsqueeze(1)
        return shared.apply_generated(backend, x.unsqueeze(1), rows, bias).flatten(0, 2)
    order = order_of_layers(segment_ids, x, weight)
    if not torch.equal(order.groups, torch.arange(weight.shape[0], device=weight.device)):
        weight = weight.index_select(0, order.groups)
        bias = None if bias is None else bias.index_select(0, order.groups)
    return _by_bucket(backend, order, x, weight, bias)


def order_of_layers(segment_ids: Tensor, x: Tensor, weight: Tensor) -> Segments:
    """The order for W' [G, O, X]."""
    groups, out, width = weight.shape
    return segments(segment_ids, groups, cost_model.padding(width, out, x.dtype, x.device.type))


def order_of_contexts(segment_ids: Tensor, x: Tensor, z: Tensor, weight: Tensor) -> Segments:
    """The order for z [G, Z] and W [O, Z, X]."""
    out, _, width = weight.shape
    return segments(segment_ids, len(z), cost_model.padding(width, out, x.dtype, x.device.type))


def costs_by_segment(
    backend: str, order: Segments, x: Tensor, z: Tensor, weights: Sequence[Maybe]
) -> tuple[cost_model.Cost, ...]:
    """The costs of both plans; W is given."""
    weight = weights[0]
    assert weight is not None
    groups, dims = len(order.groups), (z.shape[-1], x.shape[-1], weight.shape[0])
    # The remainder of the division is ignored; it does not change the choice.
    sizes = cost_model.Sizes(groups, 1, max(order.rows // max(groups, 1), 1), *dims)
    wanted = cost_model.Wanted(*gradients_wanted((x, z, *weights[:3])))
    how = wanted, x.dtype, backend, x.device.type
    # The fused plan has a context per row and no padding.
    fused = cost_model.fused(cost_model.Sizes(len(x), 1, 1, *dims), *how)
    return fused, *cost_model.all_costs(sizes, *how, len(order.buckets))[1:]


def interaction(
    backend: str, segment_ids: Tensor, x: Tensor, z: Tensor, *weights: Maybe, force: str | None = None
) -> Tensor:
    """y [N, O] of x [N, X] and z [G, Z]."""
    if weights[0] is None or opaque(segment_ids):
        return autograd.forward(backend, x, gather_contexts(z, segment_ids), *weights)
    order = order_of_contexts(segment_ids, x, z, weights[0])
    plan = force or cost_model.cheapest(costs_by_segment(backend, order, x, z, weights)).plan
    if plan == cost_model.FUSED or not order.buckets:
        return autograd.forward(backend, x, gather_contexts(z, segment_ids), *weights)
    generated, offset = shared.generate(backend, z.index_select(0, order.groups), *weights)
    assert generated is not None
    return _by_bucket(backend, order, x, generated, offset)


def gather_contexts(z: Tensor, segment_ids: Tensor) -> Tensor:
    """z [G, Z] as [N, Z]. Its gradient is summed in the accumulation dtype."""
    return gather_rows(z.to(accumulation_dtype(z.dtype)), segment_ids).to(z.dtype)


def gather_rows(tensor: Tensor, segment_ids: Tensor) -> Tensor:
    """tensor [G, ...] as [N, ...]."""
    if opaque(segment_ids):
        # Inductor lowers index_select to an index that wraps negative values: make them out of range.
        segment_ids = segment_ids.masked_fill(segment_ids < 0, tensor.shape[0])
    return tensor.index_select(0, segment_ids)
