"""Arguments of generated weights of low rank: the part of samples.py for these."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.interaction import reference
from ._package import mi
from .lru_cache import normal
from .samples import LAYOUTS, lay_out, made

Maybe = Tensor | None


@dataclass(frozen=True)
class Factors:
    """A call of `apply_low_rank`: everything but dtype, device and seed. ``lengths``: of groups, of rows."""

    name: str
    lead: tuple[int, ...]  # of x
    of_down: tuple[int, ...] = ()
    of_up: tuple[int, ...] = ()
    width: int = 19
    rank: int = 3
    out: int = 13
    base: tuple[int, ...] | None = None  # its leading dimensions
    scale: float = 1.0
    layout: str = "contiguous"
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        parts = [self.name, "base" if self.base is not None else "", f"{self.scale:g}" * (self.scale != 1)]
        return "-".join(part for part in (*parts, self.layout.replace("contiguous", "")) if part)

    @property
    def shape(self) -> torch.Size:
        """Of y."""
        if self.lengths is not None:
            return torch.Size((*self.lead, self.out))
        return torch.Size((*torch.broadcast_shapes(self.lead, self.of_down, self.of_up), self.out))

    def segment_ids(self, device: str | torch.device = "cpu") -> Maybe:
        """Not in order."""
        if self.lengths is None:
            return None
        ids = [group for group, length in enumerate(self.lengths) for _ in range(length)]
        random.Random(0).shuffle(ids)  # not torch's, which vmap refuses
        return torch.tensor(ids, dtype=torch.int64, device=device)

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Maybe, ...]:
        """x, A, B and base or None. The same numbers in every dtype, rounded."""
        sizes = [
            (*self.lead, self.width),
            (*self.of_down, self.rank, self.width),
            (*self.of_up, self.out, self.rank),
        ]
        scales = 1.0, max(self.width, 1) ** -0.5, max(self.rank, 1) ** -0.5 / max(self.scale, 0.1), 1.0
        drawn = normal(sizes + ([] if self.base is None else [(*self.base, self.out)]), seed)
        tensors: list[Maybe] = []
        for values, scale in zip(drawn, scales, strict=False):
            tensor = lay_out(made(values * scale, dtype, device), self.layout)
            tensors.append(tensor.requires_grad_(requires_grad))
        return (*tensors, None) if self.base is None else tuple(tensors)

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        (values,) = normal([tuple(self.shape)], seed)
        layout = "contiguous" if self.layout == "expanded" else self.layout
        return lay_out(made(values, dtype, device), layout)

    def call(self, *tensors: Maybe) -> Tensor:
        x, down, up, base = tensors
        assert x is not None and down is not None and up is not None
        ids = self.segment_ids(x.device)
        return mi.apply_low_rank(x, down, up, base, scale=self.scale, segment_ids=ids)

    def reference(self, *tensors: Maybe, scale: float | None = None) -> Tensor:
        x, down, up, base = tensors
        assert x is not None and down is not None and up is not None
        ids = self.segment_ids(x.device)
        if ids is not None:
            down, up = down[ids], up[ids]
        return reference.apply_low_rank(x, down, up, base, self.scale if scale is None else scale)

    def squares(self, *tensors: Maybe) -> Tensor:
        """S^2 of y: the scale is a coefficient of its terms."""
        squared = [None if t is None else t.square() for t in tensors]
        return self.reference(*squared, scale=self.scale**2)

    def square_gradients(self, grad: Tensor, *tensors: Maybe) -> Sequence[Tensor]:
        present = [t.square() for t in tensors if t is not None]

        def value(*given: Tensor) -> Tensor:
            base = given[3] if len(given) > 3 else None
            return self.reference(*given[:3], base, scale=self.scale**2)

        return torch.func.vjp(value, *present)[1](grad.square())


SHARED = Factors("shared", (30,), base=(30,), scale=2.0)
SAMPLES = Factors("samples", (3, 11), (3, 1), (3, 1), base=(3, 11), scale=0.5)
TINY = Factors("tiny", (2, 3), (2, 1), (2, 1), 3, 2, 2, base=(2, 3), scale=0.5)
GROUPS = Factors("groups", (36,), (5,), (5,), base=(36,), scale=0.5, lengths=(3, 9, 1, 20, 3))
TINY_GROUPS = Factors("tiny-groups", (5,), (4,), (4,), 3, 2, 2, base=(5,), scale=0.5, lengths=(2, 0, 1, 2))


def factors() -> Iterator[Factors]:
    """Leading dimensions of every kind, layouts, and sizes that are edges."""
    for sample in (SHARED, SAMPLES, GROUPS):
        yield sample
        yield replace(sample, base=None)
        yield replace(sample, scale=1.0)
        yield replace(sample, base=())
        for layout in LAYOUTS[1:]:
            yield replace(sample, layout=layout)
    yield Factors("row-each", (25,), (25,), (25,), base=(25,))
    yield Factors("down-shared", (3, 11), (), (3, 1), base=(3, 1))
    yield Factors("up-shared", (3, 11), (3, 1), (), base=(11,))
    yield Factors("many-of-one", (11,), (3, 1), (3, 1), base=(3, 11))
    yield Factors("up-for-many", (11,), (), (4, 1), base=())
    yield Factors("inside", (11, 3), (1, 3), (3,))
    yield Factors("interleaved", (2, 1, 6), (2, 4, 1), (4, 1), base=(2, 4, 6), scale=3.0)
    yield Factors("one-row", (), base=())
    yield Factors("rank-1", (2, 20), (2, 1), (2, 1), rank=1, base=(2, 20), scale=0.25)
    yield Factors("wide", (2, 40), (2, 1), (2, 1), width=130, rank=17, out=70, base=(2, 40))
    yield Factors("one-output", (2, 20), (2, 1), (2, 1), out=1, base=(2, 20))
    yield Factors(
        "groups-long", (70,), (3,), (3,), width=40, rank=16, out=33, base=(70,), lengths=(50, 4, 16)
    )
    yield Factors("no-rank", (2, 7), (2, 1), (2, 1), rank=0, base=(2, 7))
    yield Factors("no-features", (2, 7), (2, 1), (2, 1), width=0, base=(2, 7))
    yield Factors("no-output", (2, 7), (2, 1), (2, 1), out=0, base=(2, 7))
    yield Factors("no-rows", (2, 0), (2, 1), (2, 1), base=(2, 0))
    yield Factors("no-groups", (0,), (3,), (3,), lengths=(0, 0, 0))
