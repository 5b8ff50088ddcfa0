"""Arguments of the biaffine form: the part of samples.py for that."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .lru_cache import normal
from .samples import LAYOUTS, lay_out, made


@dataclass(frozen=True)
class Pairs:
    """A biaffine form of two sequences: everything but dtype, device and seed."""

    name: str
    first: tuple[int, ...]  # [..., L1, I1]
    second: tuple[int, ...]  # [..., L2, I2]
    out: int = 3
    ones: tuple[bool, bool] = (True, True)
    bias: tuple[int, ...] | None = None
    channels_first: bool = False
    layout: str = "contiguous"

    def __str__(self) -> str:
        ones = "".join(str(int(one)) for one in self.ones)
        parts = [self.name, ones, "bias" if self.bias is not None else "", "cf" * self.channels_first]
        return "-".join(part for part in (*parts, self.layout.replace("contiguous", "")) if part)

    @property
    def options(self) -> dict[str, Any]:
        return {"ones": self.ones, "channels_first": self.channels_first}

    @property
    def shape(self) -> torch.Size:
        """Of y."""
        lead = torch.broadcast_shapes(self.first[:-2], self.second[:-2])
        pairs = self.first[-2], self.second[-2]
        return torch.Size((*lead, self.out, *pairs) if self.channels_first else (*lead, *pairs, self.out))

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """input1, input2, weight and bias or None. The same numbers in every dtype, rounded."""
        rows, columns = self.first[-1] + self.ones[0], self.second[-1] + self.ones[1]
        there = [self.first, self.second, (self.out, rows, columns)]
        scales = 1.0, 1.0, max(rows * columns, 1) ** -0.5, 1.0  # for scores of variance 1
        tensors: list[Tensor | None] = []
        drawn = normal(there + ([] if self.bias is None else [self.bias]), seed)
        for values, scale in zip(drawn, scales, strict=False):
            tensor = lay_out(made(values * scale, dtype, device), self.layout)
            tensors.append(tensor.requires_grad_(requires_grad))
        return (*tensors, None) if self.bias is None else tuple(tensors)

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        (values,) = normal([tuple(self.shape)], seed)
        layout = "contiguous" if self.layout == "expanded" else self.layout
        return lay_out(made(values, dtype, device), layout)


ARC = Pairs("arc", (2, 19, 21), (2, 19, 21), 1, (True, False))
LABEL = Pairs("label", (2, 19, 17), (2, 23, 18), 5)


def pairs() -> Iterator[Pairs]:
    """Every combination of ones, bias and order, of leading dimensions, layouts, and sizes that are edges."""
    for one1, one2, bias, channels_first in product(
        (False, True), (False, True), (None, (5,), ()), (False, True)
    ):
        ones = one1, one2
        yield Pairs("label", (2, 19, 17), (2, 23, 18), 5, ones, bias, channels_first)
        yield Pairs("arc", (2, 19, 21), (2, 23, 20), 1, ones, bias and (1,), channels_first)
    for channels_first in (False, True):
        how: dict[str, Any] = {"bias": (3,), "channels_first": channels_first}
        yield Pairs("one-sample", (40, 9), (33, 11), **how)
        yield Pairs("many-short", (40, 5, 9), (40, 4, 11), **how)
        yield Pairs("broadcast", (3, 1, 7, 9), (4, 8, 11), **how)
        yield Pairs("first-shared", (1, 7, 9), (4, 8, 11), **how)
        yield Pairs("short-first", (2, 2, 30), (2, 70, 31), 1, channels_first=channels_first)
        yield Pairs("short-second", (2, 70, 31), (2, 2, 30), 1, channels_first=channels_first)
        yield Pairs("one-feature", (2, 7, 1), (2, 8, 1), **how)
        yield Pairs("blocks", (3, 90, 70), (3, 100, 90), 7, bias=(7,), channels_first=channels_first)
        yield Pairs("long-sum", (1, 10, 300), (1, 11, 520), 2, bias=(2,), channels_first=channels_first)
        yield Pairs("no-samples", (0, 7, 9), (0, 8, 11), **how)
        yield Pairs("no-first", (2, 0, 9), (2, 8, 11), **how)
        yield Pairs("no-second", (2, 7, 9), (2, 0, 11), **how)
        yield Pairs("no-features", (2, 7, 0), (2, 8, 0), **how)
        yield Pairs("no-features-without-ones", (2, 7, 0), (2, 8, 4), ones=(False, True), **how)
        yield Pairs("no-output", (2, 7, 9), (2, 8, 11), 0, channels_first=channels_first)
        for layout in LAYOUTS[1:]:
            yield Pairs("label", (2, 19, 17), (2, 23, 18), 5, channels_first=channels_first, layout=layout)
            yield Pairs("arc", (2, 19, 21), (2, 23, 20), 1, (True, False), layout=layout)
