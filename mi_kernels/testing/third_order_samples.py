"""Arguments of the interaction with two contexts: the part of samples.py for that."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._package import mi
from .lru_cache import normal
from .samples import LAYOUTS, lay_out, made

Maybe = Tensor | None
ALL = "12Vc"  # the linear terms: U1, U2, V and c


@dataclass(frozen=True)
class Triple:
    """An interaction of x, z1 and z2 with these shapes: everything but dtype, device and seed."""

    name: str
    operands: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # x [..., X], z1, z2
    out: int = 5
    terms: str = ALL
    layout: str = "contiguous"

    def __str__(self) -> str:
        terms = "" if self.terms == ALL else self.terms or "W"
        parts = (self.name, terms, self.layout.replace("contiguous", ""))
        return "-".join(part for part in parts if part)

    @property
    def shape(self) -> torch.Size:
        """Of y."""
        leads = (operand[:-1] for operand in self.operands)
        return torch.Size((*torch.broadcast_shapes(*leads), self.out))

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Maybe, ...]:
        """x, z1, z2, W, U1, U2, V and c, None for a term that is absent. The same numbers in every dtype."""
        x, one, two = (operand[-1] for operand in self.operands)
        out = self.out
        sizes = [*self.operands, (out, one, two, x), (out, one), (out, two), (out, x), (out,)]
        fans = 1, 1, 1, one * two * x, one, two, x, 1  # for terms of variance 1
        there = [True] * 4 + [term in self.terms for term in ALL]
        tensors: list[Maybe] = []
        for values, fan, present in zip(normal(sizes, seed), fans, there, strict=True):
            tensor = (
                lay_out(made(values * max(fan, 1) ** -0.5, dtype, device), self.layout) if present else None
            )
            tensors.append(tensor if tensor is None else tensor.requires_grad_(requires_grad))
        return tuple(tensors)

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        (values,) = normal([tuple(self.shape)], seed)
        layout = "contiguous" if self.layout == "expanded" else self.layout
        return lay_out(made(values, dtype, device), layout)

    @staticmethod
    def call(*tensors: Maybe) -> Tensor:
        x, first, second, weight, weight_z1, weight_z2, *others = tensors
        assert x is not None and first is not None and second is not None
        pair = None if weight_z1 is None and weight_z2 is None else (weight_z1, weight_z2)
        return mi.interaction(x, (first, second), weight, pair, *others)


ROWS = Triple("rows", ((20, 9), (20, 7), (20, 6)))
TOKENS = Triple("tokens", ((3, 11, 9), (3, 1, 7), (6,)))
TRIAFFINE = Triple("triaffine", ((2, 1, 1, 5, 9), (2, 1, 6, 1, 7), (2, 7, 1, 1, 8)), 2, "")
TINY = Triple("tiny", ((2, 3, 3), (2, 1, 2), (3, 2)), 2)


def triples() -> Iterator[Triple]:
    """Leading dimensions of every kind, terms, layouts, and sizes that are edges."""
    yield from (ROWS, TOKENS, TRIAFFINE)
    for layout in LAYOUTS[1:]:
        yield replace(TOKENS, layout=layout)
    for terms in ("", "1", "2", "V", "c"):
        yield replace(ROWS, terms=terms)
    yield replace(TOKENS, terms="2")
    yield Triple("one-of-each", ((9,), (7,), (6,)))
    yield Triple("one-input", ((9,), (15, 7), (15, 6)))
    yield Triple("one-first", ((15, 9), (7,), (15, 6)))
    yield Triple("all-pairs", ((5, 1, 9), (4, 7), (6,)))
    yield Triple("every-other", ((2, 1, 6, 9), (2, 4, 1, 7), (4, 6, 6)))
    yield Triple("no-rows", ((0, 9), (0, 7), (0, 6)))
    yield Triple("no-first", ((4, 9), (4, 0), (4, 6)))
    yield Triple("no-second", ((4, 9), (4, 7), (4, 0)))
    yield Triple("no-input", ((4, 0), (4, 7), (4, 6)))
    yield Triple("no-output", ((4, 9), (4, 7), (4, 6)), 0)
