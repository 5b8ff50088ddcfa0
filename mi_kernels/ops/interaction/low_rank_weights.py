"""Generated weights of low rank, y = base + scale * B (A x): A is ``down``, to R features, B is ``up``.

Two products without W, each with its factor read where it lies, whatever rows share it: nothing is larger
than x, y and the R features of each row. The scale multiplies these, in 16 bits y.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import all_fit, broadcast
from ..rules import Maybe, Rule, is_watched, recorded, transformed, wanted, without_features
from . import autograd, linear, segments, shared


def apply(
    backend: str, x: Tensor, down: Tensor, up: Tensor, base: Maybe, scale: float, segment_ids: Maybe
) -> Tensor:
    """y [..., O] of x [..., X], A [..., R, X] and B [..., O, R]; with segment_ids, of rows and groups."""
    early, late = _scales(scale, x.dtype)
    if segment_ids is None:
        y = _product(backend, _scaled(_product(backend, x, down), early), up)
    elif segments.is_mapped(segment_ids):  # each row gets its own copy of its factors
        features = segments.apply_by_segment(backend, segment_ids, x, down, None)
        y = segments.apply_by_segment(backend, segment_ids, _scaled(features, early), up, None)
    else:
        order = segments.grouping(segment_ids, down.shape[0])
        y = _by_segment(backend, order, _scaled(_by_segment(backend, order, x, down), early), up)
    return add_base(_scaled(y, late), base)


def _scales(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """The factors of the R features and of y: in 16 bits features times the scale may leave the range."""
    return (1, scale) if dtype in (torch.float16, torch.bfloat16) else (scale, 1)


def _product(backend: str, x: Tensor, weight: Tensor) -> Tensor:
    """y [..., O] of x [..., X] and W' [..., O, X], whose leading dimensions broadcast."""
    lead = broadcast(x.shape[:-1], weight.shape[:-2])
    assert lead is not None, "checked by the caller"
    layout = shared.layout_of(x.shape[:-1], weight.shape[:-2], lead)
    return layout.result(shared.apply_generated(backend, layout.rows(x), layout.contexts(weight, 2), None))


def _by_segment(backend: str, order: Sequence[Tensor], x: Tensor, weight: Tensor) -> Tensor:
    row_index, offsets = order
    none = without_features(x)
    return autograd.forward_by_segment(backend, row_index, offsets, x, none, None, None, weight, None)


def _scaled(features: Tensor, scale: float) -> Tensor:
    return features if scale == 1 else features * scale


def add_base(y: Tensor, base: Maybe) -> Tensor:
    """The sum, in the memory of y, which is a result that nothing else has, where no transform forbids it."""
    if base is None:
        return y
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed() or type(y) is not Tensor:
        return y + base
    if is_watched():
        return y + base
    if y._is_view() and recorded((y, base)):  # autograd would write the whole of what it is a view of
        return y + base
    return y.add_(base)


def eager_apply(backend: str | None, x: Tensor, down: Tensor, up: Tensor, base: Maybe, scale: float) -> Maybe:
    """y of plain tensors, as one node, where one product takes all groups; else None (eager.py).

    That is x [..., X] with A [R, X], x [B, X] with A [B, R, X], or x [B, T, X] with A [B, 1, R, X], B
    likewise, and base as y.
    """
    if backend is None or type(scale) is not float and type(scale) is not int:
        return None
    try:
        *lead, width = x.shape
        *contexts, rank, _ = down.shape
        out = up.shape[-2]
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return None
    if contexts and not (contexts == lead and len(lead) == 1 or len(lead) == 2 and contexts == [lead[0], 1]):
        return None
    tensors = x, down, up, base
    shapes = (*lead, width), (*contexts, rank, width), (*contexts, out, rank), (*lead, out)
    if not all_fit(x.dtype, tensors, shapes) or not x.is_floating_point():
        return None
    if transformed() or is_watched() or not linear.is_plain(*tensors):
        return None
    if recorded(tensors):
        return ApplyLowRankRule.record(*tensors, scale)[0]
    return ApplyLowRankRule.forward(*tensors, scale)[0]


def _as_groups(x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and the factors as linear.py takes them."""
    if down.dim() == 4:
        return x, down.squeeze(1), up.squeeze(1)
    return (x.flatten(0, -2) if down.dim() == 2 and x.dim() > 2 else x), down, up


def _expanded(features: Tensor, up: Tensor, base: Maybe) -> Tensor:
    """B h + base, in one pass where the kernel for that takes it."""
    if base is None:
        return linear.linear(linear.BACKEND, features, up, None)
    base = base.reshape(*features.shape[:-1], up.shape[-2])
    plain = features.dim() == up.dim() and features.shape[-1] > 0 and base.stride(-1) == 1
    if plain and linear.is_direct(linear.BACKEND, features, up, base):
        return linear.ADD(features, up, base)
    return linear.linear(linear.BACKEND, features, up, None).add_(base)


class ApplyLowRankRule(Rule):
    """`eager_apply` in calls that nothing transforms: without jvp and vmap. It keeps the R features."""

    @staticmethod
    def forward(x, down, up, base, scale):
        rows, down, up = _as_groups(x, down, up)
        features = linear.linear(linear.BACKEND, rows, down, None)
        early, late = _scales(scale, x.dtype)
        if early != 1:
            features.mul_(early)
        y = _expanded(features, up, base if late == 1 else None)
        if late != 1:
            y = y.mul_(late) if base is None else torch.add(base.reshape(y.shape), y, alpha=late, out=y)
        if y.dim() != x.dim():
            y.resize_(*x.shape[:-1], y.shape[-1])  # not a view, which could not be changed in place
        return y, features

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, down, up, _, ctx.scale = inputs
        features = output[1]
        ctx.mark_non_differentiable(features)
        ctx.save_for_backward(x, down, up, features)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None, None, None
        x, down, up, features = ctx.saved_tensors
        early, late = _scales(ctx.scale, x.dtype)
        of_x, of_down, of_up, of_base, _ = wanted(ctx, grad.numel() * features.shape[-1])
        rows, first, second = _as_groups(x, down, up)
        if of_up and torch.is_grad_enabled():  # the features are to be differentiated again
            features = _scaled(linear.linear(linear.BACKEND, rows, first, None), early)
        of_rows = grad if rows.dim() == grad.dim() else grad.flatten(0, -2)
        want = of_x or of_down, of_up, False
        d_features, dup, _ = linear.linear_grads(linear.BACKEND, want, of_rows, features, second)
        dup = None if dup is None else _scaled(dup, late)
        dx = ddown = None
        if d_features is not None:
            want = of_x, of_down, False
            d_features = _scaled(d_features, ctx.scale)
            dx, ddown, _ = linear.linear_grads(linear.BACKEND, want, d_features, rows, first)
        return (
            None if dx is None else dx.reshape(x.shape),
            None if ddown is None else ddown.reshape(down.shape),
            None if dup is None else dup.reshape(up.shape),
            grad if of_base else None,
            None,
        )
