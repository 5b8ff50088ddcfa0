"""Where the parts of arguments and results lie when an operation is cut along one axis.

A result that has the axis is sharded along it. One that has not is a sum over it: each device has a term,
`Partial`. Products without the axis are to be counted once, so their last factor becomes a partial sum, too.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from ..ops.library import Axes


class Cut(NamedTuple):
    results: list[Placement]
    arguments: dict[str, Placement]


def whole(axes: Mapping[str, str], results: Sequence[Axes | None]) -> Cut:
    """Everything on each device."""
    return Cut([Replicate() for _ in results], {name: Replicate() for name in axes})


def cut(
    axis: str, axes: Mapping[str, str], results: Sequence[Axes | None], whole_results: bool = False
) -> Cut | None:
    """The placements for a cut along ``axis``; None where it cannot be cut.

    ``axes``: of the arguments that are given. ``whole_results``: whether a result without the axis in any of
    its products may be computed by each device; a derivative rule would count it once for each of them.
    """
    placed: dict[str, Placement] = {}
    for name, letters in axes.items():
        if letters.count(axis) > 1:
            return None
        placed[name] = Shard(letters.index(axis)) if axis in letters else Replicate()
    found: list[Placement] = []
    for result in results:
        if result is None:
            found.append(Replicate())
            continue
        if axis in result.letters:
            found.append(Shard(result.letters.index(axis)))
            continue
        terms = [term for term in result.terms if all(name in axes for name in term)]
        rest = [term for term in terms if not any(axis in axes[name] for name in term)]
        if whole_results and terms and len(rest) == len(terms):
            found.append(Replicate())
            continue
        found.append(Partial())
        for term in rest:
            placed[term[-1]] = Partial()
    return Cut(found, placed)
