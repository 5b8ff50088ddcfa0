"""Plans of modulation for :func:`mi_kernels.explain`."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from mi_kernels.ops import backend as backends
from mi_kernels.ops import counts
from mi_kernels.ops.modulate import small
from mi_kernels.ops.plan import Plan
from mi_kernels.ops.rules import gradients_wanted

_WHY = {
    "one pass": "x is read once and y written once; the activation is computed once for all"
    " rows that share a scale",
    "one pass, sums": "x and g are read once; dx, dscale and dshift are computed in the same pass",
    "elementwise": "PyTorch's own operations, one after the other",
    small.ALGORITHM: "few elements: PyTorch's own operations cost less than a kernel's call",
}


def modulate(
    backend: str, shape: torch.Size, x: Tensor, scale: Tensor, shift: Tensor | None, few: bool = False
) -> Plan:
    """The plan of checked arguments on ``backend``, or with ``few`` that of small.py."""
    elements, item = math.prod(shape), x.element_size()
    sizes = (elements, scale.numel(), 0 if shift is None else shift.numel())
    fused = backends.get(backend).fused and not few

    def step(op: str, algorithm: str, count: counts.Count, scratch: int | None) -> Plan:
        algorithm = algorithm if fused else small.ALGORITHM if few else "elementwise"
        return Plan(op, backend, algorithm, count.operations, count.bytes, scratch, _WHY[algorithm])

    backward: tuple[Plan, ...] = ()
    if any(gradients_wanted((x, scale, shift))):
        backward = (step("modulate_grads", "one pass, sums", counts.modulate_grads(sizes, item), None),)
    forward = step("modulate", "one pass", counts.modulate(sizes, item), 0 if fused else None)
    return replace(forward, backward=backward)
