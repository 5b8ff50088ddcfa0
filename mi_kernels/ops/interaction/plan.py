"""Plans of the dense interaction for :func:`mi_kernels.explain`.

The algorithm of each primitive is the backend's answer (planners.py); operations and bytes are those of the
formula. The plan is a pure function of shapes, dtype, instruction set and wanted gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend as backends
from .. import counts
from ..backend import DenseCall
from ..plan import Plan
from ..rules import gradients_wanted
from . import portable


class Shape(NamedTuple):
    """The sizes of a call with leading dimensions of x and of z."""

    x_lead: tuple[int, ...]
    z_lead: tuple[int, ...]
    context: int
    width: int
    out: int

    @property
    def lead(self) -> torch.Size:
        return torch.broadcast_shapes(self.x_lead, self.z_lead)

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    def sizes(self) -> list[tuple[int, ...]]:
        o, z, x = self.out, self.context, self.width
        return [(*self.x_lead, x), (*self.z_lead, z), (o, z, x), (o, z), (o, x), (o,)]


def plan(backend: str, x: Tensor, z: Tensor, weights: Sequence[Tensor | None]) -> Plan:
    """The plan of checked arguments x, z and (W, U, V, c) on ``backend``, without sharing of contexts."""
    out = portable.out_features(*weights)
    shape = Shape(tuple(x.shape[:-1]), tuple(z.shape[:-1]), z.shape[-1], x.shape[-1], out)
    planner, present = backends.get(backend).planner, tuple(weight is not None for weight in weights)
    wanted = gradients_wanted((x, z, *weights))

    def step(primitive: str, terms: tuple[bool, ...]) -> Plan:
        count = getattr(counts, primitive)(shape, x.dtype, terms)
        sizes = shape.rows, shape.context, shape.width, shape.out
        call = DenseCall(primitive, sizes, x, z, weights, terms, wanted)
        answer = planner.dense(call)
        return Plan(primitive, backend, answer.algorithm, count.operations, count.bytes, *answer[1:])

    backward = []
    if any(wanted[:2]):
        backward.append(step("input_grads", present))
    if any(wanted[2:]):
        backward.append(step("weight_grads", tuple(wanted[2:])))
    forward = step("forward", present)
    if forward.scratch is not None:
        rows = sum(_broadcast_copy(tensor, shape.lead) for tensor in (x, z))
        forward = replace(forward, scratch=forward.scratch + rows)
    return replace(forward, backward=tuple(backward))


def _broadcast_copy(tensor: Tensor, lead: torch.Size) -> int:
    """Bytes of the copy that broadcasts x or z to all rows, 0 where a view does."""
    expanded = tensor.expand(*lead, tensor.shape[-1])
    try:
        expanded.view(math.prod(lead), tensor.shape[-1])
    except RuntimeError:
        return expanded.numel() * expanded.element_size()
    return 0
