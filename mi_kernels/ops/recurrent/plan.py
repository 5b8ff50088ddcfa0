"""Plans of multiplicative RNNs for :func:`mi_kernels.explain`."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from .. import backend as backends
from .. import counts
from ..plan import Plan
from ..rules import Maybe, gradients_wanted

_ALL = "all steps in one call"
_EACH = "a step at a time"
_WHY = {
    _ALL: "products with x are one over all steps; a step is products with the state, and what is elementwise"
    " is computed with them",
    _EACH: "products with x are one over all steps; each step is PyTorch's operations, one after the other",
}
_LOW = "; the backward pass makes the steps of each chunk of {} again"
_BACK = (
    "through time from what the forward pass kept; the gradients of the weights are products over all steps"
)


def plan(
    backend: str,
    steps: int,
    rows: int,
    of_x: Sequence[Maybe],  # the weights that are multiplied by x
    of_state: Sequence[Maybe],  # those that are multiplied in each step
    tensors: Sequence[Maybe],  # all arguments
    features: int,  # P
    memory: str,
) -> Plan:
    """The plan of checked arguments on ``backend``."""
    algorithm = _ALL if backends.get(backend).fused else _EACH
    itemsize = next(t.element_size() for t in tensors if t is not None)
    matrices = _elements(of_x) + _elements(of_state)
    count = counts.recurrent(
        steps * rows, matrices, _elements(tensors), rows * (steps + 1) * features, itemsize
    )
    chunk = max(math.isqrt(steps), 1)
    wanted = any(gradients_wanted(tensors))
    why = _WHY[algorithm] + (_LOW.format(chunk) if memory == "low" and wanted else "")
    products = steps * rows * sum(_rows(t) for t in of_x) * itemsize
    forward = Plan("multiplicative_rnn", backend, algorithm, count.operations, count.bytes, products, why)
    if not wanted:
        return forward
    back = Plan("recurrent_grads", backend, algorithm, 2 * count.operations, 2 * count.bytes, None, _BACK)
    return replace(forward, backward=(back,))


def _elements(tensors: Sequence[Maybe]) -> int:
    return sum(t.numel() for t in tensors if t is not None)


def _rows(weight: Tensor | None) -> int:
    return 0 if weight is None else weight.shape[0]
