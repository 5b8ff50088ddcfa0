"""Arguments of the dense interaction: the one generator that feeds tests and benchmarks.

A :class:`Shape` names sizes, a :class:`Sample` adds which terms there are, the memory layout and
how large their values are. ``samples()`` lists the cases that every implementation has to get right.

Over 400 lines, as the samples of modulation and of gates share the layouts and draws above them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..ops import activations
from .lru_cache import normal

NAMES = ("x", "z", "weight", "weight_z", "weight_x", "bias")
ALL_TERMS = (True, True, True, True)
WEIGHT_ONLY = (True, False, False, False)
LAYOUTS = ("contiguous", "transposed", "gaps", "offset", "expanded")
ORDERS = ("OZX", "OXZ", "ZOX", "ZXO", "XOZ", "XZO")  # of the axes of W in memory, the outermost first


@dataclass(frozen=True)
class Shape:
    """Sizes of an interaction; ``batch`` are the leading dims of x, and of z where it has none of its own."""

    name: str
    batch: tuple[int, ...]
    context: int  # Z
    width: int  # X
    out: int  # O
    context_batch: tuple[int, ...] | None = None

    @property
    def z_batch(self) -> tuple[int, ...]:
        return self.batch if self.context_batch is None else self.context_batch

    @property
    def lead(self) -> torch.Size:
        return torch.broadcast_shapes(self.batch, self.z_batch)

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of x, z, W, U, V and c."""
        o, i, j = self.out, self.context, self.width
        return (*self.batch, j), (*self.z_batch, i), (o, i, j), (o, i), (o, j), (o,)


@dataclass(frozen=True)
class Sample:
    """A shape with its terms (W, U, V, c), layout and magnitudes: everything but dtype, device and seed."""

    shape: Shape
    terms: tuple[bool, bool, bool, bool] = ALL_TERMS
    layout: str = "contiguous"
    magnitude: float = 1.0  # of x; z has its root, the weights keep the sums near their product
    order: str = "OZX"  # of the axes of W in memory; another one than OZX has no other layout

    def __str__(self) -> str:
        terms = "".join(letter for letter, there in zip("WUVc", self.terms, strict=True) if there)
        parts = [self.shape.name, "" if all(self.terms) else terms]
        parts += ["" if self.layout == "contiguous" else self.layout]
        parts += ["" if self.magnitude == 1 else f"{self.magnitude:g}"]
        parts += ["" if self.order == "OZX" else self.order]
        return "-".join(part for part in parts if part)

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """x, z, W, U, V and c, None for a term that is absent. The same numbers in every dtype, rounded."""
        i, j = self.shape.context, self.shape.width
        x_scale, z_scale = self.magnitude, math.sqrt(self.magnitude)
        # Every term of y has about the same size, so that an error in one is not drowned by another.
        scales = (x_scale, z_scale, *(max(terms, 1) ** -0.5 for terms in (i * j, i, j, 1)))
        present = (True, True, *self.terms)
        arguments: list[Tensor | None] = []
        # Drawn also where it is absent, so that the other tensors do not depend on the terms.
        values = normal(self.shape.sizes(), seed)
        for name, value, scale, there in zip(NAMES, values, scales, present, strict=True):
            if not there:
                arguments.append(None)
                continue
            tensor = lay_out(made(value * scale, dtype, device), self.layout, expand_dim=EXPANDED[name])
            if name == "weight" and self.order != "OZX":
                tensor = stored(tensor, self.order)
            arguments.append(tensor.requires_grad_(requires_grad))
        return tuple(arguments)

    def cotangent(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1, layout: str | None = None
    ) -> Tensor:
        """A gradient of y, of shape [..., O]. Only on request is it expanded, one column for all outputs:

        with expanded arguments all elements of a weight gradient would be the same number.
        """
        (values,) = normal([(*self.shape.lead, self.shape.out)], seed)
        layout = layout or ("contiguous" if self.layout == "expanded" else self.layout)
        return lay_out(made(values, dtype, device), layout, expand_dim=-1)


