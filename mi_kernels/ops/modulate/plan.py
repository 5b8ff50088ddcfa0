"""Plans of modulation for :func:`mi_kernels.explain`."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mi_kernels.ops import backend as backends
from mi_kernels.ops import counts
from mi_kernels.ops.modulate import mixed, small
from mi_kernels.ops.plan import Plan
from mi_kernels.ops.rules import gradients_wanted

_WHY = {
    "one pass": "x is read once and y written once; the activation is computed once for all"
    " rows that share a scale",
    "one pass, sums": "x and g are read once; dx, dscale and dshift are computed in the same pass",
    "elementwise": "PyTorch's own operations, one after the other",
    mixed.ALGORITHM: "PyTorch's own operations, which cast as they read",
    small.ALGORITHM: "few elements: PyTorch's own operations cost less than a kernel's call",
}


def modulate(
    backend: str, shape: torch.Size, x: Tensor, scale: Tensor, shift: Tensor | None, own: str | None = None
) -> Plan:
    """The plan of checked arguments on ``backend``, or by the algorithm ``own``, of PyTorch's operations."""
    elements, item = math.prod(shape), x.element_size()
    sizes = (elements, scale.numel(), 0 if shift is None else shift.numel())
    fused = backends.get(backend).fused and own is None

    def step(op: str, algorithm: str, count: counts.Count, scratch: int | None) -> Plan:
        algorithm = algorithm if fused else own or "elementwise"
        return Plan(op, backend, algorithm, count.operations, count.bytes, scratch, _WHY[algorithm])

    backward: tuple[Plan, ...] = ()
    if any(gradients_wanted((x, scale, shift))):
        backward = (step("modulate_grads", "one pass, sums", counts.modulate_grads(sizes, item), None),)
    forward = step("modulate", "one pass", counts.modulate(sizes, item), 0 if fused else None)
    return replace(forward, backward=backward)


def with_casts(
    plan: Plan, names: Sequence[str], tensors: Sequence[Tensor | None], dtype: torch.dtype
) -> Plan:
    """The plan with the copies of tensors of other dtypes than ``dtype``, which are made first."""
    moved, copies, copied = plan.bytes, 0, []
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None or tensor.dtype == dtype:
            continue
        size, own = tensor.numel() * dtype.itemsize, tensor.numel() * tensor.element_size()
        if name == "x" and plan.algorithm == mixed.ALGORITHM and not tensor.is_cpu:
            moved += own - size  # read where it is
            continue
        moved, copies = moved + own + size, copies + size
        copied.append(name)
    kind = str(dtype).removeprefix("torch.")
    why = f"{plan.why}; {' and '.join(copied)} cast to {kind} first, as PyTorch promotes dtypes"
    scratch = None if plan.scratch is None else plan.scratch + copies
    return replace(plan, bytes=moved, scratch=scratch, why=why if copied else plan.why)
