"""What all parts of the family know about shapes: the layout of results, and x by sets."""

import torch
from torch import Tensor


def result_like(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised result of the size of x: contiguous, or channels last where x is."""
    if not x.is_contiguous() and x.movedim(dim, -1).is_contiguous():
        return x.new_empty((*x.shape[:dim], *x.shape[dim + 1 :], x.shape[dim]), dtype=dtype).movedim(-1, dim)
    return x.new_empty(x.shape, dtype=dtype)


def by_sets(tensor: Tensor, dim: int, groups: int) -> Tensor:
    """A tensor [*lead, C, *spatial] as [*lead, groups, C / groups, *spatial]."""
    return tensor.unflatten(dim, (groups, tensor.shape[dim] // groups))


def per_set(statistic: Tensor, dim: int, rank: int) -> Tensor:
    """[*lead, groups], such as mean, beside a tensor of `by_sets` with ``rank`` dimensions."""
    return statistic[(...,) + (None,) * (rank - dim - 1)]
