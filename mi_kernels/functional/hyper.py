"""The public functions of hypernetworks: generate weights from contexts, apply generated weights."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops.backend import get
from ..ops.checks import (
    broadcast,
    broadcast_leading,
    broadcast_like,
    check_number,
    check_rank,
    check_shape,
    check_tensors,
)
from ..ops.interaction import eager, low_rank_weights, plan_generated, reference, segments, shared
from ..ops.interaction.arguments import check_features, common_lead
from ..ops.library import Axes
from ..ops.plan import Plan
from ..parallel import calls as distributed
from ._arguments import autocast, expand_bias

__all__ = ["apply_generated", "apply_low_rank", "generate"]


def generate(
    z: Tensor,  # [..., Z]
    weight: Tensor | None,  # [O, Z, X]
    weight_z: Tensor | None = None,  # [O, Z]
    weight_x: Tensor | None = None,  # [O, X]
    bias: Tensor | None = None,  # [O]
) -> tuple[Tensor, Tensor | None]:
    r"""A hypernetwork: the weights and the bias of an affine layer, generated from a context.

    .. math:: W'_{oj} = \sum_i z_i W_{oij} + V_{oj}, \quad b'_o = \sum_i U_{oi} z_i + c_o

    Args:
        z: contexts of shape ``[..., Z]``.
        weight: W of shape ``[O, Z, X]``, or None.
        weight_z: U of shape ``[O, Z]``, optional.
        weight_x: V of shape ``[O, X]``, optional.
        bias: c of shape ``[O]``, optional; ``[1, O]`` and scalars are accepted.

    Returns:
        W' of shape ``[..., O, X]`` and b' of shape ``[..., O]``, or None for b' without U and c.
        ``W' x + b'`` is :func:`mi_kernels.interaction`. W' is in a memory order that :func:`apply_generated`
        reads in place; ``view`` may need ``contiguous`` first. Its axes O and X are as in the memory of W,
        and where z is between them there, the contexts are here: ``[O, ..., X]`` for a contiguous W.

    Dtypes, devices and derivatives (of any order) as :func:`mi_kernels.interaction`.

    Raises:
        TypeError: an argument is no dense tensor, or its dtype is unsupported or not that of ``z``.
        ValueError: a rank, size or device does not fit, or W and V are both None.

    Source: Ha et al., "HyperNetworks", ICLR 2017; Jayakumar et al., "Multiplicative Interactions and Where to
    Find Them", ICLR 2020, section 3.

    Example:
        >>> weight, bias = mi.generate(torch.randn(2, 3), torch.randn(4, 3, 5), torch.randn(4, 3))
        >>> weight.shape, bias.shape
        (torch.Size([2, 4, 5]), torch.Size([2, 4]))
    """
    found = eager.generate(backends.eager_cpu(z), z, weight, weight_z, weight_x, bias)
    if found is not None:
        return found
    z, weight, weight_z, weight_x, bias = autocast((z, weight, weight_z, weight_x, bias))
    bias = expand_bias(bias, weight, weight_z, weight_x)
    _check_generate(z, weight, weight_z, weight_x, bias)
    if distributed.given(z, weight, weight_z, weight_x, bias):
        return _generate_on_parts(z, weight, weight_z, weight_x, bias)
    chosen = backends.choose(z)
    lead, generated, offset = z.shape[:-1], None, None
    if get(chosen).is_reference:
        generated, offset = reference.generate(z, weight, weight_z, weight_x, bias)
    else:
        contexts = z.reshape(math.prod(lead), z.shape[-1])  # lead.numel() would be a constant in jit.trace
        generated, offset = shared.generate(chosen, contexts, weight, weight_z, weight_x, bias)
    assert generated is not None
    # Without W or U these are V and c: clone, as results must not share memory with arguments.
    generated = generated.clone() if weight is None else generated
    if offset is not None:
        offset = offset.clone() if weight_z is None else offset
        offset = offset.view(*lead, offset.shape[-1])
    return generated.view(*lead, *generated.shape[-2:]), offset


def apply_generated(
    x: Tensor,  # [..., X]
    weight: Tensor,  # [..., O, X]
    bias: Tensor | None = None,  # [..., O]
    *,
    segment_ids: Tensor | None = None,  # [N]
) -> Tensor:
    r"""Applies generated layers to inputs, each to its own.

    .. math:: y_o = \sum_j W'_{oj} x_j + b'_o

    Args:
        x: inputs of shape ``[..., X]``.
        weight: W' of shape ``[..., O, X]``, as :func:`generate` returns it. Its leading dimensions broadcast
            with those of ``x``: ``[B, 1, O, X]`` for tokens ``[B, T, X]`` makes the tokens of a sample the
            rows of one product, without copies of W'.
        bias: b' of shape ``[..., O]``, whose leading dimensions broadcast to those of ``weight``. Optional.
        segment_ids: for inputs in groups of unequal length. ``x [N, X]``, ``weight [G, O, X]`` and
            ``bias [G, O]``; row n belongs to group ``segment_ids[n]``. See :func:`mi_kernels.interaction`.

    Returns:
        y of shape ``[..., O]``, contiguous, in the dtype of the inputs (the autocast dtype under autocast).

    With ``segment_ids`` the rows of a layer are one product, wherever they are: neither W' nor all of ``x``
    is copied. ``torch.vmap`` over ``segment_ids`` is the exception: each row gets its own copy of its W'
    (N O X elements). Under ``torch.compile`` (and other tracers) values out of range are detected when the
    graph runs.

    Dtypes, devices and derivatives (of any order) as :func:`mi_kernels.interaction`.

    Raises:
        TypeError: an argument is no dense tensor, or its dtype is unsupported or not that of ``x``.
        ValueError: a rank, size, device or group number does not fit.

    Source: Ha et al., "HyperNetworks", ICLR 2017.

    Example:
        >>> tokens, weight, bias = torch.randn(2, 7, 5), torch.randn(2, 1, 4, 5), torch.randn(2, 1, 4)
        >>> mi.apply_generated(tokens, weight, bias).shape
        torch.Size([2, 7, 4])
    """
    y = eager.apply_generated(backends.eager_cpu(x), x, weight, bias) if segment_ids is None else None
    if y is not None:
        return y
    x, weight, bias = autocast((x, weight, bias))
    segment_ids = distributed.whole_index(segment_ids)
    lead = _check_apply(x, weight, bias, segment_ids)
    if distributed.given(x, weight, bias):
        return _apply_on_parts(x, weight, bias, segment_ids)
    if bias is not None:
        bias = bias.expand(weight.shape[:-1])
    chosen = backends.choose(x)
    if segment_ids is not None:
        if get(chosen).is_reference:
            rows = None if bias is None else segments.gather_rows(bias, segment_ids)
            return reference.apply_generated(x, segments.gather_rows(weight, segment_ids), rows)
        return segments.apply_by_segment(chosen, segment_ids, x, weight, bias)
    if get(chosen).is_reference:
        return reference.apply_generated(x, weight, bias)
    layout = shared.layout_of(x.shape[:-1], weight.shape[:-2], lead)
    offset = None if bias is None else layout.contexts(bias, 1)
    y = shared.apply_generated(chosen, layout.rows(x), layout.contexts(weight, 2), offset)
    return layout.result(y)


def apply_low_rank(
    x: Tensor,  # [..., X]
    down: Tensor,  # [..., R, X]
    up: Tensor,  # [..., O, R]
    base: Tensor | None = None,  # [..., O]
    *,
    scale: float = 1.0,
    segment_ids: Tensor | None = None,  # [N]
) -> Tensor:
    r"""Applies generated layers of low rank to inputs, each to its own, as a hypernetwork of LoRA does.

    .. math:: y_o = base_o + scale \sum_r B_{or} \sum_j A_{rj} x_j

    Args:
        x: inputs of shape ``[..., X]``.
        down: A of shape ``[..., R, X]``. Its leading dimensions broadcast with those of ``x`` as those of the
            weight of :func:`apply_generated` do: ``[R, X]`` is that of all, ``[B, 1, R, X]`` for tokens
            ``[B, T, X]`` has one for each sample.
        up: B of shape ``[..., O, R]``, likewise; the two need not have the same leading dimensions.
        base: what is added, of a shape that broadcasts to that of y, such as the output of the layer that is
            adapted. Optional.
        scale: a number; for integer dtypes an int.
        segment_ids: for inputs in groups of unequal length. ``x [N, X]``, ``down [G, R, X]`` and
            ``up [G, O, R]``; row n belongs to group ``segment_ids[n]``. See :func:`mi_kernels.interaction`.

    Returns:
        y of shape ``[..., O]``, contiguous, in the dtype of the inputs (the autocast dtype under autocast).

    No factor is repeated for the rows that share it: the memory is that of the factors, and R elements a row
    (rounded to the dtype of the inputs) between the two products. ``torch.vmap`` over ``segment_ids`` is the
    exception, as for :func:`apply_generated`.

    Dtypes, devices and derivatives (of any order) as :func:`mi_kernels.interaction`.

    Raises:
        TypeError: an argument is no dense tensor, its dtype is unsupported or not that of ``x``, or ``scale``
            is no such number.
        ValueError: a rank, size, device or group number does not fit.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; Charakorn et al.,
    "Text-to-LoRA: Instant Transformer Adaption", ICML 2025.

    Example:
        >>> tokens, down, up = torch.randn(2, 7, 5), torch.randn(2, 1, 3, 5), torch.randn(2, 1, 4, 3)
        >>> mi.apply_low_rank(tokens, down, up, torch.zeros(2, 7, 4), scale=0.5).shape
        torch.Size([2, 7, 4])
    """
    if segment_ids is None:
        y = low_rank_weights.eager_apply(backends.eager_cpu(x), x, down, up, base, scale)
        if y is not None:
            return y
    x, down, up, base = autocast((x, down, up, base))
    segment_ids = distributed.whole_index(segment_ids)
    _check_low_rank(x, down, up, base, scale, segment_ids)
    if distributed.given(x, down, up, base):
        return _low_rank_on_parts(x, down, up, base, scale, segment_ids)
    chosen = backends.choose(x)
    if get(chosen).is_reference:
        if segment_ids is not None:
            down, up = (segments.gather_rows(factor, segment_ids) for factor in (down, up))
        return reference.apply_low_rank(x, down, up, base, scale)
    # Once more: autocast has cast what the first look refused.
    if segment_ids is None and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        y = low_rank_weights.eager_apply(chosen if chosen == "cpu" else None, x, down, up, base, scale)
        if y is not None:
            return y
    return low_rank_weights.apply(chosen, x, down, up, base, scale, segment_ids)


def _generate_on_parts(z: Any, weight: Any, weight_z: Any, weight_x: Any, bias: Any) -> Any:
    """W' and b' of DTensors."""
    axes = {"z": "*Z", "weight": "OZX", "weight_z": "OZ", "weight_x": "OX", "bias": "O"}
    tensors = dict(zip(axes, (z, weight, weight_z, weight_x, bias), strict=True))
    layer = Axes("*OX", (("z", "weight"), ("weight_x",)))
    offset = None if weight_z is None and bias is None else Axes("*O", (("z", "weight_z"), ("bias",)))
    return distributed.run("generate", generate, tensors, axes, (layer, offset), "*OZX")


def _apply_on_parts(x: Any, weight: Any, bias: Any, segment_ids: Any) -> Any:
    """y of DTensors."""
    lead = "*" if segment_ids is None else "G"
    axes = {"x": "*X", "weight": lead + "OX", "bias": lead + "O", "segment_ids": "*"}
    if bias is not None and bias.shape[-1] != weight.shape[-2]:
        bias = bias.expand(*bias.shape[:-1], weight.shape[-2])
    if bias is not None and segment_ids is not None and bias.shape != weight.shape[:-1]:
        bias = bias.expand(weight.shape[:-1])
    tensors = {"x": x, "weight": weight, "bias": bias, "segment_ids": segment_ids}
    result = Axes("*O", (("x", "weight"), ("bias",)))
    return distributed.run("apply_generated", apply_generated, tensors, axes, (result,), "*OX")


def _low_rank_on_parts(x: Any, down: Any, up: Any, base: Any, scale: Any, segment_ids: Any) -> Any:
    """y of DTensors."""
    lead = "*" if segment_ids is None else "G"
    axes = {"x": "*X", "down": lead + "RX", "up": lead + "OR", "base": "*O", "segment_ids": "*"}
    if base is not None and base.shape[-1:] != up.shape[-2:-1]:
        base = base.expand(*base.shape[:-1], up.shape[-2])
    tensors = {"x": x, "down": down, "up": up, "base": base, "segment_ids": segment_ids}
    result = Axes("*O", (("x", "down", "up"), ("base",)))
    function = functools.partial(apply_low_rank, scale=scale)
    return distributed.run("apply_low_rank", function, tensors, axes, (result,), "*ORX")


def _check_generate(z: Any, weight: Any, weight_z: Any, weight_x: Any, bias: Any) -> None:
    op, names = "generate", ("z", "weight", "weight_z", "weight_x", "bias")
    check_tensors(op, names, (z, weight, weight_z, weight_x, bias), 1)
    check_rank(op, "z", z, 1)
    if weight is None and weight_x is None:
        raise ValueError(f"{op}: expected at least one of weight, weight_x, got None for both")
    sizes: dict[str, int | None] = {"O": None, "Z": z.shape[-1], "X": None}
    for name, tensor, axes in zip(names[1:], (weight, weight_z, weight_x, bias), _AXES, strict=True):
        if tensor is not None:
            check_shape(op, name, tensor, {axis: sizes[axis] for axis in axes})
            sizes |= dict(zip(axes, tensor.shape, strict=True))


_AXES = ("OZX", "OZ", "OX", "O")


def _check_apply(x: Any, weight: Any, bias: Any, segment_ids: Any) -> torch.Size:
    op = "apply_generated"
    check_tensors(op, ("x", "weight", "bias"), (x, weight, bias), 2)
    check_rank(op, "x", x, 1)
    check_rank(op, "weight", weight, 2)
    if weight.shape[-1] != x.shape[-1]:
        expected = f"[..., O, X={x.shape[-1]}]"
        raise ValueError(f"{op}: weight: expected shape {expected}, got {list(weight.shape)}")
    if bias is not None:
        if broadcast_like(op, ("weight", "bias"), weight.shape[:-1], bias) != weight.shape[:-1]:
            expected = f"a shape that broadcasts to {list(weight.shape[:-1])}"
            raise ValueError(f"{op}: bias: expected {expected}, got {list(bias.shape)}")
    if segment_ids is None:
        return broadcast_leading(op, ("x", "weight"), x, weight, features=2)
    check_shape(op, "x", x, {"N": None, "X": None})
    check_shape(op, "weight", weight, {"G": None, "O": None, "X": None})
    segments.check_segment_ids(op, segment_ids, x, weight.shape[0])
    return x.shape[:-1]


def _check_low_rank(x: Any, down: Any, up: Any, base: Any, scale: Any, segment_ids: Any) -> torch.Size:
    op, names = "apply_low_rank", ("x", "down", "up", "base")
    check_tensors(op, names, (x, down, up, base), 3)
    check_number(op, "scale", scale)
    if not (x.dtype.is_floating_point or isinstance(scale, int | torch.SymInt) or scale == 1):
        raise TypeError(f"{op}: scale: expected an int for {x.dtype}, got {scale!r}")
    check_rank(op, "x", x, 1)
    width, rank = x.shape[-1], down.shape[-2] if down.dim() > 1 else None
    for name, factor, axes in (
        ("down", down, {"R": None, "X": width}),
        ("up", up, {"O": None, "R": rank}),
    ):
        check_rank(op, name, factor, 2)
        (check_shape if factor.dim() == 2 else check_features)(op, name, factor, axes)
    lead = x.shape[:-1]
    if segment_ids is None:
        for name, factor in (("down", down), ("up", up)):
            lead = common_lead(op, name, factor.shape[:-2], lead)
    else:
        check_shape(op, "x", x, {"N": None, "X": None})
        check_shape(op, "down", down, {"G": None, "R": None, "X": None})
        check_shape(op, "up", up, {"G": down.shape[0], "O": None, "R": None})
        segments.check_segment_ids(op, segment_ids, x, down.shape[0])
    size = torch.Size((*lead, up.shape[-2]))
    if base is not None and broadcast(size, base.shape) != size:
        expected = f"a shape that broadcasts to that of y {list(size)}"
        raise ValueError(f"{op}: base: expected {expected}, got {list(base.shape)}")
    return lead


def _plan_generate(z: Any, weight: Any, weight_z: Any, weight_x: Any, bias: Any) -> Plan:
    z, *weights = autocast((z, weight, weight_z, weight_x, bias))
    weights = [*weights[:-1], expand_bias(weights[-1], *weights[:-1])]
    _check_generate(z, *weights)
    return plan_generated.generate(backends.choose(z), z, weights)


def _plan_apply(x: Any, weight: Any, bias: Any, segment_ids: Any) -> Plan:
    x, weight, bias = autocast((x, weight, bias))
    lead = _check_apply(x, weight, bias, segment_ids)
    return plan_generated.apply(backends.choose(x), x, weight, bias, lead, segment_ids)


def _plan_low_rank(x: Any, down: Any, up: Any, base: Any, scale: Any, segment_ids: Any) -> Plan:
    x, down, up, base = autocast((x, down, up, base))
    lead = _check_low_rank(x, down, up, base, scale, segment_ids)
    return plan_generated.apply_low_rank(backends.choose(x), x, down, up, base, lead, segment_ids)


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {
    "generate": (generate, _plan_generate),
    "apply_generated": (apply_generated, _plan_apply),
    "apply_low_rank": (apply_low_rank, _plan_low_rank),
}
