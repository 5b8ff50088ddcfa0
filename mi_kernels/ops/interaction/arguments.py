"""Argument checks of the dense interaction, shared by all public names of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import (
    broadcast,
    broadcast_leading,
    check_index,
    check_index_values,
    check_rank,
    check_shape,
    check_tensors,
)
from . import segments


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
    spelling: Spelling,
    x: Tensor,
    z: Tensor,
    *weights: Tensor | None,
    segment_ids: Tensor | None = None,
    weight_ids: Tensor | None = None,
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
    batched = spelling is INTERACTION
    if weight_ids is not None:
        ids = check_index(op, "weight_ids", weight_ids, x)
        lead = common_lead(op, "weight_ids", ids.shape, lead)
    groups = None
    for name, tensor, names in zip(weight_names, weights, axes, strict=True):
        if tensor is None:
            continue
        expected = {axis: sizes[axis] for axis in names}
        more = tensor.dim() - len(names)
        if more <= 0 or not batched:
            check_shape(op, name, tensor, expected)
        elif weight_ids is not None:
            check_shape(op, name, tensor, {"G": groups, **expected})
            groups = tensor.shape[0]
        else:
            check_features(op, name, tensor, expected)
            lead = common_lead(op, name, tensor.shape[:more], lead)
        sizes[o_axis] = tensor.shape[more]
    if weight_ids is not None:
        if groups is None:
            known = ", ".join(weight_names)
            raise ValueError(
                f"{op}: weight_ids: expected one of {known} to have a leading dimension G, got none"
            )
        if not segments.opaque(weight_ids):
            check_index_values(op, "weight_ids", weight_ids, groups)
    return lead


def check_features(op: str, name: str, tensor: Tensor, expected: dict[str, int | None]) -> None:
    """The last sizes of a tensor with leading dimensions."""
    own = tensor.shape[tensor.dim() - len(expected) :]
    if any(size not in (None, found) for size, found in zip(expected.values(), own, strict=True)):
        axes = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in expected.items())
        raise ValueError(f"{op}: {name}: expected shape [..., {axes}], got {list(tensor.shape)}")


def common_lead(op: str, name: str, shape: torch.Size, lead: torch.Size) -> torch.Size:
    """The broadcast of ``lead`` and the leading dimensions of one more argument."""
    common = broadcast(lead, shape)
    if common is None:
        raise ValueError(
            f"{op}: {name}: expected leading dimensions that broadcast with {list(lead)} (those of the"
            f" arguments before it), got {list(shape)}"
        )
    return common
