"""Plans of generate and apply_generated for :func:`mi_kernels.explain`."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import backend as backends
from ..checks import broadcast
from ..plan import Plan
from ..rules import Maybe, gradients_wanted
from . import segments, shared
from .plan_batched import by_segment
from .plan_shared import copied, generate_scratch, major, reading

_GENERATE = "W' = z W + V is one product, b' = U z + c another one"
_APPLY = "one grouped product, one group per layer, with the inputs of a layer as its rows"
_LOW_RANK = "two grouped products, to R features and from them; no factor is repeated for its rows"
_MAPPED = "values that vmap maps over cannot be sorted: each row gets its own copy of a layer"
_EINSUM = "the formula term by term: the oracle, not meant to be fast"


def generate(backend: str, z: Tensor, weights: Sequence[Maybe]) -> Plan:
    """The plan of checked arguments z and (W, U, V, c)."""
    weight, weight_z, weight_x, bias = weights
    like = weight if weight is not None else weight_x
    assert like is not None
    contexts, context, out, width = math.prod(z.shape[:-1]), z.shape[-1], like.shape[0], like.shape[-1]
    by_weight, by_weight_z = 2 * contexts * out * width * context, 2 * contexts * out * context
    has_offset = weight_z is not None or bias is not None
    results = contexts * out * (width + has_offset)
    moved = _bytes(results, z, *weights)
    want_z, *want = gradients_wanted((z, *weights))
    why = _GENERATE if weight is None else f"{_GENERATE}; {reading(shared.matrices_of(weight, 1))}"

    def step(op: str, has_weight: bool, has_weight_z: bool, more: int = 0) -> Plan:
        operations = by_weight * has_weight + by_weight_z * has_weight_z + more
        return _plan(op, backend, operations, moved, why)

    backward = []
    if want_z:
        backward.append(step("input_grads", weight is not None, weight_z is not None))
    if any(want):
        backward.append(step("weight_grads", want[0], want[1]))
    more = contexts * out * (bias is not None)
    forward = step("forward", weight is not None, weight_z is not None, more)
    return replace(forward, scratch=_generate_scratch(backend, z, weights), backward=tuple(backward))


def _generate_scratch(backend: str, z: Tensor, weights: Sequence[Maybe]) -> int | None:
    """Peak bytes allocated, without those of W' and b'."""
    planner = backends.get(backend).planner
    linear = planner.linear_scratch
    if linear(z.dtype, 1, 1, 1, 1, False) is None:
        return None
    weight, weight_z, weight_x, bias = weights
    contexts, context, item = math.prod(z.shape[:-1]), z.shape[-1], z.element_size()
    copy = copied(z, lambda tensor: tensor.reshape(contexts, context))
    # Scratch of the last product coexists with both results, that of the first product with one.
    first = last = 0
    if weight_z is not None:
        features = context, weight_z.shape[0]
        last = linear(z.dtype, 1, contexts, *features, bias is not None, major(weight_z)) or 0
    if weight is not None:
        first = generate_scratch(planner, contexts, weight, weight_x, shared.matrices_of(weight, 1))
        if weight_z is not None or bias is not None:
            first -= contexts * weight.shape[0] * item
    elif weight_x is not None:  # copied last
        last -= contexts * weight_x.numel() * item
    return copy + max(first, last, 0)


def apply(
    backend: str, x: Tensor, weight: Tensor, bias: Maybe, lead: torch.Size, segment_ids: Tensor | None
) -> Plan:
    """The plan of checked arguments x, W' and b'; y has the leading dimensions ``lead``."""
    out, width = weight.shape[-2:]
    rows, why = math.prod(lead), _APPLY
    if segment_ids is not None:
        why = _MAPPED if segments.is_mapped(segment_ids) else by_segment(backend, "layer")
    product = 2 * rows * out * width
    moved = _bytes(rows * out, x, weight, bias)
    want_x, *want = gradients_wanted((x, weight, bias))
    backward = []
    if want_x:
        backward.append(_plan("input_grads", backend, product, moved, why))
    if any(want):
        backward.append(_plan("weight_grads", backend, product * want[0], moved, why))
    operations = product + rows * out * (bias is not None)
    return replace(_plan("forward", backend, operations, moved, why), backward=tuple(backward))


def apply_low_rank(
    backend: str, x: Tensor, down: Tensor, up: Tensor, base: Maybe, lead: torch.Size, segment_ids: Maybe
) -> Plan:
    """The plan of checked arguments x, A, B and base; y has the leading dimensions ``lead``."""
    (rank, width), out, rows, why = down.shape[-2:], up.shape[-2], math.prod(lead), _LOW_RANK
    if segment_ids is not None:
        how = _MAPPED if segments.is_mapped(segment_ids) else by_segment(backend, "factor")
        why = f"{_LOW_RANK}; {how}"
    inner = rows if segment_ids is not None else math.prod(broadcast(x.shape[:-1], down.shape[:-2]) or ())
    first, second = 2 * inner * rank * width, 2 * rows * out * rank
    moved = _bytes(rows * out, x, down, up, base)
    want_x, want_down, want_up, want_base = gradients_wanted((x, down, up, base))
    backward = []
    if want_x or want_down:  # that of the R features is counted here
        operations = second + first * want_x
        backward.append(_plan("input_grads", backend, operations, moved, why))
    if want_down or want_up or want_base:
        operations = first * want_down + second * want_up
        backward.append(_plan("weight_grads", backend, operations, moved, why))
    forward = _plan("forward", backend, first + second + rows * out * (base is not None), moved, why)
    return replace(forward, backward=tuple(backward))


def _plan(op: str, backend: str, operations: int, moved: int, why: str) -> Plan:
    algorithm, why = ("einsum", _EINSUM) if backends.get(backend).is_reference else ("linear", why)
    return Plan(op, backend, algorithm, operations, moved, None, why)


def _bytes(results: int, *tensors: Maybe) -> int:
    present = [tensor for tensor in tensors if tensor is not None]
    return (results + sum(tensor.numel() for tensor in present)) * present[0].element_size()
