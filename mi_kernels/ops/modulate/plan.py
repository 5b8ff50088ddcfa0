"""Plans of modulation and of mixtures for :func:`mi_kernels.explain`."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import backend as backends
from .. import counts
from ..plan import Plan
from ..rules import gradients_wanted
from . import mixed, small

_WHY = {
    "one pass": "x is read once and y written once; the activation is computed once for all"
    " rows that share a scale",
    "one pass, mixed": "a and b are read once and y written once; the activation is computed once for all"
    " rows that share a gate",
    "one pass, mixed sums": "a, b and g are read once; da, db and dgate are computed in the same pass",
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
    counted = counts.modulate(sizes, item), counts.modulate_grads(sizes, item)
    return _plan(backend, "modulate", "one pass", counted, (x, scale, shift), own)


def mix(backend: str, shape: torch.Size, a: Tensor, b: Tensor, gate: Tensor, own: str | None = None) -> Plan:
    """The same of a mixture."""
    sizes, item = (math.prod(shape), gate.numel()), a.element_size()
    counted = counts.mix(sizes, item), counts.mix_grads(sizes, item)
    return _plan(backend, "mix", "one pass, mixed", counted, (a, b, gate), own)


def _plan(
    backend: str,
    op: str,
    algorithm: str,
    counted: tuple[counts.Count, counts.Count],
    tensors: Sequence[Tensor | None],
    own: str | None,
) -> Plan:
    fused = backends.get(backend).fused and own is None

    def step(op: str, algorithm: str, count: counts.Count, scratch: int | None) -> Plan:
        algorithm = algorithm if fused else own or "elementwise"
        return Plan(op, backend, algorithm, count.operations, count.bytes, scratch, _WHY[algorithm])

    backward: tuple[Plan, ...] = ()
    if any(gradients_wanted(tensors)):
        sums = f"{algorithm} sums" if op == "mix" else f"{algorithm}, sums"
        backward = (step(f"{op}_grads", sums, counted[1], None),)
    return replace(step(op, algorithm, counted[0], 0 if fused else None), backward=backward)


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
