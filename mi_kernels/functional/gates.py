"""The public functions of gates and modulation: broadcasting, checks, autocast, choice of a backend, call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops import activations
from ..ops.activations import ActivationName
from ..ops.backend import get
from ..ops.checks import (
    broadcast_leading,
    broadcast_like,
    check_activation,
    check_number,
    check_rank,
    check_shape,
    check_tensors,
)
from ..ops.dtypes import FLOATING
from ..ops.gate import autograd as gate_rules
from ..ops.gate import eager as gate_eager
from ..ops.gate import plan as gate_plan
from ..ops.gate import reference as gate_reference
from ..ops.interaction import autograd as dense
from ..ops.interaction.shared import flatten_rows
from ..ops.library import Axes
from ..ops.modulate import autograd as elementwise
from ..ops.modulate import mixed, small
from ..ops.modulate import plan as modulate_plan
from ..ops.modulate import reference as modulate_reference
from ..ops.plan import Plan
from ..ops.rules import without_features
from ..parallel import calls as distributed
from ._arguments import autocast, expand_bias, promoted_dtype, same_rank
from .interaction import interaction

__all__ = ["diagonal", "gated_interaction", "modulate"]


def modulate(
    x: Tensor,  # [...]
    scale: Tensor,  # broadcasts with x
    shift: Tensor | None = None,  # broadcasts with x
    *,
    activation: ActivationName = "identity",
    scale_offset: float = 0.0,
    scale_factor: float = 1.0,
) -> Tensor:
    r"""Elementwise modulation (FiLM, adaLN, gates) in one pass over x.

    .. math:: y = (c \cdot \mathrm{act}(scale) + s) \cdot x + shift

    Args:
        x: input of any shape.
        scale: broadcasts with ``x``: ``[B, 1, C]`` for tokens ``[B, T, C]``, ``[B, C, 1, 1]`` for feature
            maps ``[B, C, H, W]`` in either memory format. It is not expanded to the size of x in memory.
        shift: broadcasts with ``x``, optional.
        activation: identity, sigmoid, tanh, relu, gelu, gelu_tanh, quick_gelu, silu, mish, softplus,
            hardsigmoid, hardswish, or softmax over the last dimension of ``scale``.
        scale_offset: s.
        scale_factor: c; 2 with the sigmoid for gates around 1, as in PPNet.

    Returns:
        y of the broadcast shape, in the memory format of ``x`` and the dtype of the arguments.

    Dtypes are float64, float32, bfloat16 and float16 (16 bits are computed in float32). Where they differ, y
    has the dtype that PyTorch promotes them to, that of ``scale * x + shift``: float32 for a bfloat16 ``x``
    with float32 modulation. The arguments are cast to it first, and each gradient to the dtype of its
    argument; ``explain`` counts the copies, which the backward pass needs, too. A number without dimensions
    does not widen ``x``, except under autocast, where the widest dtype counts.

    All tensors have one device. Differentiable in all tensors to any order, in reverse and in forward mode;
    the gradients of ``scale`` and ``shift`` are summed over the broadcast dimensions in the same pass that
    computes that of ``x``. Under ``torch.compile`` it is plain PyTorch code, which Inductor fuses with its
    neighbours. So it is for up to 16384 contiguous elements of float32 or float64 on the CPU, where a call of
    a kernel costs more, and without derivatives for an ``x`` of another dtype.

    Raises:
        TypeError: an argument is no dense tensor, its dtype is unsupported, or ``scale_offset`` or
            ``scale_factor`` is no number.
        ValueError: shapes do not broadcast, devices differ, the activation is unknown, or the backend asked
            for by name cannot take these tensors.

    Source: Perez et al., "FiLM", AAAI 2018; Peebles and Xie, "Scalable Diffusion Models with Transformers",
    ICCV 2023 (adaLN); Chang et al., "PEPNet", KDD 2023 (PPNet).

    Example:
        >>> tokens, scale, shift = torch.randn(2, 7, 5), torch.randn(2, 1, 5), torch.randn(2, 1, 5)
        >>> mi.modulate(tokens, scale, shift, scale_offset=1.0).shape
        torch.Size([2, 7, 5])
    """
    gate = (activation, scale_offset, scale_factor)
    if backends.is_open() and small.takes(x, scale, shift, *gate):
        return small.modulate(x, scale, shift, *gate)
    backend = backends.eager_cpu(x, "modulate")
    if backend is not None and small.fits(x, scale, shift, *gate):
        return _modulated(backend, x, scale, shift, *gate)
    dtype = promoted_dtype("modulate", _MODULATE_NAMES, (x, scale, shift), 2)
    if dtype is not None:
        if backends.is_open() and mixed.takes((x, scale, shift), *gate, dtype):
            return mixed.modulate(x, scale, shift, *gate, dtype)
        *tensors, activation, scale_offset, scale_factor = _cast(dtype, x, scale, shift, *gate)
        options: dict[str, Any] = {"scale_offset": scale_offset, "scale_factor": scale_factor}
        return modulate(*tensors, activation=activation, **options)
    shape = _check_modulate(x, scale, shift, *gate)
    chosen = backends.choose(x, "modulate")
    if get(chosen).is_reference or torch.compiler.is_compiling():
        options = {"scale_offset": scale_offset, "scale_factor": scale_factor}
        return modulate_reference.modulate(x, scale, shift, activation=activation, **options)
    return _modulated(chosen, x if x.shape == shape else distributed.expanded(x, shape), scale, shift, *gate)


def diagonal(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    weight: Tensor,  # [X, Z]
    bias: Tensor | None = None,  # [X]
    shift_weight: Tensor | None = None,  # [X, Z]
    shift_bias: Tensor | None = None,  # [X]
    *,
    weight_x: Tensor | None = None,  # [X, X]
    activation: ActivationName = "identity",
    scale_offset: float = 0.0,
) -> Tensor:
    r"""Diagonal multiplicative interaction: a gate and a shift computed from the context, in one pass.

    .. math:: y = (\mathrm{act}(z A^T + x G^T + a) + s) \cdot x + (z C^T + c)

    Args:
        x: input of shape ``[..., X]``.
        z: context of shape ``[..., Z]``. The leading dimensions of ``x`` and ``z`` broadcast; a context that
            is shared along some of them has its gate and shift computed once (without ``weight_x``).
        weight: A of shape ``[X, Z]``.
        bias: a of shape ``[X]``, optional; ``[1, X]`` and scalars are accepted.
        shift_weight: C of shape ``[X, Z]``, optional.
        shift_bias: c of shape ``[X]``, optional; ``[1, X]`` and scalars are accepted.
        weight_x: G of shape ``[X, X]``, optional.
        activation: as in :func:`modulate`; softmax is over the features.
        scale_offset: s.

    Returns:
        y of shape ``[..., X]`` in the dtype of the inputs (the autocast dtype under autocast).

    Dtypes and derivatives as :func:`modulate`. With a context for each row, the only tensor of the size of x
    that is stored is y, and, if something is differentiated, the gate before its activation for backward.

    Raises:
        TypeError, ValueError: as :func:`modulate`; a rank or size does not fit.

    Source: Jayakumar et al., "Multiplicative Interactions and Where to Find Them", ICLR 2020, section 4
    (diagonal form); Perez et al., "FiLM", AAAI 2018.

    Example:
        >>> x, z, weight = torch.randn(8, 5), torch.randn(8, 3), torch.randn(5, 3)
        >>> mi.diagonal(x, z, weight, activation="sigmoid").shape
        torch.Size([8, 5])
    """
    given = x, z, weight, bias, shift_weight, shift_bias, weight_x
    y = gate_eager.diagonal(backends.eager_cpu(x, "diagonal"), activation, scale_offset, *given)
    if y is not None:
        return y
    tensors = _expand_biases(autocast(given), 3, 5)
    lead = _check_diagonal(tensors, activation, scale_offset)
    x, z, weight, bias, shift_weight, shift_bias, weight_x = tensors
    options: dict[str, Any] = {"activation": activation, "scale_offset": scale_offset}
    if distributed.given(*tensors):
        return _diagonal_on_parts(tensors, options)
    chosen = backends.choose(x, "diagonal")
    shared = weight_x is None and z.shape[:-1] != lead
    if get(chosen).is_reference or (shared and torch.compiler.is_compiling()):
        return gate_reference.diagonal(
            x, z, weight, bias, shift_weight, shift_bias, weight_x=weight_x, **options
        )
    if not shared:
        weights = (None, weight, weight_x, bias, shift_weight, shift_bias)
        y = gate_rules.gate(
            chosen, activation, float(scale_offset), flatten_rows(x, lead), flatten_rows(z, lead), *weights
        )
        return y if len(lead) == 1 else y.view(*lead, y.shape[-1])
    contexts = flatten_rows(z, z.shape[:-1])
    gate = _per_context(chosen, contexts, weight, bias, z.shape[:-1], len(lead))
    shift = None
    if shift_weight is not None:
        shift = _per_context(chosen, contexts, shift_weight, shift_bias, z.shape[:-1], len(lead))
    elif shift_bias is not None:
        shift = same_rank(shift_bias, len(lead) + 1)
    x = x.expand(*lead, x.shape[-1])
    return elementwise.modulate(chosen, x, gate, shift, activation, float(scale_offset))


def gated_interaction(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    weight: Tensor | None,  # [X, Z, X]
    weight_z: Tensor | None = None,  # [X, Z]
    weight_x: Tensor | None = None,  # [X, X]
    bias: Tensor | None = None,  # [X]
    *,
    activation: ActivationName = "sigmoid",
) -> Tensor:
    r"""Attention over the features of x by a dense multiplicative interaction, in one pass.

    .. math:: y = \mathrm{act}(z^T W x + U z + V x + c) \cdot x

    Args:
        x: input of shape ``[..., X]``.
        z: context of shape ``[..., Z]``. The leading dimensions of ``x`` and ``z`` broadcast.
        weight: W of shape ``[X, Z, X]``, or None to leave the product out.
        weight_z: U of shape ``[X, Z]``, optional.
        weight_x: V of shape ``[X, X]``, optional.
        bias: c of shape ``[X]``, optional; ``[1, X]`` and scalars are accepted.
        activation: as in :func:`modulate`; softmax is over the features.

    Returns:
        y of shape ``[..., X]`` in the dtype of the inputs (the autocast dtype under autocast).

    Dtypes and derivatives as :func:`modulate`. The inputs and the gate before its activation, one tensor like
    y, are saved for backward.

    Raises:
        TypeError, ValueError: as :func:`modulate`; a rank or size does not fit, or all four weights are None.

    Source: Jayakumar et al., "Multiplicative Interactions and Where to Find Them", ICLR 2020, section 4
    (attention as a multiplicative interaction).

    Example:
        >>> x, z, weight = torch.randn(8, 5), torch.randn(8, 3), torch.randn(5, 3, 5)
        >>> mi.gated_interaction(x, z, weight, activation="softmax").shape
        torch.Size([8, 5])
    """
    given = x, z, weight, weight_z, weight_x, bias
    y = gate_eager.gated_interaction(backends.eager_cpu(x, "gated_interaction"), activation, *given)
    if y is not None:
        return y
    tensors = _expand_biases(autocast(given), 5)
    lead = _check_gated(tensors, activation)
    x, z, *weights = tensors
    if distributed.given(*tensors):
        return _gated_on_parts(tensors, activation)
    chosen = backends.choose(x, "gated_interaction")
    if get(chosen).is_reference:
        return gate_reference.gated_interaction(x, z, *weights, activation=activation)
    arguments = (flatten_rows(x, lead), flatten_rows(z, lead), *weights, None, None)
    y = gate_rules.gate(chosen, activation, 0.0, *arguments)
    return y if len(lead) == 1 else y.view(*lead, y.shape[-1])


_MODULATE_NAMES = ("x", "scale", "shift")
_DIAGONAL_NAMES = ("x", "z", "weight", "bias", "shift_weight", "shift_bias", "weight_x")
_DIAGONAL_AXES = ("XZ", "X", "XZ", "X", "XX")
_GATED_NAMES = ("x", "z", "weight", "weight_z", "weight_x", "bias")
_GATED_AXES = ("XZX", "XZ", "XX", "X")


def _diagonal_on_parts(tensors: Sequence[Any], options: dict[str, Any]) -> Any:
    """y of DTensors. With G each feature of the gate needs all of x: then it is a call of its own."""
    named = dict(zip(_DIAGONAL_NAMES, tensors, strict=True))
    x, z, weight, bias, shift_weight, shift_bias, weight_x = tensors
    if weight_x is not None and distributed.sharded(weight_x, weight):
        gate = interaction(x, z, None, weight, weight_x, bias)
        shift = None
        if shift_weight is not None:
            shift = interaction(x, z, None, shift_weight, None, shift_bias)
        elif shift_bias is not None:
            shift = shift_bias
        return modulate(x, gate, shift, **options)
    axes = {"x": "*X", "z": "*Z", "weight": "XZ", "bias": "X", "shift_weight": "XZ", "shift_bias": "X"}
    axes["weight_x"] = "XX"
    cuts = "*" if options["activation"] == "softmax" else "*X"
    function = functools.partial(diagonal, **options)
    return distributed.run("diagonal", function, named, axes, (Axes("*X"),), cuts)


def _gated_on_parts(tensors: Sequence[Any], activation: Any) -> Any:
    """y of DTensors. Each feature of the gate needs all of x: sharded, it is a call of its own."""
    x, z, *weights = tensors
    if distributed.sharded(*weights):
        return modulate(x, interaction(x, z, *weights), activation=activation)
    axes = {"x": "*X", "z": "*Z", "weight": "XZX", "weight_z": "XZ", "weight_x": "XX", "bias": "X"}
    named = dict(zip(axes, tensors, strict=True))
    function = functools.partial(gated_interaction, activation=activation)
    return distributed.run("gated_interaction", function, named, axes, (Axes("*X"),), "*")


def _modulated(
    backend: str,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    activation: str,
    scale_offset: float,
    scale_factor: float,
) -> Tensor:
    """y of checked arguments, in the shape of x."""
    scale, shift = same_rank(scale, x.dim()), None if shift is None else same_rank(shift, x.dim())
    numbers = float(scale_offset), float(scale_factor)
    return elementwise.modulate(backend, x, scale, shift, activation, *numbers)


def _cast(
    dtype: torch.dtype, x: Any, scale: Any, shift: Any, activation: Any, scale_offset: Any, scale_factor: Any
) -> Any:
    """The arguments with tensors of one dtype. A number that loses digits is activated before the cast."""
    if torch.promote_types(scale.dtype, dtype) != dtype:
        check_activation("modulate", activation, activations.NAMES)
        check_number("modulate", "scale_offset", scale_offset)
        check_number("modulate", "scale_factor", scale_factor)
        scale = modulate_reference.gate(scale, activation, scale_offset, scale_factor)
        activation, scale_offset, scale_factor = "identity", 0.0, 1.0
    shift = None if shift is None else shift.to(dtype)
    return x.to(dtype), scale.to(dtype), shift, activation, scale_offset, scale_factor


def _check_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    activation: str,
    scale_offset: float,
    scale_factor: float,
) -> torch.Size:
    op = "modulate"
    check_activation(op, activation, activations.NAMES)
    check_number(op, "scale_offset", scale_offset)
    check_number(op, "scale_factor", scale_factor)
    check_tensors(op, _MODULATE_NAMES, (x, scale, shift), 2, FLOATING)
    check_rank(op, "x", x, 1)
    shape = broadcast_like(op, ("x", "scale"), x.shape, scale)
    return shape if shift is None else broadcast_like(op, ("x and scale", "shift"), shape, shift)


def _check_diagonal(tensors: Sequence[Any], activation: str, scale_offset: float) -> torch.Size:
    check_activation("diagonal", activation, activations.NAMES)
    check_number("diagonal", "scale_offset", scale_offset)
    check_tensors("diagonal", _DIAGONAL_NAMES, tensors, 3, FLOATING)
    return _check_features("diagonal", _DIAGONAL_NAMES, _DIAGONAL_AXES, tensors)


def _check_gated(tensors: Sequence[Any], activation: str) -> torch.Size:
    op = "gated_interaction"
    check_activation(op, activation, activations.NAMES)
    check_tensors(op, _GATED_NAMES, tensors, 2, FLOATING)
    if all(weight is None for weight in tensors[2:]):
        raise ValueError(f"{op}: expected at least one of {', '.join(_GATED_NAMES[2:])}, got None for all")
    return _check_features(op, _GATED_NAMES, _GATED_AXES, tensors)


def _check_features(op: str, names: Sequence[str], axes: Sequence[str], tensors: Sequence[Any]) -> torch.Size:
    x, z, *weights = tensors
    check_rank(op, "x", x, 1)
    check_rank(op, "z", z, 1)
    lead = broadcast_leading(op, ("x", "z"), x, z)
    sizes = {"X": x.shape[-1], "Z": z.shape[-1]}
    for name, letters, tensor in zip(names[2:], axes, weights, strict=True):
        check_shape(op, name, tensor, [(letter, sizes[letter]) for letter in letters])
    return lead


def _expand_biases(tensors: Sequence[Any], *biases: int) -> list[Any]:
    """The arguments x, z, weights and biases, with those at the indices ``biases`` as [X]."""
    expanded, weights = list(tensors), tensors[2 : biases[0]]
    for index in biases:
        expanded[index] = expand_bias(tensors[index], *weights)
    return expanded


def _per_context(
    backend: str, z: Tensor, weight: Tensor, bias: Tensor | None, lead: torch.Size, rank: int
) -> Tensor:
    """z W^T + b of each context, with ``rank`` leading dimensions."""
    y = dense.forward(backend, without_features(z), z, None, weight, None, bias)
    return y.view(*(1,) * (rank - len(lead)), *lead, y.shape[-1])


def _plan_modulate(
    x: Any, scale: Any, shift: Any, activation: Any, scale_offset: Any, scale_factor: Any
) -> Plan:
    given, algorithm = (x, scale, shift), None
    gate = (activation, scale_offset, scale_factor)
    dtype = promoted_dtype("modulate", _MODULATE_NAMES, given, 2)
    if dtype is not None:
        if backends.is_open() and mixed.takes(given, *gate, dtype):
            algorithm = mixed.ALGORITHM
        x, scale, shift, activation, scale_offset, scale_factor = _cast(dtype, *given, *gate)
        gate = (activation, scale_offset, scale_factor)
    if backends.is_open() and small.takes(x, scale, shift, *gate):
        algorithm = small.ALGORITHM
    shape = _check_modulate(x, scale, shift, *gate)
    plan = modulate_plan.modulate(backends.choose(x, "modulate"), shape, x, scale, shift, algorithm)
    return plan if dtype is None else modulate_plan.with_casts(plan, _MODULATE_NAMES, given, dtype)


def _plan_diagonal(activation: str, scale_offset: float, weight_x: Any, **arguments: Any) -> Plan:
    tensors = _expand_biases(autocast((*arguments.values(), weight_x)), 3, 5)
    lead = _check_diagonal(tensors, activation, scale_offset)
    return gate_plan.diagonal(backends.choose(tensors[0], "diagonal"), activation, lead, *tensors)


def _plan_gated(activation: str, **arguments: Any) -> Plan:
    tensors = _expand_biases(autocast(tuple(arguments.values())), 5)
    lead = _check_gated(tensors, activation)
    return gate_plan.gated(backends.choose(tensors[0], "gated_interaction"), activation, lead, *tensors)


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {
    "diagonal": (diagonal, _plan_diagonal),
    "gated_interaction": (gated_interaction, _plan_gated),
    "modulate": (modulate, _plan_modulate),
}
