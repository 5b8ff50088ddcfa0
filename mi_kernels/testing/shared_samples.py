"""Arguments of the dense interaction where rows share contexts: the part of samples.py for that."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .samples import (
    ALL_TERMS,
    BROADCAST,
    LAYOUTS,
    WEIGHT_ONLY,
    Sample,
    Shape,
    term_subsets,
)

# Rows that share contexts, contexts that share inputs, and both, with common dimensions on either side.
SHARED = (
    Shape("one-context", (60,), 9, 17, 13, context_batch=(1,)),
    Shape("one-input", (), 9, 17, 13, context_batch=(60,)),
    Shape("groups", (5, 12), 7, 19, 11, context_batch=(5, 1)),
    Shape("groups-inside", (12, 5), 7, 19, 11, context_batch=(1, 5)),
    Shape("inputs-shared", (5, 1), 7, 19, 11, context_batch=(5, 12)),
    Shape("outer-many", (14, 1), 6, 5, 7, context_batch=(1, 9)),
    Shape("interleaved", (2, 1, 6, 3), 5, 8, 9, context_batch=(2, 4, 1, 3)),
    Shape("pairs-of-tokens", (3, 1, 8), 6, 7, 5, context_batch=(3, 9, 1)),
    Shape("single-dims", (1, 10, 1), 4, 6, 5, context_batch=(3, 1, 1)),
)


def shared_samples() -> Iterator[Sample]:
    """The cases with different leading dimensions of x and z, for each plan that can be chosen there."""
    for shape in (*SHARED, *BROADCAST):
        yield Sample(shape)
        yield Sample(shape, WEIGHT_ONLY)
    for terms in term_subsets():
        if terms[0] and terms not in (ALL_TERMS, WEIGHT_ONLY):
            yield Sample(SHARED[2], terms)
            yield Sample(SHARED[6], terms)
    for layout in LAYOUTS[1:]:
        for shape in (SHARED[0], SHARED[4], SHARED[6]):
            yield Sample(shape, layout=layout)


@dataclass(frozen=True)
class Ragged:
    """An interaction of groups with these lengths: rows in groups or mixed, one context for each group."""

    name: str
    lengths: tuple[int, ...]
    context: int = 4
    width: int = 7
    out: int = 5
    mixed: bool = False

    @property
    def shape(self) -> Shape:
        """Of x [N, X] and z [G, Z], which do not broadcast."""
        return Shape(
            self.name, (sum(self.lengths),), self.context, self.width, self.out, (len(self.lengths),)
        )

    def segment_ids(self, device: str | torch.device = "cpu") -> Tensor:
        ids = torch.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))
        if self.mixed:
            ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
        return ids.to(device)

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """x, z, W, U, V and c."""
        return Sample(self.shape).arguments(dtype, device, seed, requires_grad)

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        rows = Shape(self.name, (sum(self.lengths),), self.context, self.width, self.out)
        return Sample(rows).cotangent(dtype, device, seed)


RAGGED = (
    Ragged("equal", (6,) * 8),
    Ragged("equal-mixed", (6,) * 8, mixed=True),
    Ragged("different", (3, 9, 1, 20, 3)),
    Ragged("different-mixed", (3, 9, 1, 20, 3), mixed=True),
    Ragged("empty-groups", (0, 5, 0, 0, 2, 5, 0), mixed=True),
    Ragged("ones", (1,) * 30, mixed=True),
    Ragged("one-group", (40,)),
    Ragged("no-rows", (0, 0, 0)),
)
MIXED = RAGGED[4]
TINY_RAGGED = Ragged("tiny", (2, 0, 1, 2), 2, 3, 2, mixed=True)
