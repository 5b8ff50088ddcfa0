"""Plans of the dense interaction where x and z have different leading dimensions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import backend as backends
from ..plan import Plan
from ..rules import Maybe, gradients_wanted
from . import all_pairs, cost_model, kept, memory_order, plain, segments, shared
from . import plan as dense
from .plan_batched import by_segment


def major(matrix: Maybe) -> tuple[bool, bool]:
    """Whether a matrix [..., N, K] is contiguous along K, and along N."""
    return (False, False) if matrix is None else (matrix.stride(-1) == 1, matrix.stride(-2) == 1)


_WHY = {
    cost_model.PER_Z: "rows share contexts: W' = z W + V is generated once per context, then applied",
    cost_model.PER_X: "contexts share inputs: W x + U is generated once per input, then applied",
}
_WHY_KEPT = {
    plan: f"gradients are wanted: {kept}, no larger than the largest of x, z, y and W, is kept, so that the"
    f" gradient of {other} takes no product with W"
    for plan, kept, other in ((cost_model.PER_X, "W x + U", "z"), (cost_model.PER_Z, "z W + V", "x"))
}


def reading(matrices: shared.Matrices) -> str:
    """How `generate` reads W, which it never copies."""
    axes = "OZX"
    as_read = "".join(axes[axis] for axis in matrices.outs)
    groups = "".join(f"{axes[axis]} groups of " for axis in matrices.groups)
    return f"W is read in place, as {groups}a matrix [{'*'.join(as_read)}, Z]"


def plan(backend: str, lead: torch.Size, x: Tensor, z: Tensor, weights: Sequence[Maybe]) -> Plan:
    """The plan of checked arguments x, z and (W, U, V, c) on ``backend``."""
    sharing = shared.sharing_costs(backend, lead, x, z, weights)
    if sharing is None:
        return _fused(backend, x, z, weights)
    layout, found = sharing
    how = cost_model.cheapest(found).plan
    if how == cost_model.FUSED:
        return replace(_fused(backend, x, z, weights), alternatives=found)
    pairs = all_pairs.pairs(backend, x, z, weights)
    if pairs is not None:
        how = pairs.plan
    wanted = gradients_wanted((x, z, *weights))
    if how == cost_model.PER_X:
        weight, weight_z, weight_x, bias = weights
        assert weight is not None
        layout, x, z = layout.mirrored(), z, x
        weights = weight.transpose(1, 2), weight_x, weight_z, bias
        wanted = [wanted[1], wanted[0], wanted[2], wanted[4], wanted[3], wanted[5]]
    weight = weights[0]
    assert weight is not None
    sizes = layout.sizes(z.shape[-1], x.shape[-1], weight.shape[0])
    counted = (sizes.common * sizes.of_z, sizes.rows)
    if pairs is not None:
        why = f"{_WHY[how]}; all pairs, by the kernel of the biaffine form"
        return replace(_generated(how, backend, counted, x, z, weights, wanted, why), alternatives=found)
    scratch = _scratch(backends.get(backend).planner, layout, sizes, x, z, weights)
    why = f"{_WHY[how]}; {reading(shared.matrices_of(weight, sizes.of_z))}"
    explained = _generated(how, backend, counted, x, z, weights, wanted, why)
    return replace(explained, scratch=scratch, alternatives=found)


def _fused(backend: str, x: Tensor, z: Tensor, weights: Sequence[Maybe]) -> Plan:
    """The plan of one product, with x and z exchanged where the call does (autograd.py)."""
    weight, weight_z, weight_x, bias = weights
    chosen = kept.chosen(x, z, *weights) if plain.is_plain(backend, x, z, *weights) else None
    if chosen is not None:
        return _kept(backend, cost_model.PER_X if chosen[0] is x else cost_model.PER_Z, *chosen)
    if weight is None or backends.get(backend).is_reference or not memory_order.is_n_major(weight):
        return dense.plan(backend, x, z, weights)
    found = dense.plan(backend, z, x, (weight.transpose(1, 2), weight_x, weight_z, bias))
    return replace(found, why=f"{found.why}; x and z are exchanged, since z is inside x in the memory of W")


def _kept(backend: str, how: str, x: Tensor, z: Tensor, *weights: Maybe) -> Plan:
    """The plan of a call in training that keeps W x + U (kept.py): ``how`` of rows that share nothing."""
    weight, weight_z, weight_x, bias = weights
    assert weight is not None
    mirrored = weight.transpose(1, 2), weight_x, weight_z, bias
    layout = shared.layout_of(z.shape[:-1], x.shape[:-1], x.shape[:-1])
    sizes = layout.sizes(x.shape[-1], z.shape[-1], weight.shape[0])
    scratch = _scratch(backends.get(backend).planner, layout, sizes, z, x, mirrored)
    wanted = gradients_wanted((z, x, *mirrored))
    rows = (x.shape[0], x.shape[0])
    explained = _generated(how, backend, rows, z, x, mirrored, wanted, _WHY_KEPT[how])
    return replace(explained, scratch=scratch)


def _generated(
    how: str,
    backend: str,
    counted: tuple[int, int],
    x: Tensor,
    z: Tensor,
    weights: Sequence[Maybe],
    wanted: Sequence[bool],
    why: str,
) -> Plan:
    """The plan that generates W' for contexts z and applies it to rows x, with all operations of the kernels.

    ``counted``: the number of contexts and the number of rows of y.
    """
    (contexts, rows), (weight, weight_z, _, bias) = counted, weights
    assert weight is not None
    out, context, width = weight.shape
    generate, apply = 2 * contexts * out * width * context, 2 * rows * out * width
    offset = contexts * out * (2 * context * (weight_z is not None) + (bias is not None))
    item, result = x.element_size(), rows * out
    parameters = sum(tensor.numel() for tensor in weights if tensor is not None)
    moved = (x.numel() + z.numel() + parameters + result + 2 * contexts * out * width) * item

    def step(op: str, operations: int) -> Plan:
        return Plan(op, backend, how, operations, moved, None, why)

    want_x, want_z, want_weight, want_weight_z, want_weight_x, want_bias = wanted
    generated = want_z or want_weight or want_weight_x
    backward = []
    if want_x or want_z:
        # The gradient of W' is counted in the primitive that needs it first.
        operations = apply * (want_x + want_z) + (generate + offset) * want_z
        backward.append(step("input_grads", operations))
    if want_weight or want_weight_z or want_weight_x or want_bias:
        first = generated and not want_z
        operations = apply * first + generate * want_weight + offset * want_weight_z
        backward.append(step("weight_grads", operations))
    return replace(step("forward", generate + apply + offset), backward=tuple(backward))


def ragged_plan(backend: str, segment_ids: Tensor, x: Tensor, z: Tensor, weights: Sequence[Maybe]) -> Plan:
    """The plan of checked arguments x [N, X] and z [G, Z], grouped by ``segment_ids``."""
    shape = (len(x), z.shape[-1])
    rows = torch.empty(shape, dtype=z.dtype, device="meta", requires_grad=z.requires_grad)
    fused = _fused(backend, x, rows, weights)
    if fused.scratch is not None:
        fused = replace(fused, scratch=fused.scratch + rows.numel() * rows.element_size())
    weight = weights[0]
    if weight is None or backends.get(backend).is_reference or segments.is_mapped(segment_ids):
        return fused
    found = segments.costs_by_segment(backend, x, z, weights)
    best = cost_model.cheapest(found)
    if best.plan == cost_model.FUSED:
        return replace(fused, alternatives=found)
    how = by_segment(backend, "layer")
    why = f"{_WHY[best.plan]}; {how}; {reading(shared.matrices_of(weight, 1))}"
    wanted = gradients_wanted((x, z, *weights))
    counted = (len(z), len(x))
    explained = _generated(best.plan, backend, counted, x, z, weights, wanted, why)
    return replace(explained, alternatives=found)


def _scratch(
    planner: backends.Planner,
    layout: shared.Layout,
    sizes: cost_model.Sizes,
    x: Tensor,
    z: Tensor,
    weights: Sequence[Maybe],
) -> int | None:
    """Peak bytes that the forward pass allocates, without those of its result."""
    weight, weight_z, weight_x, bias = weights
    assert weight is not None
    groups, of_z, of_x, context, width, out = sizes
    contexts, item = groups * of_z, x.element_size()

    def kernel(count: int, rows: int, features: int, outs: int, bias: bool, matrix: Maybe = None) -> int:
        how = (True, False) if matrix is None else major(matrix)
        return planner.linear_scratch(x.dtype, count, rows, features, outs, bias, how) or 0

    if planner.linear_scratch(x.dtype, 1, 1, 1, 1, False) is None:
        return None
    has_offset = weight_z is not None or bias is not None
    matrices = shared.matrices_of(weight, of_z)
    outer = matrices.groups == (0,)
    copies = copied(z, layout.contexts_first if outer else lambda tensor: layout.contexts(tensor, 1))
    generated = contexts * out * width * item
    live = copies + generated
    generating = live + generate_scratch(planner, contexts, weight, weight_x, matrices)
    if weight_z is not None:
        live += contexts * out * item
        generating = max(generating, live + kernel(1, contexts, context, out, bias is not None, weight_z))
    if has_offset and of_z > 1:
        live += contexts * out * item
    result = sizes.rows * out * item
    live += copied(x, layout.rows)
    if out == 1 and of_z > 1:
        applying = live + result + max(kernel(groups, of_z, width, of_x, False), result * has_offset)
        return max(generating, applying) - result
    applying = live + result + kernel(groups, of_x, width, of_z * out, has_offset)
    # The memory order of apply_generated's result: the contexts of a row are innermost, or its outputs.
    applied = torch.empty(groups, of_x, of_z, out, dtype=x.dtype, device="meta").transpose(1, 2)
    if outer and of_z > 1:
        applied = torch.empty(groups, of_x, out, of_z, dtype=x.dtype, device="meta").permute(0, 3, 1, 2)
    arranging = result + copied(applied, layout.result)
    return max(generating, applying, arranging) - result


def generate_scratch(
    planner: backends.Planner, contexts: int, weight: Tensor, weight_x: Maybe, matrices: shared.Matrices
) -> int:
    """Peak bytes of the product with W in `shared.generate`, without those of W'."""
    read = matrices.of(weight)
    *groups, outs, context = read.shape
    rows = math.prod(groups), contexts
    scratch = planner.linear_scratch(weight.dtype, *rows, context, outs, weight_x is not None, major(read))
    return (scratch or 0) + (0 if weight_x is None else copied(weight_x, matrices.offsets))


def copied(tensor: Tensor, arrange: Callable[[Tensor], Tensor]) -> int:
    """Bytes of the copy made by a rearrangement, 0 where it is a view; evaluated on a meta tensor."""
    shadow = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    with torch.no_grad():
        arranged = arrange(shadow)
    is_view = arranged is shadow or arranged._base is shadow
    return 0 if is_view else arranged.numel() * arranged.element_size()
