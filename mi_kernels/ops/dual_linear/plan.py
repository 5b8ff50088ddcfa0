"""Plans of gated linear units and low-rank interactions for :func:`mi_kernels.explain`."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mi_kernels.ops import backend as backends
from mi_kernels.ops.dual_linear import portable
from mi_kernels.ops.plan import Plan
from mi_kernels.ops.rules import Maybe, gradients_wanted

_WHY = {
    "elementwise": "the formula term by term: the oracle, not meant to be fast",
    "chunked": "both products are computed for a range of rows at a time, then multiplied",
    "dual": "both products are computed tile by tile and multiplied while the tiles are in cache",
    "softmax after the products": "softmax needs whole rows: both products are stored, then multiplied",
    "by leading dimension": "x and z broadcast: each row is multiplied once, and both products are stored",
    "kept products": "both products before their activations were saved; their gradients are one pass",
    "linear": "gradients of the products are plain matrix products",
}


def glu(
    backend: str,
    activation: str,
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    weight_value: Maybe,
    bias_value: Maybe,
) -> Plan:
    """The plan of checked arguments on ``backend``."""
    out = weight.shape[0] if weight_value is not None else weight.shape[0] // 2
    composed = "softmax after the products" if activation == "softmax" else None
    matrices, biases = (weight, weight_value), (bias, bias_value)
    return _plan("glu", backend, composed, x.shape[:-1], 2 * out, out, (x,), matrices, biases)


def low_rank(backend: str, lead: torch.Size, x: Tensor, z: Tensor, *weights: Tensor) -> Plan:
    """The plan of checked arguments on ``backend``."""
    *matrices, bias = weights
    factor_x, factor_out = matrices[0], matrices[2]
    features = math.prod(factor_x.shape[:-1])
    out = factor_x.shape[-2] if factor_out is None else factor_out.shape[0]
    composed = None if x.shape[:-1] == z.shape[:-1] else "by leading dimension"
    return _plan("low_rank", backend, composed, lead, 2 * features, out, (x, z), matrices, (bias,))


def _plan(
    op: str,
    backend: str,
    composed: str | None,
    lead: torch.Size,
    features: int,  # of both products
    out: int,
    inputs: Sequence[Tensor],
    matrices: Sequence[Maybe],
    biases: Sequence[Maybe],
) -> Plan:
    record, rows, item = backends.get(backend), math.prod(lead), inputs[0].element_size()
    weights = [matrix for matrix in matrices if matrix is not None]
    given = [*inputs, *weights, *(bias for bias in biases if bias is not None)]
    moved = (sum(t.numel() for t in given) + rows * out) * item
    products = sum(2 * rows * matrix.numel() for matrix in weights)

    def step(name: str, algorithm: str, operations: int, moved: int, scratch: int | None = None) -> Plan:
        return Plan(name, backend, algorithm, operations, moved, scratch, _WHY[algorithm])

    scratch = None
    if record.is_reference:
        algorithm = "elementwise"
    elif composed is not None:
        algorithm, scratch = composed, rows * features * item
    elif record.fused:
        algorithm = "dual"
    else:
        algorithm, scratch = "chunked", portable.chunk_rows(rows, features // 2) * features * item
    backward = []
    if any(gradients_wanted(given)):
        backward.append(
            step("grads", "kept products", 2 * rows * features, (2 * features + out) * rows * item)
        )
        for name, tensors in (("input_grads", inputs), ("weight_grads", given[len(inputs) :])):
            if any(gradients_wanted(tensors)):
                backward.append(step(name, "linear", products, moved))
    forward = step(op, algorithm, products + rows * features // 2, moved, scratch)
    return replace(forward, backward=tuple(backward))
