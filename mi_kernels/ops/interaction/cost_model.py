"""Shared contexts: the costs of the plans of a dense interaction, and the choice between them.

The leading dimensions of x and z are of three kinds: those of both (C elements in all), those of z alone (S)
and those of x alone (T). There are B = C S T rows, and three plans:

    fused      every row with its own context                                   2 B Z X O operations
    per_z      W'[c,s] = z[c,s] W + V, applied to the T rows of x               2 C S Z X O + 2 B X O
    per_x      the same with x and z, U and V exchanged                       2 C T Z X O + 2 B Z O

The choice is a pure function of sizes, dtype, backend and wanted gradients. Costs are integers, because sizes
may be symbolic under torch.compile: a comparison of costs then becomes a guard. torch.export has no guards:
an exported graph keeps the plan of the example's sizes, which gives the same results at all other sizes.
"""

import functools
from typing import NamedTuple

import torch

from .. import backend as backends
from ..plan import Cost

FUSED, PER_Z, PER_X = "fused", "per_z", "per_x"


class Rates(NamedTuple):
    """Femtoseconds with all threads; only their ratios matter."""

    operation: int  # in float32; other dtypes by _SPEED
    byte: int  # of a large tensor, read or written once
    call: int  # of one primitive, differentiable


# Two cores of a Zen 4 processor with AVX-512, rounded: products of 17 GFLOP ran at 204 GFLOP/s in float32 and
# 417 in bfloat16; 16.7 MB of W' were written in 2.8 ms and read back in 1.3 ms; a call took about 10 us.
# The GPU figures are estimates from data sheets.
_RATES = {
    "cpu": Rates(operation=5_000, byte=100_000, call=10**10),
    "cuda": Rates(operation=30, byte=1_000, call=2 * 10**10),
}
# Time of an operation, in tenths of that of float32.
_SPEED = {torch.float64: 20, torch.bfloat16: 5, torch.float16: 10}


class Sizes(NamedTuple):
    """The sizes of a call; ``common``, ``of_z`` and ``of_x`` are C, S and T."""

    common: int
    of_z: int
    of_x: int
    context: int  # Z
    width: int  # X
    out: int  # O

    @property
    def rows(self) -> int:
        return self.common * self.of_z * self.of_x

    def mirrored(self) -> "Sizes":
        """The sizes with x and z exchanged."""
        return Sizes(self.common, self.of_x, self.of_z, self.width, self.context, self.out)


class Wanted(NamedTuple):
    """The gradients that a call will need; ``weights`` is that of W."""

    x: bool = False
    z: bool = False
    weights: bool = False
    weight_z: bool = False
    weight_x: bool = False

    def mirrored(self) -> "Wanted":
        return Wanted(self.z, self.x, self.weights, self.weight_x, self.weight_z)


def fused(sizes: Sizes, wanted: Wanted, dtype: torch.dtype, backend: str, device: str) -> Cost:
    """At most three contractions; x and z are copied to all rows where no view can broadcast them."""
    passes = 1 + (wanted.x or wanted.z) + wanted.weights
    operations = 2 * sizes.rows * sizes.out * sizes.context * sizes.width * passes
    elements = passes * sizes.out * sizes.context * sizes.width
    if sizes.common * sizes.of_z > 1:
        elements += (2 + wanted.z) * sizes.rows * sizes.context
    if sizes.of_z > 1:
        elements += (2 + wanted.x) * sizes.rows * sizes.width
    if not backends.get(backend).fused:  # z x is written and read
        elements += 2 * passes * sizes.rows * sizes.context * sizes.width
    return cost_of(FUSED, operations, elements, passes, dtype, device)


def shared(
    plan: str,
    sizes: Sizes,
    wanted: Wanted,
    dtype: torch.dtype,
    backend: str,
    device: str,
    products: int = 1,
) -> Cost | None:
    """Generate, then apply in ``products`` products; None if nothing is shared or W' is too large.

    W' has C S O X elements. The plan is allowed only if that is at most B Z X, B O X and B O Z elements, the
    sizes of what it replaces, or at most the size of W; likewise for the gradient of z per output, C S O Z
    elements. Equality is allowed: with X = T Z, the plan saves operations of the fused one and needs no more
    memory than einsum's B O Z elements (Z = 4, X = 256, T = 64: 1.4 to 1.9 times the speed).
    """
    if plan == PER_X:
        sizes, wanted = sizes.mirrored(), wanted.mirrored()
    common, of_z, of_x, context, width, out = sizes
    if of_x <= 1 or out == 0 or context == 0 or width == 0 or common * of_z == 0:
        return None
    contexts, rows = common * of_z, sizes.rows
    weight_elements = contexts * out * width  # of W'
    small = contexts <= context or (width <= of_x * context and out <= of_x * context)
    if not small or (wanted.z and contexts > width and max(out, context) > of_x * width):
        return None
    generated = wanted.z or wanted.weights or wanted.weight_x  # the gradient of W'
    generate = 1 + wanted.z + wanted.weights
    apply = 1 + wanted.x + generated
    operations = 2 * out * width * (contexts * context * generate + rows * apply)
    elements = weight_elements * (2 + wanted.x + generated * (1 + wanted.z + wanted.weights))
    elements += generate * out * context * width
    if wanted.z:
        elements += 2 * contexts * out * context
    if of_z > 1:  # the outputs of all contexts are columns of one product, which are permuted
        elements += 2 * rows * out * (1 + (wanted.x or generated))
    if not backends.get(backend).fused:
        elements += rows * out
    return cost_of(plan, operations, elements, 2 * (generate + apply * products), dtype, device)


def cost_of(plan: str, operations: int, elements: int, calls: int, dtype: torch.dtype, device: str) -> Cost:
    rates = _RATES.get(device, _RATES["cuda"])
    moved = elements * dtype.itemsize
    time = operations * (rates.operation * _SPEED.get(dtype, 10) // 10) + moved * rates.byte
    return Cost(plan, operations, moved, time + calls * rates.call)


def padding(width: int, out: int, dtype: torch.dtype, device: str) -> int:
    """The number of padded rows that costs as much as one more product with W' [O, X], in every pass."""
    row = cost_of(PER_Z, 2 * width * out, width + out, 0, dtype, device).femtoseconds
    return cost_of(PER_Z, 0, 0, 2, dtype, device).femtoseconds // max(row, 1)


def all_costs(
    sizes: Sizes, wanted: Wanted, dtype: torch.dtype, backend: str, device: str, products: int = 1
) -> tuple[Cost, ...]:
    """The costs of all possible plans, the fused plan first. Those of plain numbers are remembered."""
    plain = all(type(size) is int for size in sizes)
    return (_remembered if plain else _all_costs)(sizes, wanted, dtype, backend, device, products)


def _all_costs(
    sizes: Sizes, wanted: Wanted, dtype: torch.dtype, backend: str, device: str, products: int
) -> tuple[Cost, ...]:
    costs = [fused(sizes, wanted, dtype, backend, device)]
    for plan in (PER_Z, PER_X):
        cost = shared(plan, sizes, wanted, dtype, backend, device, products)
        if cost is not None:
            costs.append(cost)
    return tuple(costs)


_remembered = functools.lru_cache(1024)(_all_costs)


def cheapest(costs: tuple[Cost, ...]) -> Cost:
    """The first plan of least time; min() cannot be traced with symbolic sizes."""
    best, *others = costs
    for cost in others:
        if cost.femtoseconds < best.femtoseconds:
            best = cost
    return best
