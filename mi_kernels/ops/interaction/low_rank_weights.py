"""Generated weights of low rank, y = base + scale * B (A x): A is ``down``, to R features, B is ``up``.

Two products without W, each with its factor read where it lies, whatever rows share it: nothing is larger
than x, y and the R features of each row. The scale multiplies these.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mi_kernels.ops.checks import all_fit, broadcast
from mi_kernels.ops.interaction import autograd, eager, segments, shared
from mi_kernels.ops.rules import Maybe, recorded, transformed, without_features


def apply(
    backend: str, x: Tensor, down: Tensor, up: Tensor, base: Maybe, scale: float, segment_ids: Maybe
) -> Tensor:
    """y [..., O] of x [..., X], A [..., R, X] and B [..., O, R]; with segment_ids, of rows and groups."""
    if segment_ids is None:
        y = _product(backend, _scaled(_product(backend, x, down), scale), up)
    elif segments.is_mapped(segment_ids):  # each row gets its own copy of its factors
        features = segments.apply_by_segment(backend, segment_ids, x, down, None)
        y = segments.apply_by_segment(backend, segment_ids, _scaled(features, scale), up, None)
    else:
        order = segments.grouping(segment_ids, down.shape[0])
        y = _by_segment(backend, order, _scaled(_by_segment(backend, order, x, down), scale), up)
    return add_base(y, base)


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
    if torch.compiler.is_compiling() or transformed() or type(y) is not Tensor:
        return y + base
    if y._is_view() and recorded((y, base)):  # autograd would write the whole of what it is a view of
        return y + base
    return y.add_(base)


def eager_apply(backend: str | None, x: Tensor, down: Tensor, up: Tensor, base: Maybe, scale: float) -> Maybe:
    """The commonest calls (eager.py), else None: those of `eager.apply_generated`, base as y."""
    if backend is None or type(scale) is not float and type(scale) is not int:
        return None
    try:
        *lead, _ = x.shape
        out = up.shape[-2]
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return None
    if not x.is_floating_point() or not all_fit(x.dtype, (base,), ((*lead, out),)):
        return None
    features = eager.apply_generated(backend, x, down, None)
    if features is None:
        return None
    y = eager.apply_generated(backend, _scaled(features, scale), up, None)
    return y if y is None else add_base(y, base)
