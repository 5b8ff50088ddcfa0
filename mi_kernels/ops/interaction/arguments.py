"""Argument checks of the dense interaction, shared by all public names of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from mi_kernels.ops.checks import broadcast_leading, check_rank, check_shape, check_tensors
from mi_kernels.ops.interaction import segments


class Spelling(NamedTuple):
    """The names that a public function uses for itself, x, z, W, U, V, c, and the axes O, Z, X."""

    op: str
    arguments: tuple[str, ...]
    axes: tuple[str, str, str]
    required: int


INTERACTION = Spelling(
    "interaction", ("x", "z", "weight", "weight_z", "weight_x", "bias"), ("O", "Z", "X"), 2
)
BILINEAR = Spelling(
    "bilinear", ("input2", "input1", "weight", "weight_z", "weight_x", "bias"), ("out", "in1", "in2"), 3
)


def check_arguments(
    spelling: Spelling, x: Tensor, z: Tensor, *weights: Tensor | None, segment_ids: Tensor | None = None
) -> torch.Size:
    """Check the arguments; returns the broadcast leading dimensions."""
    op, (x_name, z_name, *weight_names), (o_axis, z_axis, x_axis), required = spelling
    check_tensors(op, spelling.arguments, (x, z, *weights), required)
    check_rank(op, x_name, x, 1)
    check_rank(op, z_name, z, 1)
    if segment_ids is None:
        lead = broadcast_leading(op, (x_name, z_name), x, z)
    else:
        check_shape(op, x_name, x, {"N": None, x_axis: None})
        check_shape(op, z_name, z, {"G": None, z_axis: None})
        segments.check_segment_ids(op, segment_ids, x, z.shape[0])
        lead = x.shape[:-1]
    if all(weight is None for weight in weights):
        raise ValueError(f"{op}: expected at least one of {', '.join(weight_names)}, got None for all")
    sizes: dict[str, int | None] = {o_axis: None, z_axis: z.shape[-1], x_axis: x.shape[-1]}
    axes = ((o_axis, z_axis, x_axis), (o_axis, z_axis), (o_axis, x_axis), (o_axis,))
    for name, tensor, names in zip(weight_names, weights, axes, strict=True):
        if tensor is not None:
            check_shape(op, name, tensor, {axis: sizes[axis] for axis in names})
            sizes[o_axis] = tensor.shape[0]
    return lead
