"""Ragged groups: rows in any order, each with the index of the group whose context or layer it uses.

W' = z W + V is generated once per context, or given, and each row is multiplied by that of its group
(by_segment.py) without a copy of it. The alternative for contexts is the fused plan with one context per row
(N Z elements); cost_model.py compares them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_segments, check_shape, check_tensors
from ..compiling import is_transformed
from ..dtypes import accumulation_dtype
from ..library import LIBRARY, NAMESPACE
from ..namespace import OPS
from ..rules import Maybe, gradients_wanted, without_features
from . import autograd, cost_model, shared

_PROXY = torch._C._TorchDispatchModeKey.PROXY  # active under make_fx


def opaque(segment_ids: Tensor) -> bool:
    """Whether the values cannot be read, or would be baked into a graph: under torch.compile and all other
    tracers, under vmap over them, and on the meta device."""
    if torch.compiler.is_compiling() or segment_ids.device.type == "meta" or torch.jit.is_tracing():
        return True
    # A subclass (of tracers, DTensor) may hold no values, or only some of them.
    if type(segment_ids) is not Tensor or torch._C._get_dispatch_mode(_PROXY) is not None:
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(segment_ids)


def is_mapped(segment_ids: Tensor) -> bool:
    """Whether ``torch.vmap`` may map over the indices; their order could differ for each sample."""
    if torch.compiler.is_compiling():
        return is_transformed()
    return torch._C._functorch.is_functorch_wrapped_tensor(segment_ids)


def check_segment_ids(op: str, segment_ids: object, x: Tensor, groups: int) -> None:
    """``segment_ids`` fits x [N, X] and the number of groups; values are checked where they can be read."""
    look = isinstance(segment_ids, Tensor) and not opaque(segment_ids)
    check_segments(op, segment_ids, x, groups, look)


def grouping(segment_ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The rows ordered by group [N], and the offsets of the groups in that order [G + 1]."""
    return OPS.segment_order(segment_ids, groups)


def _check_order(segment_ids: Tensor, groups: int) -> None:
    check_tensors("segment_order", ("segment_ids",), (segment_ids,), 1, (torch.int64,))
    check_shape("segment_order", "segment_ids", segment_ids, {"N": None})
    if groups < 0:
        raise ValueError(f"segment_order: groups: expected 0 or more, got {groups}")


def _segment_order(segment_ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    _check_order(segment_ids, groups)
    ordered, row_index = segment_ids.sort(stable=True)
    numbers = segment_ids.new_ones(groups + 1).cumsum(0) - 1  # not arange: the indices may be a fake tensor
    return row_index, torch.searchsorted(ordered, numbers)


def _segment_order_fake(segment_ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    _check_order(segment_ids, groups)
    return torch.empty_like(segment_ids), segment_ids.new_empty(groups + 1)


# The CPU library has a kernel for it: a counting sort.
LIBRARY.define("segment_order(Tensor segment_ids, SymInt groups) -> (Tensor, Tensor)")
LIBRARY.impl("segment_order", _segment_order, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::segment_order", _segment_order_fake, lib=LIBRARY)


def linear_by_segment(backend: str, segment_ids: Tensor, x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """y [N, O] of x [N, X], W' [G, O, X] and b' [G, O]."""
    order = grouping(segment_ids, weight.shape[0])
    none = without_features(x)
    return autograd.forward_by_segment(backend, *order, x, none, None, None, weight, bias)


def apply_by_segment(backend: str, segment_ids: Tensor, x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """The same; numbers that vmap maps over are not sorted: each row gets its own copy of its layer."""
    if not is_mapped(segment_ids):
        return linear_by_segment(backend, segment_ids, x, weight, bias)
    rows = gather_rows(weight, segment_ids).unsqueeze(1)
    bias = None if bias is None else gather_rows(bias, segment_ids).unsqueeze(1)
    return shared.apply_generated(backend, x.unsqueeze(1), rows, bias).flatten(0, 2)


def costs_by_segment(
    backend: str, x: Tensor, z: Tensor, weights: Sequence[Maybe]
) -> tuple[cost_model.Cost, ...]:
    """The costs of both plans for x [N, X] and z [G, Z]; W is given."""
    weight = weights[0]
    assert weight is not None
    groups, dims = z.shape[0], (z.shape[-1], x.shape[-1], weight.shape[0])
    # The remainder of the division is ignored; it does not change the choice.
    sizes = shared.known(cost_model.Sizes(groups, 1, x.shape[0] // groups if groups else 0, *dims))
    wanted = cost_model.Wanted(*gradients_wanted((x, z, *weights[:3])))
    how = wanted, x.dtype, backend, x.device.type
    fused = cost_model.fused(shared.known(cost_model.Sizes(x.shape[0], 1, 1, *dims)), *how)
    return fused, *cost_model.all_costs(sizes, *how)[1:]


def interaction(
    backend: str, segment_ids: Tensor, x: Tensor, z: Tensor, *weights: Maybe, force: str | None = None
) -> Tensor:
    """y [N, O] of x [N, X] and z [G, Z]."""
    plan = cost_model.FUSED
    if weights[0] is not None and not is_mapped(segment_ids):
        plan = force or cost_model.cheapest(costs_by_segment(backend, x, z, weights)).plan
    if plan == cost_model.FUSED:
        return autograd.forward(backend, x, gather_contexts(z, segment_ids), *weights)
    generated, offset = shared.generate(backend, z, *weights)
    assert generated is not None
    return linear_by_segment(backend, segment_ids, x, generated, offset)


def gather_contexts(z: Tensor, segment_ids: Tensor) -> Tensor:
    """z [G, Z] as [N, Z]. Its gradient is summed in the accumulation dtype."""
    return gather_rows(z.to(accumulation_dtype(z.dtype)), segment_ids).to(z.dtype)


def gather_rows(tensor: Tensor, segment_ids: Tensor) -> Tensor:
    """tensor [G, ...] as [N, ...]."""
    if opaque(segment_ids):
        # Inductor lowers index_select to an index that wraps negative values: make them out of range.
        segment_ids = segment_ids.masked_fill(segment_ids < 0, tensor.shape[0])
    return tensor.index_select(0, segment_ids)
