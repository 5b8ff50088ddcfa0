"""The arguments of the adaptive-norm block: what they have to be, and what they become."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..ops import activations
from ..ops.checks import (
    all_fit,
    broadcast,
    check_activation,
    check_number,
    check_rank,
    check_shape,
    check_tensors,
    is_coefficient,
)
from ..ops.dtypes import FLOATING
from ..ops.modulate import reference as modulate_reference
from ._arguments import promoted_dtype

NormName = Literal["layer", "rms", "group"]
NORMS: tuple[NormName, ...] = get_args(NormName)
Maybe = Tensor | None
NAMES = ("x", "h", "gate", "scale", "shift", "weight", "bias")


class Rule(NamedTuple):
    """All arguments but the tensors."""

    norm: str
    groups: int | None
    eps: float
    activation: str
    scale_offset: float


def residual_fits(x: Any, h: Any, gate: Any) -> bool:
    try:
        shape = x.shape
        of_gate = shape if gate is None else gate.shape
        known = broadcast(shape, of_gate) == shape
    except (AttributeError, RuntimeError):
        return False
    return h is not None and known and all_fit(x.dtype, (x, h, gate), (shape, shape, of_gate))


def fits(op: str, tensors: Sequence[Any], rule: Rule) -> bool:
    """Whether the arguments are right and none has to be cast."""
    x, h, gate, scale, shift, weight, bias = tensors
    norm, groups, eps, activation, scale_offset = rule
    try:
        shape = x.shape
        contexts = [shape if t is None else t.shape for t in (gate, scale, shift)]
    except (AttributeError, RuntimeError):  # no tensor, or a nested one
        return False
    rank = len(shape)
    if norm == "group":
        if type(groups) is not int or groups < 1 or rank < 2 or shape[1] % groups:
            return False
        channels = shape[1:2]
    elif (norm != "layer" and norm != "rms") or groups is not None or rank < 1:
        return False
    else:
        channels = shape[-1:]
    for own in contexts:
        if own != shape and broadcast(shape, own) != shape:
            return False
    return (
        activation in activations.NAMES
        and is_coefficient(scale_offset)
        and is_coefficient(eps)
        and eps >= 0
        and (h is not None or op == "norm_modulate")
        and all_fit(x.dtype, tensors, (shape, shape, *contexts, channels, channels))
    )


def prepared(op: str, tensors: tuple[Any, ...], rule: Rule) -> tuple[tuple[Any, ...], Rule]:
    """The checked arguments, of one dtype."""
    required = 1 if op == "norm_modulate" else 2
    dtype = promoted_dtype(op, NAMES, tensors, required)
    if dtype is not None:
        tensors, rule = _cast(op, dtype, tensors, rule)
    _check(op, tensors, rule, required)
    return tensors, rule


def _cast(op: str, dtype: torch.dtype, tensors: Sequence[Any], rule: Rule) -> tuple[tuple[Any, ...], Rule]:
    """Tensors of one dtype. A scale that is a number and loses digits is activated before the cast."""
    scale, tensors = tensors[3], list(tensors)
    if scale is not None and torch.promote_types(scale.dtype, dtype) != dtype:
        _check_rule(op, rule)
        tensors[3] = modulate_reference.gate(scale, rule.activation, rule.scale_offset)
        rule = rule._replace(activation="identity", scale_offset=0.0)
    return tuple(None if t is None else t.to(dtype) for t in tensors), rule


def _check_rule(op: str, rule: Rule) -> None:
    norm, groups, eps, activation, scale_offset = rule
    if not isinstance(norm, str) or norm not in NORMS:
        raise ValueError(f"{op}: norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    check_activation(op, activation, activations.NAMES)
    check_number(op, "scale_offset", scale_offset)
    check_number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}: eps: expected a number that is not negative, got {eps}")
    if norm != "group":
        if groups is not None:
            raise ValueError(f"{op}: groups: expected None, as norm is {norm!r}, got {groups!r}")
    elif groups is None:
        raise ValueError(f"{op}: groups: expected the number of groups, as norm is 'group', got None")
    elif isinstance(groups, bool) or not isinstance(groups, int | torch.SymInt):
        raise TypeError(f"{op}: groups: expected an int, got {type(groups).__name__}")


def _check(op: str, tensors: Sequence[Any], rule: Rule, required: int) -> None:
    _check_rule(op, rule)
    check_tensors(op, NAMES, tensors, required, FLOATING)
    x, h, gate, scale, shift, weight, bias = tensors
    check_rank(op, "x", x, 2 if rule.norm == "group" else 1)
    channels = x.shape[1] if rule.norm == "group" else x.shape[-1]
    if rule.groups is not None and (rule.groups < 1 or channels % rule.groups):
        raise ValueError(f"{op}: groups: expected a positive divisor of C={channels}, got {rule.groups}")
    _check_like(op, x, h, {"gate": gate, "scale": scale, "shift": shift})
    check_shape(op, "weight", weight, {"C": channels})
    check_shape(op, "bias", bias, {"C": channels})


def _check_like(op: str, x: Tensor, h: Maybe, contexts: dict[str, Maybe]) -> None:
    """h has the shape of x, and the contexts broadcast to it."""
    if h is not None and h.shape != x.shape:
        raise ValueError(f"{op}: h: expected shape {list(x.shape)} (that of x), got {list(h.shape)}")
    for name, tensor in contexts.items():
        if tensor is not None and broadcast(x.shape, tensor.shape) != x.shape:
            raise ValueError(
                f"{op}: {name}: expected a shape that broadcasts to that of x {list(x.shape)},"
                f" got {list(tensor.shape)}"
            )


def check_residual(op: str, x: Any, h: Any, gate: Any) -> torch.dtype | None:
    """The dtype that differing ones are promoted to."""
    names, tensors = NAMES[:3], (x, h, gate)
    dtype = promoted_dtype(op, names, tensors, 2)
    if dtype is None:
        check_tensors(op, names, tensors, 2, FLOATING)
    else:  # each by itself: whether one is cast as it is read, modulation decides
        for name, tensor in zip(names, tensors, strict=True):
            check_tensors(op, (name,), (tensor,), 0 if name == "gate" else 1, FLOATING)
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{op}: {name}: expected device {x.device} (that of x), got {tensor.device}")
    check_rank(op, "x", x, 1)
    _check_like(op, x, h, {"gate": gate})
    return dtype
