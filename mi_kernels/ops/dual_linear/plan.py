"""Plans of gated linear units and low-rank interactions for :func:`mi_kernels.explain`."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import backend as backends
from .. import counts
from ..backend import DualCall
from ..interaction import plan as dense
from ..plan import Plan
from ..rules import Maybe, gradients_wanted, without_features
from .low_rank import is_shared

_WHOLE_ROWS = "softmax needs whole rows: both products are computed and stored, then multiplied"
_SHARED = "x or z is shared by several rows: each product is computed once for each of its own rows"
_KEPT = "both products were saved; their gradients are products of their own"


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
    features = weight.shape[0] // 2 if weight_value is None else weight.shape[0]
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    tensors = x, weight, bias, weight_value, bias_value
    wanted = gradients_wanted(tensors)
    count = counts.dual_linear(rows, (width, width), features, 1, _elements(tensors), x.element_size())
    if activation == "softmax":
        scratch = 2 * rows * features * x.element_size()
        forward = Plan("glu", backend, "rows after both products", *_of(count), scratch, _WHOLE_ROWS)
    else:
        call = DualCall(
            rows, (width, width), features, 1, x.dtype, x.device, _k_major(weight, weight_value), any(wanted)
        )
        answer = backends.get(backend).planner.dual_linear(call)
        forward = Plan("glu", backend, answer.algorithm, *_of(count), *answer[1:])
    if not any(wanted):
        return forward
    steps = [_grads(backend, rows * features, rows * features, x.element_size())]
    flat = x.reshape(rows, width)
    if weight_value is None:
        return replace(forward, backward=(*steps, *_linear(backend, flat, weight, bias)))
    both = *_linear(backend, flat, weight, bias), *_linear(backend, flat.detach(), weight_value, bias_value)
    return replace(forward, backward=(*steps, *both))


def low_rank(
    backend: str,
    lead: torch.Size,
    x: Tensor,
    z: Tensor,
    factor_x: Tensor,
    factor_z: Tensor,
    factor_out: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> Plan:
    """The plan of checked arguments on ``backend``."""
    ranks = factor_x.shape[0] if factor_x.dim() == 3 else 1
    rank, rows = factor_x.shape[-2], math.prod(lead)
    shared = is_shared(x, z, lead)
    tensors = x, z, factor_x, factor_z, factor_out, weight_z, weight_x, bias
    wanted = gradients_wanted(tensors)
    of_x, of_z = (math.prod(t.shape[:-1]) if shared else rows for t in (x, z))
    widths = (x.shape[-1] * of_x / max(rows, 1), z.shape[-1] * of_z / max(rows, 1))
    count = counts.dual_linear(rows, widths, rank, ranks, _elements(tensors), x.element_size(), tensors[4:7])
    if shared:
        scratch = (of_x + of_z) * ranks * rank * x.element_size()
        forward = Plan("low_rank", backend, "per row of each", *_of(count), scratch, _SHARED)
    else:
        sizes = (x.shape[-1], z.shape[-1])
        call = DualCall(
            rows, sizes, rank, ranks, x.dtype, x.device, _k_major(factor_x, factor_z), any(wanted)
        )
        answer = backends.get(backend).planner.dual_linear(call)
        forward = Plan("low_rank", backend, answer.algorithm, *_of(count), *answer[1:])
    if not any(wanted):
        return forward
    steps = [_grads(backend, rows * rank, rows * rank * ranks, x.element_size())]
    h = x.detach().new_empty((1, 1)).expand(rows, rank).requires_grad_(any(wanted[:4]))
    if factor_out is not None:
        steps = [*_linear(backend, h, factor_out, bias), *steps]
    for tensor, factor, term in ((x, factor_x, weight_x), (z, factor_z, weight_z)):
        flat = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
        steps += _linear(backend, flat, factor.flatten(0, -2), None)
        if term is not None:
            steps += _linear(backend, flat, term, None)
    return replace(forward, backward=tuple(steps))


def _linear(backend: str, x: Tensor, weight: Tensor, bias: Maybe) -> tuple[Plan, ...]:
    """The gradients of one linear map."""
    return dense.plan(backend, x, without_features(x), (None, None, weight, bias)).backward


def _grads(backend: str, out: int, features: int, itemsize: int) -> Plan:
    count = counts.Count(4 * features, (out + 4 * features) * itemsize)
    return Plan("dual_linear_grads", backend, "kept products", *_of(count), None, _KEPT)


def _of(count: counts.Count) -> tuple[int, int]:
    return count.operations, count.bytes


def _elements(tensors: Sequence[Maybe]) -> int:
    return sum(t.numel() for t in tensors if t is not None)


def _k_major(weight: Tensor, other: Maybe) -> bool:
    """Whether one of the matrices is contiguous along K, and is transposed where it is packed."""
    return any(t is not None and t.stride(-1) == 1 for t in (weight, other))
