"""Arguments of gated linear units and low-rank interactions: the part of samples.py for these."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import activations
from .lru_cache import normal
from .samples import (
    BROADCAST,
    EMPTY,
    LAYOUTS,
    MIDDLE,
    ODD,
    ORDINARY,
    THREADED,
    Shape,
    lay_out,
    made,
)


@dataclass(frozen=True)
class DualSample:
    """Arguments of ``glu`` (G, packed without V, a, c) or ``low_rank`` (A, C and some of P, U, V, c)."""

    op: str
    shape: Shape
    terms: str
    layout: str = "contiguous"
    activation: str = "sigmoid"  # of low_rank, f
    other: str = "identity"  # h
    gate_first: bool = True
    rank: int = 6  # rows of the factors
    ranks: int | None = None  # R of a sum over ranks, whose factors are [R, O, ...]

    def __str__(self) -> str:
        parts = [self.op, self.shape.name, self.terms, self.layout.replace("contiguous", "")]
        parts += ["" if self.activation == "sigmoid" else self.activation, self.other.replace("identity", "")]
        parts += [
            "" if self.gate_first else "value-first",
            "" if self.ranks is None else f"{self.ranks}-ranks",
        ]
        return "-".join(part for part in parts if part)

    @property
    def options(self) -> dict[str, Any]:
        if self.op == "glu":
            return {"activation": self.activation, "gate_first": self.gate_first}
        return {"activation_x": self.activation, "activation_z": self.other}

    @property
    def features(self) -> int:
        """The sizes of the product of both maps."""
        return self.rank if self.op == "low_rank" and "P" in self.terms else self.shape.out

    def _weights(self) -> dict[str, tuple[int, ...]]:
        """By letter, in the order of the arguments."""
        x, z, out = self.shape.width, self.shape.context, self.shape.out
        if self.op == "glu":
            rows = out if "V" in self.terms else 2 * out
            return {"G": (rows, x), "a": (rows,), "V": (out, x), "c": (out,)}
        lead = () if self.ranks is None else (self.ranks,)
        factors = {"A": (*lead, self.features, x), "C": (*lead, self.features, z)}
        return factors | {"P": (out, self.features), "U": (out, z), "V": (out, x), "c": (out,)}

    @property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        return self.shape.sizes()[: 1 if self.op == "glu" else 2]

    @property
    def lead(self) -> torch.Size:
        return torch.Size(self.shape.batch) if self.op == "glu" else self.shape.lead

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """The tensors by position (those of glu by `call_glu`), None where the term is absent."""
        drawn = [("", size, 1.0, -1) for size in self.inputs]
        for letter, size in self._weights().items():
            scale = 1.0 if len(size) == 1 else max(size[-1], 1) ** -0.5
            drawn.append((letter, size, scale, 0))
        tensors: list[Tensor | None] = []
        for value, (letter, _, scale, dim) in zip(normal([d[1] for d in drawn], seed), drawn, strict=True):
            if letter not in self.terms:
                tensors.append(None)
                continue
            tensor = lay_out(made(value * scale, dtype, device), self.layout, expand_dim=dim)
            tensors.append(tensor.requires_grad_(requires_grad))
        return tuple(tensors)

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        (values,) = normal([(*self.lead, self.shape.out)], seed)
        layout = "contiguous" if self.layout == "expanded" else self.layout
        return lay_out(made(values, dtype, device), layout)


GLU = DualSample("glu", ODD, "Ga")
LOW_RANK = DualSample("low_rank", ODD, "ACPUVc", activation="tanh")
MUTAN = DualSample("low_rank", MIDDLE, "ACP", activation="tanh", other="sigmoid", ranks=3)


def dual_samples(op: str) -> Iterator[DualSample]:
    """Every case of sizes, terms, activations and layouts that a function is tested on."""
    every = "Ga" if op == "glu" else "ACPUVc"
    for shape in (*ORDINARY, *BROADCAST, *EMPTY):
        if math.prod((shape.context, shape.width)) <= 30_000:
            yield DualSample(op, shape, every)
    if op == "glu":
        for terms in ("G", "GV", "GaVc", "GVc", "GaV"):
            yield from (DualSample(op, shape, terms) for shape in (ODD, THREADED, EMPTY[4]))
        yield from (DualSample(op, shape, "Ga", gate_first=False) for shape in (ODD, THREADED))
        names: tuple[str, ...] = activations.NAMES
    else:
        for terms in ("AC", "ACc", "ACUV", "ACP", "ACPU", "ACPV", "ACPc"):
            yield from (DualSample(op, shape, terms) for shape in (ODD, THREADED, BROADCAST[4], EMPTY[3]))
        for terms in ("AC", "ACPUVc"):
            for shape in (ODD, THREADED, BROADCAST[3], EMPTY[0]):
                yield DualSample(op, shape, terms, ranks=5)
        yield MUTAN
        names = tuple(activations.ELEMENTWISE)
        yield from (DualSample(op, MIDDLE, "AC", activation="identity", other=name) for name in names)
    for layout in LAYOUTS[1:]:
        yield DualSample(op, MIDDLE, every, layout)
        yield DualSample(op, THREADED, every, layout)
        if op == "low_rank":
            yield replace(MUTAN, layout=layout)
    for name in names:
        if name != "sigmoid":
            yield DualSample(op, MIDDLE, every, activation=name)
