"""Arguments of the dense interaction: the one generator that feeds tests and benchmarks.

A :class:`Shape` names sizes, a :class:`Sample` adds which terms there are, how the tensors lie in memory
and how large their values are. ``samples()`` lists the cases that every implementation has to get right.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

NAMES = ("x", "z", "weight", "weight_z", "weight_x", "bias")
ALL_TERMS = (True, True, True, True)
WEIGHT_ONLY = (True, False, False, False)
LAYOUTS = ("contiguous", "transposed", "gaps", "offset", "expanded")


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

    def __str__(self) -> str:
        terms = "".join(letter for letter, there in zip("WUVc", self.terms, strict=True) if there)
        parts = [self.shape.name, "" if all(self.terms) else terms]
        parts += ["" if self.layout == "contiguous" else self.layout]
        parts += ["" if self.magnitude == 1 else f"{self.magnitude:g}"]
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
        generator = torch.Generator().manual_seed(seed)
        arguments: list[Tensor | None] = []
        for name, sizes, scale, there in zip(NAMES, self.shape.sizes(), scales, present, strict=True):
            # Drawn also where it is absent, so that the other tensors do not depend on the terms.
            values = torch.randn(sizes, generator=generator, dtype=torch.float64) * scale
            tensor = lay_out(_round(values, dtype), self.layout, expand_dim=EXPANDED[name]).to(device)
            arguments.append(tensor.requires_grad_(requires_grad) if there else None)
        return tuple(arguments)

    def cotangent(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 1, layout: str | None = None
    ) -> Tensor:
        """A gradient of y, of shape [..., O]. Only on request is it expanded, one column for all outputs:

        with expanded arguments all elements of a weight gradient would be the same number.
        """
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn((*self.shape.lead, self.shape.out), generator=generator, dtype=torch.float64)
        layout = layout or ("contiguous" if self.layout == "expanded" else self.layout)
        return lay_out(_round(values, dtype), layout, expand_dim=-1).to(device)


# The dimension along which the layout "expanded" repeats one slice, a different one for each operand.
EXPANDED = {"x": -1, "z": 0, "weight": 0, "weight_z": -1, "weight_x": 0, "bias": 0}


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) if dtype.is_floating_point else (values * 3).round().abs().to(dtype)


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
