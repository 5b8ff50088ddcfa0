"""Operations and ideal bytes of each pass of the dense interaction, for rates and bounds.

Operations are multiplications and additions of the contractions (docs/mathematics.md): each contraction
of L(g, x, z, W) is one GEMM of 2 B Z X O, a term with U or V one of 2 B O Z or 2 B O X, a bias B O. dx and
dz are two reductions of one GEMM, counted once. Generating an operand (B Z X) is overhead of an algorithm and
not counted. Sharing contexts does not reduce the count: every row counts.

Bytes are ideal: each operand of the pass is read once, each result is written once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

ALL_TERMS = (True, True, True, True)  # W, U, V, c


class Shape(Protocol):
    """Sizes of a call."""

    @property
    def rows(self) -> int: ...  # B
    @property
    def context(self) -> int: ...  # Z
    @property
    def width(self) -> int: ...  # X
    @property
    def out(self) -> int: ...  # O
    def sizes(self) -> Sequence[tuple[int, ...]]: ...  # of x, z, W, U, V and c


@dataclass(frozen=True)
class Count:
    operations: int
    bytes: int


def forward(shape: Shape, dtype: torch.dtype, terms: tuple[bool, ...] = ALL_TERMS) -> Count:
    """y from x, z and the weights."""
    bias = shape.rows * shape.out if terms[3] else 0
    return Count(
        _contraction(shape, terms) + bias, _bytes(shape, dtype, terms, inputs=1, weights=1, outputs=1)
    )


def input_grads(shape: Shape, dtype: torch.dtype, terms: tuple[bool, ...] = ALL_TERMS) -> Count:
    """dx and dz from g, x, z, W, U and V."""
    terms = (*terms[:3], False)
    return Count(_contraction(shape, terms), _bytes(shape, dtype, terms, inputs=2, weights=1, outputs=1))


def weight_grads(shape: Shape, dtype: torch.dtype, terms: tuple[bool, ...] = ALL_TERMS) -> Count:
    """dW, dU, dV and dc from g, x and z."""
    bias = shape.rows * shape.out if terms[3] else 0
    return Count(
        _contraction(shape, terms) + bias, _bytes(shape, dtype, terms, inputs=1, weights=1, outputs=1)
    )


# Multiplications of a product below which two fewer are not worth the calls that make Q. On a Zen 4 thread,
# seven products took by five: 0.8 to 0.9 at 2^16 to 2^18, 1.0 to 3.0 at 2^20.
MIN_PAIRS_WORK = 1 << 20


def holds_pairs(rows: int, context: int, width: int, out: int, dtype: torch.dtype) -> bool:
    """Whether the double backward on a CPU holds Q = z x' + z' x [B, Z X], and has five products for seven.

    Q is no larger than the largest of inputs, outputs and weights. It leaves the range of float16 too easily.
    """
    if dtype is torch.float16:
        return False
    pairs, weight = rows * context * width, out * context * width
    return pairs * out >= MIN_PAIRS_WORK and pairs <= max(rows * max(context, width, out), weight)


def double_backward(shape: Shape, dtype: torch.dtype, terms: tuple[bool, ...] = ALL_TERMS) -> Count:
    """The gradients by g, x, z and the weights of <x', dx> + <z', dz> + <W', dW> + <U', dU> + ...

    dg = y(x', z, W) + y(x, z', W) + y(x, z, W') are three contractions; (dx, dz) one with W on (x', z') and
    one with W'; dW one with x' and one with z': seven. `holds_pairs` makes one of the first two, and one of
    the last two. U (and V) appear in z' and U' for dg, in U' for dz,
    in z' for dU: four. The bias appears in c' for dg alone.
    """
    bias = shape.rows * shape.out if terms[3] else 0
    sizes = shape.rows, shape.context, shape.width, shape.out
    gemms = 5 if holds_pairs(*sizes, dtype) else 7
    gemm = _contraction(shape, (terms[0], False, False, False))
    linear = _contraction(shape, (False, terms[1], terms[2], False))
    moved = _bytes(shape, dtype, (*terms[:3], False), inputs=3, weights=3, outputs=2)
    return Count(gemms * gemm + 4 * linear + bias, moved + (shape.out * dtype.itemsize if terms[3] else 0))


def _contraction(shape: Shape, terms: tuple[bool, ...]) -> int:
    o, i, j = shape.out, shape.context, shape.width
    per_row = i * j * terms[0] + i * terms[1] + j * terms[2]
    return 2 * shape.rows * o * per_row


def _bytes(
    shape: Shape, dtype: torch.dtype, terms: tuple[bool, ...], inputs: int, weights: int, outputs: int
) -> int:
    x, z, *matrices = (math.prod(sizes) for sizes in shape.sizes())
    parameters = sum(size for size, there in zip(matrices, terms, strict=True) if there)
    elements = inputs * (x + z) + weights * parameters + outputs * shape.rows * shape.out
    return elements * dtype.itemsize


def modulate(sizes: tuple[int, int, int], itemsize: int) -> Count:
    """y of modulation, from the numbers of elements of x, scale and shift. Activations are not counted."""
    x, scale, shift = sizes
    return Count(x * (2 if shift else 1), (2 * x + scale + shift) * itemsize)


def modulate_grads(sizes: tuple[int, int, int], itemsize: int) -> Count:
    """dx, dscale and dshift from g, x and scale."""
    x, scale, shift = sizes
    return Count(x * (4 if shift else 3), (3 * x + 2 * scale + shift) * itemsize)


def dual_linear(
    rows: int,
    widths: tuple[float, float],
    out: int,
    ranks: int,
    elements: int,
    itemsize: int,
    matrices: Sequence[torch.Tensor | None] = (),
) -> Count:
    """y of the product of two linear maps of ``widths`` features.

    ``elements``: of all arguments; ``matrices``: of products with each row besides, [O, ...].
    """
    factors = round(ranks * out * sum(widths))
    products = 2 * rows * (factors + sum(m.numel() for m in matrices if m is not None))
    results = next((m.shape[0] for m in matrices if m is not None), out)
    return Count(products + 2 * rows * out * ranks, (elements + rows * results) * itemsize)


def mix(sizes: tuple[int, int], itemsize: int) -> Count:
    """y of a mixture, from the numbers of elements of y, to which a and b broadcast, and of the gate."""
    y, gate = sizes
    return Count(3 * y, (3 * y + gate) * itemsize)


def mix_grads(sizes: tuple[int, int], itemsize: int) -> Count:
    """da, db and dgate from g, a, b and the gate."""
    y, gate = sizes
    return Count(5 * y, (5 * y + 2 * gate) * itemsize)


def norm_modulate(center: bool, x: int, residual: bool, parameters: Sequence[int], itemsize: int) -> Count:
    """y of normalisation with modulation, and x_new of a residual.

    ``x``: its number of elements; ``parameters``: those of gate, scale, shift, weight and bias, 0 where there
    is none. Each of these is one operation an element, statistics and normalisation are 5, and 3 of rms.
    """
    each = (5 if center else 3) + residual + sum(1 for size in parameters if size)
    return Count(each * x, ((4 if residual else 2) * x + sum(parameters)) * itemsize)


def norm_modulate_grads(
    center: bool, x: int, residual: bool, parameters: Sequence[int], itemsize: int
) -> Count:
    """All gradients from g, x_new, and with a gate h; of a residual the gradient of x_new comes too."""
    gate, scale, shift, weight, bias = (bool(size) for size in parameters)
    each = (9 if center else 7) + residual + 3 * (gate + scale + weight) + shift + bias
    return Count(each * x, ((3 + residual + 2 * gate) * x + 2 * sum(parameters)) * itemsize)


def recurrent(rows: int, matrices: int, arguments: int, results: int, itemsize: int) -> Count:
    """Output and state of a multiplicative RNN, of the elements of all its matrices, arguments and results.

    ``rows``: of all steps together. What is elementwise is not counted.
    """
    return Count(2 * rows * matrices, (arguments + results) * itemsize)


def gate(
    rows: int,
    contexts: int,
    context: int,
    width: int,
    shift: bool,
    weight_x: bool,
    parameters: int,
    itemsize: int,
) -> Count:
    """y of a gate without W; gate and shift are computed once per context."""
    products = contexts * context * (2 if shift else 1) + (rows * width if weight_x else 0)
    elements = 2 * rows * width + contexts * context + parameters
    return Count(2 * width * products + 2 * rows * width, elements * itemsize)
