"""What all parts of the family know about shapes: the layout of results, and x by sets."""

import torch
from torch import Tensor


def is_copied(x: Tensor, dim: int) -> bool:
    """Whether compiled kernels copy x first: its dimensions from ``dim`` on lie in neither order."""
    spatial = tuple(range(dim + 1, x.dim()))
    return not _follow_each_other(x, (dim, *spatial)) and not _follow_each_other(x, (*spatial, dim))


def has_channels_last(x: Tensor, dim: int) -> bool:
    """Whether the dimensions from ``dim`` on follow each other in memory, the channels last and not first."""
    spatial = tuple(range(dim + 1, x.dim()))
    return not _follow_each_other(x, (dim, *spatial)) and _follow_each_other(x, (*spatial, dim))


def _follow_each_other(x: Tensor, dims: tuple[int, ...]) -> bool:
    expected = 1
    for d in reversed(dims):
        if x.shape[d] != 1 and x.stride(d) != expected:
            return False
        expected = expected * x.shape[d]
    return True


def result_like(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised result of the size of x: contiguous, or channels last where x is."""
    if has_channels_last(x, dim):
        return x.new_empty((*x.shape[:dim], *x.shape[dim + 1 :], x.shape[dim]), dtype=dtype).movedim(-1, dim)
    return x.new_empty(x.shape, dtype=dtype)


def by_sets(tensor: Tensor, dim: int, groups: int) -> Tensor:
    """A tensor [*lead, C, *spatial] as [*lead, groups, C / groups, *spatial]."""
    return tensor.unflatten(dim, (groups, tensor.shape[dim] // groups))


def per_set(statistic: Tensor, dim: int, rank: int) -> Tensor:
    """[*lead, groups], such as mean, beside a tensor of `by_sets` with ``rank`` dimensions."""
    return statistic[(...,) + (None,) * (rank - dim - 1)]
