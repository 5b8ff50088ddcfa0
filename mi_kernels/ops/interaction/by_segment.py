"""The primitives for groups of rows of unequal length, each with its own weights.

The rows of group g are ``row_index[offsets[g] : offsets[g + 1]]``. The CPU library has kernels for this.
Other backends call the plain primitives: groups of similar length are one grouped call, padded with rows of
zeros where that costs less than one more call. Rows are gathered for one call at a time and results are
written to their rows, so that there is no second copy of all of x or y.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..library import NAMESPACE, overloads
from . import cost_model, portable

Maybe = Tensor | None


class BySegment(NamedTuple):
    """In place of a backend's name in autograd.py: its primitives with the weights of each row's group."""

    backend: str
    row_index: Tensor  # [N], the rows in the order of their groups
    offsets: Tensor  # [G + 1]

    @property
    def groups(self) -> int:
        return self.offsets.shape[0] - 1

    def with_more_rows(self, count: int) -> "BySegment":
        """For x [count, N, X] as rows [count * N, X], with the same weights."""
        first = torch.arange(count, device=self.offsets.device) * self.row_index.shape[0]
        return self._replace(
            row_index=(self.row_index.unsqueeze(1) + first).flatten(), offsets=self.offsets * count
        )

    def with_more_groups(self, count: int) -> "BySegment":
        """For x as above and weights [count, G, ...] as [count * G, ...]."""
        first = (torch.arange(count, device=self.offsets.device) * self.row_index.shape[0]).unsqueeze(1)
        starts = (self.offsets[:-1] + first).flatten()
        end = self.offsets[-1:] * count
        return self._replace(row_index=(self.row_index + first).flatten(), offsets=torch.cat([starts, end]))


class Primitives:
    """The overloads of a primitive by backend, or by :class:`BySegment`."""

    def __init__(self, name: str, by_segment: str) -> None:
        self.plain, self.by_segment = overloads(name), overloads(by_segment)

    def __getitem__(self, where: "str | BySegment") -> Callable[..., Any]:
        if isinstance(where, str):
            return self.plain[where]
        kernel, order = self.by_segment[where.backend], where[1:]
        return lambda *arguments: kernel(*arguments, *order)


class Bucket(NamedTuple):
    """Groups that are one call: their indices, and their rows [groups, length], N for padding."""

    groups: Tensor
    rows: Tensor
    padded: bool

    def take(self, tensor: Tensor) -> Tensor:
        if not self.padded:
            part = tensor.index_select(0, self.rows.flatten())
        else:
            absent = self.rows.flatten() == tensor.shape[0]
            part = tensor.index_select(0, self.rows.flatten().masked_fill(absent, 0))
            part.index_fill_(0, absent.nonzero().squeeze(1), 0)
        return part if len(self.groups) == 1 else part.unflatten(0, tuple(self.rows.shape))

    def put(self, part: Tensor, result: Tensor) -> None:
        rows, part = self.rows.flatten(), part.reshape(self.rows.numel(), part.shape[-1])
        if self.padded:
            present = (rows != result.shape[0]).nonzero().squeeze(1)
            rows, part = rows[present], part.index_select(0, present)
        result.index_copy_(0, rows, part)

    def weights(self, *weights: Maybe) -> list[Maybe]:
        return [None if weight is None else self._weight(weight) for weight in weights]

    def _weight(self, weight: Tensor) -> Tensor:
        if len(self.groups) == 1:
            return weight[int(self.groups)]
        return weight.index_select(0, self.groups.to(weight.device))


def joined(lengths: Tensor, padding: int) -> list[tuple[Tensor, int]]:
    """The groups of each call, and the length to which they are padded.

    ``padding``: the number of padded rows that costs as much as one call. Merging two calls about doubles the
    padded rows of each, so a call may have padding worth two. At most half of its rows are padding.
    """
    nonempty = lengths.nonzero().squeeze(1)
    ordered = nonempty[torch.argsort(lengths[nonempty], stable=True)]
    values, counts = torch.unique_consecutive(lengths[ordered], return_counts=True)
    merged: list[tuple[int, int]] = []
    added = 0
    for length, groups in zip(reversed(values.tolist()), reversed(counts.tolist()), strict=True):
        more = groups * (merged[-1][1] - length) if merged else 0
        if merged and added + more <= min(2 * padding, merged[-1][0] * merged[-1][1] // 2):
            added += more
            merged[-1] = merged[-1][0] + groups, merged[-1][1]
        else:
            added = 0
            merged.append((groups, length))
    merged.reverse()
    parts = ordered.split([groups for groups, _ in merged]) if merged else ()
    return [(part, length) for part, (_, length) in zip(parts, merged, strict=True)]


# No call has more than this part of the rows, if it has several groups: they are copied for it.
PARTS = 8


def _parts(calls: list[tuple[Tensor, int]], rows: int) -> Iterator[tuple[Tensor, int]]:
    for groups, length in calls:
        yield from ((part, length) for part in groups.split(max(rows // length, 1)))


def _buckets(row_index: Tensor, offsets: Tensor, padding: int) -> Iterator[Bucket]:
    ends, rows = offsets.cpu(), row_index.shape[0]
    lengths = ends.diff()
    if int(ends[0]) != 0 or int(ends[-1]) != rows or bool((lengths < 0).any()):
        raise ValueError(
            f"interaction_by_segment: offsets: expected ascending numbers from 0 to N = {rows}, got"
            f" {int(ends[0])} to {int(ends[-1])} (indices of groups out of bounds, or not in order)"
        )
    for groups, length in _parts(joined(lengths, padding), max(rows // PARTS, 1)):
        first, own = ends[groups].unsqueeze(1), lengths[groups].unsqueeze(1)
        steps = torch.arange(length)
        places = (first + steps).clamp(max=max(rows - 1, 0)).to(row_index.device)
        index = row_index[places]
        padded = bool((own < length).any())
        if padded:
            index = index.masked_fill((steps >= own).to(index.device), rows)
        yield Bucket(groups, index, padded)


def _padding(x: Tensor, z: Tensor, out: int) -> int:
    work = z.shape[-1] * x.shape[-1] if z.shape[-1] and x.shape[-1] else z.shape[-1] + x.shape[-1]
    return cost_model.padding(work, out, x.dtype, x.device.type)


def _operation(name: str, suffix: str, namespace: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, namespace), name + suffix).default


def forward(suffix: str, namespace: str = NAMESPACE) -> Callable[..., Tensor]:
    """The kernel of ``mi_kernels::interaction_by_segment``; shapes as in schema.py."""

    def kernel(x, z, weight, weight_z, weight_x, bias, row_index, offsets):
        weights = weight, weight_z, weight_x, bias
        y = x.new_empty(x.shape[0], portable.out_features(*weights))
        for bucket in _buckets(row_index, offsets, _padding(x, z, y.shape[-1])):
            part = _operation("interaction", suffix, namespace)(
                bucket.take(x), bucket.take(z), *bucket.weights(*weights)
            )
            bucket.put(part, y)
        return y

    return kernel


def input_grads(suffix: str, namespace: str = NAMESPACE) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel of ``mi_kernels::interaction_by_segment_input_grads``."""

    def kernel(grad, x, z, weight, weight_z, weight_x, want_x, want_z, row_index, offsets):
        wanted = want_x, want_z
        results = [
            like.new_empty(like.shape if want else (0,)) for like, want in zip((x, z), wanted, strict=True)
        ]
        for bucket in _buckets(row_index, offsets, _padding(x, z, grad.shape[-1])):
            rows = bucket.take(grad), bucket.take(x), bucket.take(z)
            weights = bucket.weights(weight, weight_z, weight_x)
            parts = _operation("interaction_input_grads", suffix, namespace)(*rows, *weights, *wanted)
            for part, result, want in zip(parts, results, wanted, strict=True):
                if want:
                    bucket.put(part, result)
        return tuple(results)

    return kernel


