"""Gated linear units: checks, autocast, choice of a backend, call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import backends
from ..ops import activations
from ..ops.activations import ActivationName
from ..ops.backend import get
from ..ops.checks import check_activation, check_flag, check_rank, check_shape, check_tensors
from ..ops.dtypes import FLOATING
from ..ops.dual_linear import autograd as rules
from ..ops.dual_linear import eager, plan, reference
from ..ops.interaction.shared import flatten_rows
from ..ops.library import Axes
from ..ops.plan import Plan
from ..parallel import calls as distributed
from ._arguments import autocast, expand_bias_to

__all__ = ["glu"]


def glu(
    x: Tensor,  # [..., X]
    weight: Tensor,  # [2H, X], or [H, X] beside weight_value
    bias: Tensor | None = None,  # [2H] or [H]
    *,
    weight_value: Tensor | None = None,  # [H, X]
    bias_value: Tensor | None = None,  # [H]
    activation: ActivationName = "silu",
    gate_first: bool = True,
) -> Tensor:
    r"""Gated linear unit (GLU, SwiGLU, GEGLU, ReGLU) in one pass.

    .. math:: y = \mathrm{act}(G x + a) \cdot (V x + c)

    Args:
        x: input of shape ``[..., X]``.
        weight: G and V packed in one tensor of shape ``[2H, X]``; with ``weight_value``, G of shape
            ``[H, X]``.
        bias: a and c packed, of shape ``[2H]``; with ``weight_value``, a of shape ``[H]``. Optional.
        weight_value: V of shape ``[H, X]``, if it is not packed with G.
        bias_value: c of shape ``[H]``, optional, with ``weight_value`` only.
        activation: as in :func:`mi_kernels.modulate`: sigmoid is the GLU of Dauphin et al., silu SwiGLU, gelu
            GEGLU, relu ReGLU, identity the bilinear layer.
        gate_first: whether G is the first half of a packed ``weight`` (and a of ``bias``), or the second one.

    Returns:
        y of shape ``[..., H]`` in the dtype of the inputs (the autocast dtype under autocast).

    G x and V x are not stored but for a block of rows (where there are fewer than 240, or narrow outputs),
    unless something is differentiated: then both are saved for backward, which makes their gradients in one
    pass and, with a packed weight, has one product for dx and one for the gradient of the weight. softmax
    needs whole rows: there G x and V x are computed and stored first.

    Dtypes, devices and derivatives (of any order) as :func:`mi_kernels.modulate`.

    Raises:
        TypeError: an argument is no dense tensor, its dtype is unsupported or not that of ``x``, or
            ``gate_first`` is no bool.
        ValueError: a rank or size does not fit, the activation is unknown, ``bias_value`` is given without
            ``weight_value``, or ``gate_first=False`` with it.

    Source: Dauphin et al., "Language Modeling with Gated Convolutional Networks", ICML 2017; Shazeer, "GLU
    Variants Improve Transformer", 2020.

    Example:
        >>> x, weight = torch.randn(8, 5), torch.randn(2 * 6, 5)
        >>> mi.glu(x, weight).shape
        torch.Size([8, 6])
    """
    tensors = x, weight, bias, weight_value, bias_value
    y = eager.glu(backends.eager_cpu(x, "glu"), activation, gate_first, *tensors)
    if y is not None:
        return y
    x, weight, bias, weight_value, bias_value = _prepared(autocast(tensors), activation, gate_first)
    if distributed.given(x, weight, bias, weight_value, bias_value):
        return _on_parts(x, weight, bias, weight_value, bias_value, activation, gate_first)
    chosen = backends.choose(x, "glu")
    if get(chosen).is_reference:
        values: dict[str, Any] = {"weight_value": weight_value, "bias_value": bias_value}
        values["gate_first"] = gate_first
        return reference.glu(x, weight, bias, activation=activation, **values)
    lead = x.shape[:-1]
    y = rules.glu(
        chosen, activation, gate_first, flatten_rows(x, lead), weight, bias, weight_value, bias_value
    )
    return y if len(lead) == 1 else y.view(*lead, y.shape[-1])


def _on_parts(
    x: Any, weight: Any, bias: Any, weight_value: Any, bias_value: Any, activation: Any, gate_first: Any
) -> Any:
    """y of DTensors."""
    if weight_value is None:
        weight, weight_value = distributed.halves(weight)
        bias, bias_value = (None, None) if bias is None else distributed.halves(bias)
        if not gate_first:
            weight, weight_value, bias, bias_value = weight_value, weight, bias_value, bias
    axes = {"x": "*X", "weight": "HX", "bias": "H", "weight_value": "HX", "bias_value": "H"}
    tensors = dict(zip(axes, (x, weight, bias, weight_value, bias_value), strict=True))
    cuts = "*" if activation == "softmax" else "*H"
    function = functools.partial(glu, activation=activation)
    return distributed.run("glu", function, tensors, axes, (Axes("*H"),), cuts)


def _prepared(tensors: Sequence[Any], activation: Any, gate_first: Any) -> tuple[Any, ...]:
    """The checked arguments, with biases [H] or [2H]."""
    op, names = "glu", ("x", "weight", "bias", "weight_value", "bias_value")
    check_activation(op, activation, activations.NAMES)
    check_flag(op, "gate_first", gate_first)
    check_tensors(op, names, tensors, 2, FLOATING)
    x, weight, bias, weight_value, bias_value = tensors
    check_rank(op, "x", x, 1)
    if weight_value is None:
        if bias_value is not None:
            raise ValueError(f"{op}: bias_value: expected None without weight_value; bias has both halves")
        check_shape(op, "weight", weight, {"2H": None, "X": x.shape[-1]})
        if weight.shape[0] % 2:
            shape = list(weight.shape)
            raise ValueError(
                f"{op}: weight: expected an even number 2H of rows without weight_value, got {shape}"
            )
    else:
        if not gate_first:
            raise ValueError(
                f"{op}: gate_first: expected True with weight_value, as nothing is packed, got False"
            )
        check_shape(op, "weight", weight, {"H": None, "X": x.shape[-1]})
        check_shape(op, "weight_value", weight_value, {"H": weight.shape[0], "X": x.shape[-1]})
    features = "2H" if weight_value is None else "H"
    bias, bias_value = (expand_bias_to(weight.shape[0], each) for each in (bias, bias_value))
    check_shape(op, "bias", bias, {features: weight.shape[0]})
    check_shape(op, "bias_value", bias_value, {"H": weight.shape[0]})
    return x, weight, bias, weight_value, bias_value


def _plan(activation: Any, gate_first: Any, **arguments: Any) -> Plan:
    tensors = _prepared(autocast(tuple(arguments.values())), activation, gate_first)
    return plan.glu(backends.choose(tensors[0], "glu"), activation, *tensors)


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {"glu": (glu, _plan)}
