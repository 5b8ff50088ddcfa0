"""Arguments of gated linear units and of low-rank interactions: the part of samples.py for those."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mi_kernels.ops import activations
from mi_kernels.testing.lru_cache import normal
from mi_kernels.testing.samples import LAYOUTS, lay_out, made

# Of the weights alone. halves: one above the other in one tensor. columns: of a wider tensor, the rest of which
# is NaN. transposed weights: contiguous along the outputs.
WEIGHT_LAYOUTS = ("halves", "columns", "transposed weights")


@dataclass(frozen=True)
class GLUSample:
    """Arguments of a gated linear unit: everything but dtype, device and seed."""

    name: str
    lead: tuple[int, ...]
    width: int  # X
    hidden: int  # H
    bias: bool = True
    packed: bool = True
    gate_first: bool = True
    layout: str = "contiguous"
    activation: str = "silu"

    def __str__(self) -> str:
        parts = [self.name, "" if self.packed else "separate", "" if self.bias else "no bias"]
        parts += ["" if self.gate_first else "value first", self.layout.replace("contiguous", "")]
        parts += [self.activation if self.activation != "silu" else ""]
        return "-".join(part.replace(" ", "_") for part in parts if part)

    @property
    def options(self) -> dict[str, Any]:
        return {"activation": self.activation, "gate_first": self.gate_first}

    @property
    def shape(self) -> torch.Size:
        """Of y."""
        return torch.Size((*self.lead, self.hidden))

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """x, weight, bias, weight_value and bias_value or None. The same numbers in every dtype, rounded."""
        x, h = self.width, self.hidden
        drawn = normal([(*self.lead, x), (2 * h, x), (2 * h,)], seed)
        values, both, biases = (made(v, dtype, device) for v in (drawn[0], drawn[1] * _scale(x), drawn[2]))
        parts = [both] if self.packed else [both[:h], both[h:]]
        weights = weights_laid_out(parts, self.layout)
        rows = laid_out(values, self.layout, -1)
        of_bias = [laid_out(b, self.layout, 0) for b in ([biases] if self.packed else biases.split(h))]
        found: list[Tensor | None] = [rows, None, None, None, None]
        found[1::2] = [*weights, None][:2]
        if self.bias:
            found[2::2] = [*of_bias, None][:2]
        return tuple(t if t is None else t.requires_grad_(requires_grad) for t in found)

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        return _cotangent(self.shape, self.layout, dtype, device, seed)


@dataclass(frozen=True)
class LowRankSample:
    """Arguments of a low-rank interaction: everything but dtype, device and seed."""

    name: str
    lead: tuple[int, ...]  # of x
    width: int  # X
    context: int  # Z
    rank: int  # R
    out: int | None = None  # O; None: no P
    terms: int | None = None  # S; None: factors of two dimensions
    linear: str = ""  # of U, V and c, those that there are
    context_lead: tuple[int, ...] | None = None
    layout: str = "contiguous"
    activation_x: str = "identity"
    activation_z: str = "identity"

    def __str__(self) -> str:
        parts = [self.name, "" if self.out is None else "P", "" if self.terms is None else f"S{self.terms}"]
        parts += [self.linear, self.layout.replace("contiguous", "").replace(" ", "_")]
        parts += [f.replace("identity", "") for f in (self.activation_x, self.activation_z)]
        return "-".join(part for part in parts if part)

    @property
    def options(self) -> dict[str, Any]:
        return {"activation_x": self.activation_x, "activation_z": self.activation_z}

    @property
    def z_lead(self) -> tuple[int, ...]:
        return self.lead if self.context_lead is None else self.context_lead

    @property
    def outputs(self) -> int:
        return self.rank if self.out is None else self.out

    @property
    def shape(self) -> torch.Size:
        """Of y."""
        return torch.Size((*torch.broadcast_shapes(self.lead, self.z_lead), self.outputs))

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """x, z, A, C, P, U, V and c or None. The same numbers in every dtype, rounded."""
        x, z, o = self.width, self.context, self.outputs
        of_terms = () if self.terms is None else (self.terms,)
        factors = (*of_terms, self.rank, x), (*of_terms, self.rank, z)
        sizes = [(*self.lead, x), (*self.z_lead, z), *factors, (o, self.rank), (o, z), (o, x), (o,)]
        sums = [1, 1, x, z, self.rank * (self.terms or 1), z, x, 1]
        values = normal(sizes, seed)
        tensors = [made(v * _scale(n), dtype, device) for v, n in zip(values, sums, strict=True)]
        found: list[Tensor | None] = [
            *(laid_out(t, self.layout, dim) for t, dim in zip(tensors[:2], (-1, 0), strict=True)),
            *weights_laid_out(tensors[2:4], self.layout),
            *(laid_out(t, self.layout, 0) for t in tensors[4:]),
        ]
        there = self.out is not None, *(letter in self.linear for letter in "UVc")
        found[4:] = [t if kept else None for t, kept in zip(found[4:], there, strict=True)]
        return tuple(t if t is None else t.requires_grad_(requires_grad) for t in found)

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        return _cotangent(self.shape, self.layout, dtype, device, seed)


def _scale(terms: int) -> float:
    """That of a weight whose sums of so many terms have variance 1."""
    return max(terms, 1) ** -0.5


def _cotangent(shape: torch.Size, layout: str, dtype: torch.dtype, device: Any, seed: int) -> Tensor:
    (values,) = normal([tuple(shape)], seed)
    return laid_out(made(values, dtype, device), layout.replace("expanded", "contiguous"), 0)


def laid_out(tensor: Tensor, layout: str, expand_dim: int) -> Tensor:
    """What is no factor of the two products."""
    return lay_out(tensor, "contiguous" if layout in WEIGHT_LAYOUTS else layout, expand_dim=expand_dim)


def weights_laid_out(weights: Sequence[Tensor], layout: str) -> list[Tensor]:
    """The weights of the two products, or the packed one."""
    if layout == "halves":  # of as many columns as the wider one has
        most = max(t.shape[-1] for t in weights)
        padded = [torch.nn.functional.pad(t, (0, most - t.shape[-1]), value=math.nan) for t in weights]
        halves = torch.cat(padded).split([len(t) for t in weights])
        return [t[..., : own.shape[-1]] for t, own in zip(halves, weights, strict=True)]
    if layout == "columns":
        return [
            torch.nn.functional.pad(t, (2, 3), value=math.nan)[..., 2 : 2 + t.shape[-1]] for t in weights
        ]
    if layout == "transposed weights":
        return [t.mT.contiguous().mT for t in weights]
    return [lay_out(t, layout) for t in weights]


# Few rows; too few rows to pack the weights, and enough of them; outputs that leave lanes empty.
GLU_ODD = GLUSample("odd", (5,), 7, 11)
GLU_MIDDLE = GLUSample("middle", (6, 5), 17, 13)
GLU_THREADED = GLUSample("threaded", (37,), 130, 70)
GLU_TALL = GLUSample("tall", (310,), 70, 101)
_GLU_PLAIN = (
    *(GLUSample("one", (1,), 1, 1), GLU_ODD, GLU_MIDDLE, GLU_THREADED, GLU_TALL),
    GLUSample("past-powers", (65,), 33, 17),
    GLUSample("few-rows", (3,), 64, 32),
    GLUSample("one-row", (1,), 33, 40),
    GLUSample("1d", (), 6, 5),
    GLUSample("one-output", (70,), 16, 1),
    GLUSample("long-input", (9,), 1500, 20),
    GLUSample("several-blocks", (9000,), 3, 35),
    GLUSample("no-rows", (0,), 4, 5),
    GLUSample("no-rows-3d", (2, 0, 3), 4, 5),
    GLUSample("no-input", (4,), 0, 5),
    GLUSample("no-output", (4,), 3, 0),
    GLUSample("nothing", (0,), 0, 0),
)


def glus() -> Iterator[GLUSample]:
    """Every case of sizes, packing, layout and activation that gated linear units are tested on."""
    for sample in _GLU_PLAIN:
        yield sample
        yield replace(sample, packed=False, bias=False)
    for sample in (GLU_ODD, GLU_TALL):
        yield replace(sample, gate_first=False)
        yield replace(sample, bias=False)
        yield replace(sample, packed=False)
    for layout in (*LAYOUTS[1:], *WEIGHT_LAYOUTS):
        for sample in (GLU_MIDDLE, GLU_THREADED, GLU_TALL):
            yield replace(sample, packed=False, layout=layout)
        if layout != "halves":
            yield replace(GLU_MIDDLE, gate_first=False, layout=layout)
    yield replace(_GLU_PLAIN[10], packed=False, layout="transposed weights")  # a sum of several parts
    for activation in activations.NAMES:
        if activation != "silu":
            yield replace(GLU_THREADED, packed=False, activation=activation)
            yield replace(GLU_TALL, activation=activation)


LOW_RANK_ODD = LowRankSample("odd", (5,), 7, 3, 11, 4)
LOW_RANK_MIDDLE = LowRankSample("middle", (6, 5), 17, 9, 13, 8)
LOW_RANK_THREADED = LowRankSample("threaded", (37,), 130, 40, 70, 20)
LOW_RANK_TALL = LowRankSample("tall", (310,), 70, 60, 101, 33)
LOW_RANK_SHARED = LowRankSample("shared-context", (3, 8), 6, 5, 9, 4, context_lead=(3, 1))
_SHARED = (
    LOW_RANK_SHARED,
    LowRankSample("outer", (4, 1), 5, 3, 7, 6, context_lead=(1, 6)),
    LowRankSample("one-context", (30,), 9, 17, 13, 5, context_lead=(1,)),
    LowRankSample("1d-x", (), 6, 4, 5, 3, context_lead=(7,)),
    LowRankSample("more-dims", (3, 1, 2), 3, 4, 6, 5, context_lead=(5, 1)),
)
_LOW_RANK_PLAIN = (
    *(LowRankSample("one", (1,), 1, 1, 1, 1), LOW_RANK_ODD, LOW_RANK_MIDDLE),
    *(LOW_RANK_THREADED, LOW_RANK_TALL, *_SHARED),
    LowRankSample("few-rows", (3,), 64, 32, 48, 16),
    LowRankSample("1d", (), 6, 4, 5, 3),
    LowRankSample("one-rank", (70,), 16, 12, 1, 5),
    LowRankSample("no-rows", (0,), 4, 3, 5, 2),
    LowRankSample("no-rows-3d", (2, 0, 3), 4, 3, 5, 2),
    LowRankSample("no-rows-shared", (0, 1), 4, 3, 5, 2, context_lead=(1, 2)),
    LowRankSample("no-context", (4,), 3, 0, 5, 2),
    LowRankSample("no-input", (4,), 0, 3, 5, 2),
    LowRankSample("no-rank", (4,), 3, 2, 0, 5),
    LowRankSample("no-output", (4,), 3, 2, 5, 0),
    LowRankSample("nothing", (0,), 0, 0, 0, 0),
)


def low_ranks() -> Iterator[LowRankSample]:
    """Every case of sizes, terms, layouts, activations and sharing that low-rank interactions are tested on."""
    for sample in _LOW_RANK_PLAIN:
        yield replace(sample, linear="UVc")
        yield replace(sample, out=None)
        yield replace(sample, terms=3)
    for linear in ("U", "V", "c", "Uc", "Vc", "UV"):
        for sample in (LOW_RANK_ODD, replace(LOW_RANK_ODD, out=None), LOW_RANK_SHARED):
            yield replace(sample, linear=linear)
    yield LowRankSample("several-blocks", (4000,), 3, 4, 9, terms=8)
    for width, context in ((1500, 30), (30, 1500)):  # sums of several parts
        sample = LowRankSample(f"long-{width}", (50,), width, context, 32)
        yield replace(sample, layout="transposed weights")
        yield replace(sample, layout="transposed weights", terms=2)
    for layout in (*LAYOUTS[1:], *WEIGHT_LAYOUTS):
        for sample in (LOW_RANK_MIDDLE, LOW_RANK_THREADED, LOW_RANK_TALL, LOW_RANK_SHARED):
            yield replace(sample, layout=layout, linear="UVc")
        yield replace(LOW_RANK_TALL, layout=layout, terms=2)
    names = list(activations.ELEMENTWISE)
    for activation, other in zip(names, names[1:] + names[:1], strict=True):
        for sample in (LOW_RANK_THREADED, LOW_RANK_SHARED, replace(LOW_RANK_TALL, terms=2)):
            yield replace(sample, activation_x=activation, activation_z=other)