def weight_grads(
    suffix: str, namespace: str = NAMESPACE
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The kernel of ``mi_kernels::interaction_by_segment_weight_grads``."""

    def kernel(grad, x, z, want_weight, want_weight_z, want_weight_x, want_bias, row_index, offsets):
        wanted = want_weight, want_weight_z, want_weight_x, want_bias
        results = [grad.new_zeros(shape) for shape in weight_shapes(grad, x, z, wanted, offsets)]
        for bucket in _buckets(row_index, offsets, _padding(x, z, grad.shape[-1])):
            rows = bucket.take(grad), bucket.take(x), bucket.take(z)
            parts = _operation("interaction_weight_grads", suffix, namespace)(*rows, *wanted)
            for part, result, want in zip(parts, results, wanted, strict=True):
                if not want:
                    continue
                if len(bucket.groups) == 1:
                    result[int(bucket.groups)] = part
                else:
                    result.index_copy_(0, bucket.groups.to(result.device), part)
        return tuple(results)

    return kernel


def weight_shapes(
    grad: Tensor, x: Tensor, z: Tensor, wanted: Sequence[bool], offsets: Tensor
) -> list[tuple[int, ...]]:
    """The shapes of dW, dU, dV and dc; those that are not wanted have no elements."""
    groups, o, i, j = offsets.shape[0] - 1, grad.shape[-1], z.shape[-1], x.shape[-1]
    shapes: list[tuple[int, ...]] = [(groups, o, i, j), (groups, o, i), (groups, o, j), (groups, o)]
    return [shape if want else (0,) for shape, want in zip(shapes, wanted, strict=True)]