# The dimension along which the layout "expanded" repeats one slice, a different one for each operand.
EXPANDED = {"x": -1, "z": 0, "weight": 0, "weight_z": -1, "weight_x": 0, "bias": 0}


def made(values: Tensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A rounded copy. Moved before it is laid out: a copy to another device closes gaps and offsets."""
    if not dtype.is_floating_point:
        values = (values * 3).round().abs()
    return values.to(dtype, copy=True).to(device)


def lay_out(tensor: Tensor, layout: str, expand_dim: int = 0) -> Tensor:
    """The same shape in another memory layout; the values are the same too, except when expanded.

    contiguous: as it comes. transposed: the last dimension has the largest stride. gaps: every second
    element of every dimension of a larger buffer, the rest of which is NaN. offset: contiguous, but one
    element after the start of its buffer. expanded: stride 0 along ``expand_dim``.
    """
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        order = list(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "gaps":
        filling = math.nan if tensor.is_floating_point() else 99
        buffer = tensor.new_full([2 * size for size in tensor.shape], filling)
        view = buffer[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "offset":
        buffer = tensor.new_empty(tensor.numel() + 1)
        return buffer[1:].view(tensor.shape).copy_(tensor)
    if layout == "expanded":
        if tensor.shape[expand_dim] == 0:
            return tensor
        return tensor.narrow(expand_dim, 0, 1).expand(tensor.shape)
    raise ValueError(f"lay_out: layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


def stored(weight: Tensor, order: str) -> Tensor:
    """W [O, Z, X] with its axes in memory in another order, as a view of the buffer in that order."""
    back = [order.index(axis) for axis in "OZX"]
    return weight.permute(["OZX".index(axis) for axis in order]).contiguous().permute(back)


ODD = Shape("odd", (5,), 3, 7, 11)
MIDDLE = Shape("middle", (6, 5), 9, 17, 13)
# Enough operations for several threads, and a sum of length 5200.
THREADED = Shape("threaded", (37,), 40, 130, 70)

ORDINARY = (
    Shape("one", (1,), 1, 1, 1),
    ODD,
    MIDDLE,
    THREADED,
    Shape("prime", (13,), 17, 19, 23),
    Shape("powers", (64,), 16, 32, 24),
    Shape("past-powers", (33,), 9, 65, 17),
    Shape("long-context", (4,), 70, 3, 5),
    Shape("long-input", (3,), 2, 300, 6),
    Shape("both-long", (5,), 300, 70, 3),
    Shape("one-output", (19,), 8, 16, 1),
    Shape("one-feature", (9,), 1, 1, 40),
    Shape("one-row", (1,), 20, 33, 40),
    Shape("few-rows", (3,), 32, 64, 16),
    Shape("sum-of-rows", (1000,), 3, 5, 50),
    Shape("sum-of-input", (50,), 3, 1500, 20),
    Shape("sum-of-context", (50,), 1500, 3, 20),
)
BROADCAST = (
    Shape("1d", (), 4, 6, 5),
    Shape("1d-x", (), 4, 6, 5, context_batch=(3,)),
    Shape("1d-z", (3, 2), 4, 6, 5, context_batch=()),
    Shape("outer", (4, 1), 3, 5, 7, context_batch=(1, 6)),
    Shape("shared-context", (3, 8), 5, 6, 4, context_batch=(3, 1)),
    Shape("more-dims", (3, 1, 2), 4, 3, 5, context_batch=(5, 1)),
    Shape("long-sequences", (16, 19), 64, 16, 3, context_batch=(16, 1)),
    Shape("one-sequence", (6, 16), 8, 5, 64, context_batch=(16,)),
)
EMPTY = (
    Shape("no-rows", (0,), 3, 4, 5),
    Shape("no-rows-3d", (2, 0, 3), 3, 4, 5),
    Shape("no-rows-broadcast", (0, 1), 3, 4, 5, context_batch=(1, 2)),
    Shape("no-context", (4,), 0, 3, 5),
    Shape("no-input", (4,), 3, 0, 5),
    Shape("no-features", (4,), 0, 0, 5),
    Shape("no-output", (4,), 3, 5, 0),
    Shape("nothing", (0,), 0, 0, 0),
)


def term_subsets() -> tuple[tuple[bool, bool, bool, bool], ...]:
    """The 15 choices of W, U, V and c that leave at least one."""
    choice = (True, False)
    return tuple(terms for terms in product(choice, choice, choice, choice) if any(terms))


def samples() -> Iterator[Sample]:
    """Every case of sizes, terms, layouts and magnitudes that values and gradients are tested on."""
    for shape in (*ORDINARY, *BROADCAST, *EMPTY):
        yield Sample(shape)
        yield Sample(shape, WEIGHT_ONLY)
    for terms in term_subsets():
        if terms not in (ALL_TERMS, WEIGHT_ONLY):
            yield Sample(ODD, terms)
            yield Sample(EMPTY[3], terms)
    for layout in LAYOUTS[1:]:
        yield Sample(MIDDLE, layout=layout)
        yield Sample(THREADED, WEIGHT_ONLY, layout)
        yield Sample(BROADCAST[3], layout=layout)
    for magnitude in (100.0, 0.01):
        yield Sample(MIDDLE, magnitude=magnitude)
        yield Sample(THREADED, magnitude=magnitude)


def ordered_samples() -> Iterator[Sample]:
    """The cases of `samples` with the axes of W in every other order."""
    long_context, one_output, few_rows = ORDINARY[7], ORDINARY[10], ORDINARY[13]
    for order in ORDERS[1:]:
        for shape in (MIDDLE, THREADED, long_context, one_output, few_rows, EMPTY[0]):
            yield Sample(shape, order=order)
        yield Sample(ODD, WEIGHT_ONLY, order=order)


@dataclass(frozen=True)
class Modulation:
    """Arguments of modulation: everything but dtype, device and seed."""

    name: str
    x: tuple[int, ...]
    scale: tuple[int, ...]
    shift: tuple[int, ...] | None = None
    layout: str = "contiguous"
    activation: str = "sigmoid"
    scale_offset: float = 0.5
    scale_factor: float = 1.0

    def __str__(self) -> str:
        parts = [self.name, "" if self.layout == "contiguous" else self.layout]
        parts += ["" if self.activation == "sigmoid" else self.activation]
        parts += ["" if self.scale_factor == 1 else f"times{self.scale_factor}"]
        return "-".join(part for part in parts if part)

    @property
    def options(self) -> dict[str, Any]:
        numbers = {"scale_offset": self.scale_offset, "scale_factor": self.scale_factor}
        return {"activation": self.activation, **numbers}

    @property
    def shape(self) -> torch.Size:
        return torch.broadcast_shapes(self.x, self.scale, *(() if self.shift is None else (self.shift,)))

    def _lay_out(self, tensor: Tensor, layout: str, expand_dim: int) -> Tensor:
        if layout == "channels_last":
            return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        return lay_out(tensor, layout, expand_dim=expand_dim)

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, scale and shift or None. The same numbers in every dtype, rounded."""
        there = [sizes for sizes in (self.x, self.scale, self.shift) if sizes is not None]
        tensors: list[Any] = []
        for values, dim in zip(normal(there, seed), (0, -1, -1), strict=False):
            tensor = self._lay_out(made(values, dtype, device), self.layout, dim)
            tensors.append(tensor.requires_grad_(requires_grad))
        return tensors[0], tensors[1], None if self.shift is None else tensors[2]

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        (values,) = normal([tuple(self.shape)], seed)
        layout = "contiguous" if self.layout == "expanded" else self.layout
        return self._lay_out(made(values, dtype, device), layout, 0)


TOKENS = Modulation("tokens", (3, 19, 40), (3, 1, 40), (3, 1, 40))
MAPS = Modulation("maps", (2, 5, 6, 7), (2, 5, 1, 1), (2, 5, 1, 1))


def modulations() -> Iterator[Modulation]:
    """Every pattern of broadcasting, layout and emptiness that modulation is tested on."""
    plain = (
        TOKENS,
        MAPS,
        Modulation("one", (1,), (1,), (1,)),
        Modulation("elementwise", (7, 33), (7, 33), (7, 33)),
        Modulation("no-shift", (4, 5, 17), (4, 1, 17)),
        Modulation("one-scale", (31, 9), (1,), (1, 1)),
        Modulation("features", (50, 24), (24,), (24,)),
        Modulation("rows", (60, 33), (60, 1), (60, 1)),
        Modulation("different", (3, 6, 20), (3, 1, 20), (20,)),
        Modulation("scale-full", (3, 6, 20), (3, 6, 20), (3, 1, 20)),
        Modulation("shift-full", (3, 6, 20), (3, 1, 1), (3, 6, 20)),
        Modulation("batch-norm", (6, 4, 5, 3), (1, 4, 1, 1), (1, 4, 1, 1)),
        Modulation("alternating", (3, 4, 5, 2, 6), (3, 1, 5, 1, 6), (3, 1, 5, 1, 6)),
        Modulation("x-broadcasts", (5, 1, 8), (5, 4, 8), (4, 1)),
        Modulation("x-smaller", (8,), (3, 8), (3, 1)),
        Modulation("long-rows", (3, 5000), (3, 1), (3, 1)),
        Modulation("long-features", (3, 5000), (5000,), (5000,)),
        Modulation("many-rows", (3000, 16), (16,), (16,)),
        Modulation("threaded", (4, 300, 130), (4, 1, 130), (4, 1, 130)),
        Modulation("threaded-maps", (4, 16, 40, 50), (4, 16, 1, 1), (4, 16, 1, 1)),
    )
    yield from plain
    for sizes in ((0, 3), (3, 0), (0, 0)):
        yield Modulation("empty", sizes, (1, sizes[1]), (sizes[1],))
        yield Modulation("empty-rows", sizes, (sizes[0], 1))
    for layout in LAYOUTS[1:]:
        yield from (replace(sample, layout=layout) for sample in (TOKENS, MAPS, plain[3], plain[8]))
    for sample in (MAPS, plain[11], plain[19]):
        yield replace(sample, layout="channels_last")
    for sample in (TOKENS, plain[3], plain[7]):  # PPNet's gates around 1
        yield replace(sample, scale_offset=0.0, scale_factor=2.0)


@dataclass(frozen=True)
class GateSample:
    """Arguments of a gated form: ``diagonal`` (terms A, a, C, c, G) or ``gated_interaction`` (W, U, V, c)."""

    op: str
    shape: Shape  # with as many outputs as inputs
    terms: str
    layout: str = "contiguous"
    activation: str = "sigmoid"
    scale_offset: float = 0.5
    order: str = "OZX"  # of the axes of W in memory, as in a Sample

    def __str__(self) -> str:
        parts = [self.op, self.shape.name, self.terms]
        parts += ["" if self.layout == "contiguous" else self.layout]
        parts += ["" if self.activation == "sigmoid" else self.activation]
        parts += ["" if self.order == "OZX" else self.order]
        return "-".join(part for part in parts if part)

    @property
    def options(self) -> dict[str, Any]:
        if self.op == "diagonal":
            return {"activation": self.activation, "scale_offset": self.scale_offset}
        return {"activation": self.activation}

    @property
    def offset(self) -> float:
        return self.scale_offset if self.op == "diagonal" else 0.0

    def _weights(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        x, z = self.shape.width, self.shape.context
        if self.op == "diagonal":
            letters = {"A": ("weight", (x, z)), "a": ("bias", (x,)), "C": ("shift_weight", (x, z))}
            return letters | {"c": ("shift_bias", (x,)), "G": ("weight_x", (x, x))}
        letters = {"W": ("weight", (x, z, x)), "U": ("weight_z", (x, z)), "V": ("weight_x", (x, x))}
        return letters | {"c": ("bias", (x,))}

    @property
    def names(self) -> tuple[str, ...]:
        return ("x", "z", *(name for name, _ in self._weights().values()))

    def arguments(
        self,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """x, z and the weights in the order of ``names``, None where the term is absent."""
        sizes = self.shape.sizes()
        drawn = [("", sizes[0], 1.0, -1), ("", sizes[1], 1.0, 0)]
        for letter, (_, size) in self._weights().items():
            drawn.append((letter, size, max(math.prod(size[1:]), 1) ** -0.5, 0))
        tensors: list[Tensor | None] = []
        values = normal([size for _, size, _, _ in drawn], seed)
        for value, (letter, _, scale, dim) in zip(values, drawn, strict=True):
            if letter not in self.terms:
                tensors.append(None)
                continue
            tensor = lay_out(made(value * scale, dtype, device), self.layout, expand_dim=dim)
            if letter == "W" and self.order != "OZX":
                tensor = stored(tensor, self.order)
            tensors.append(tensor.requires_grad_(requires_grad))
        return tuple(tensors)

    def cotangent(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1) -> Tensor:
        (values,) = normal([(*self.shape.lead, self.shape.width)], seed)
        layout = "contiguous" if self.layout == "expanded" else self.layout
        return lay_out(made(values, dtype, device), layout)


def _square(shape: Shape) -> Shape:
    return replace(shape, out=shape.width)


# Terms of each gated form: all; those without a product of x; the two whose second derivatives say most.
GATE_TERMS = {"diagonal": "AaCcG", "gated_interaction": "WUVc"}
GATE_LINEAR = {"diagonal": "AaCc", "gated_interaction": "UVc"}
GATE_PAIR = {"diagonal": "AC", "gated_interaction": "WU"}
_GATE_CHOICES = {
    "diagonal": ("A", "Aa", "AaCc", "AC", "Ac", "AG"),
    "gated_interaction": ("W", "U", "V", "c", "UVc", "WU"),
}
GATE_ODD, GATE_MIDDLE, GATE_THREADED = (_square(shape) for shape in (ODD, MIDDLE, THREADED))
GATE_TALL = Shape("tall", (310,), 70, 101, 101)  # rows enough for the outputs to be in the vector lanes


def gates(op: str) -> Iterator[GateSample]:
    """Every case of sizes, terms and layouts that a gated form is tested on."""
    every = GATE_TERMS[op]
    shapes = [shape for shape in (*ORDINARY, *BROADCAST, *EMPTY) if shape.width <= 300]
    for shape in dict.fromkeys(_square(shape) for shape in shapes):
        yield GateSample(op, shape, every)
    for terms in _GATE_CHOICES[op]:
        for shape in (GATE_ODD, GATE_THREADED, GATE_TALL, _square(EMPTY[3]), _square(BROADCAST[4])):
            yield GateSample(op, shape, terms)
    for layout in LAYOUTS[1:]:
        yield GateSample(op, GATE_MIDDLE, every, layout)
        yield GateSample(op, GATE_THREADED, every[:4], layout)
        yield GateSample(op, GATE_TALL, GATE_LINEAR[op], layout)
    for activation in activations.NAMES:
        if activation != "sigmoid":
            yield GateSample(op, GATE_THREADED, every, activation=activation)
    yield GateSample(op, _square(ORDINARY[11]), every[:4], activation="softmax")
