"""Gated linear units: checks, autocast, choice of a backend, call."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mi_kernels import backends
from mi_kernels.functional._arguments import autocast, expand_bias
from mi_kernels.ops import activations
from mi_kernels.ops.activations import ActivationName
from mi_kernels.ops.backend import get
from mi_kernels.ops.checks import check_activation, check_flag, check_rank, check_shape, check_tensors
from mi_kernels.ops.dtypes import FLOATING
from mi_kernels.ops.dual_linear import autograd as rules
from mi_kernels.ops.dual_linear import eager, reference
from mi_kernels.ops.dual_linear import plan as plans
from mi_kernels.ops.interaction.shared import flatten_rows
from mi_kernels.ops.modulate import autograd as elementwise
from mi_kernels.ops.plan import Plan

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
    r"""Gated linear unit: two products of x, one of them through an activation, in one pass.

    .. math:: y = \mathrm{act}(G x + a) \cdot (V x + c)

    Args:
        x: input of shape ``[..., X]``.
        weight: G and V, one above the other, of shape ``[2H, X]``; or G alone, ``[H, X]``.
        bias: a and c, ``[2H]``, or a alone, ``[H]``; optional. ``[1, H]`` and scalars are accepted.
        weight_value: V of shape ``[H, X]``, where ``weight`` is G alone.
        bias_value: c of shape ``[H]``, optional; only beside ``weight_value``.
        activation: as in :func:`mi_kernels.modulate`; softmax is over the H features, and is applied after
            the products.
        gate_first: whether the first H rows of a packed ``weight`` are G, else V. Two weights have no order:
            it has to be True.

    Returns:
        y of shape ``[..., H]`` in the dtype of the inputs (the autocast dtype under autocast).

    Dtypes are float64, float32, bfloat16 and float16, the same for all tensors, which have one device.
    Differentiable in all tensors to any order, in reverse and in forward mode. Without derivatives nothing of
    the size of G x or V x is stored; with them both are saved for backward, beside the arguments.

    Raises:
        TypeError: an argument is no dense tensor, its dtype is unsupported or not that of ``x``, or
            ``gate_first`` is no bool.
        ValueError: a rank, size or device does not fit, a packed ``weight`` has an odd number of rows,
            ``bias_value`` or ``gate_first=False`` does not go with the weights, the activation is unknown, or
            the backend asked for by name cannot take these tensors.

    Source: Dauphin et al., "Language Modeling with Gated Convolutional Networks", ICML 2017 (sigmoid);
    Shazeer, "GLU Variants Improve Transformer", 2020 (ReGLU, GEGLU, SwiGLU). ``torch.nn.functional.glu`` of
    ``F.linear(x, weight, bias)`` is ``activation="sigmoid", gate_first=False``.

    Example:
        >>> x, weight = torch.randn(8, 5), torch.randn(6, 5)
        >>> mi.glu(x, weight).shape
        torch.Size([8, 3])
    """
    given = x, weight, bias, weight_value, bias_value
    y = eager.glu(backends.eager_cpu(x, "glu"), activation, gate_first, *given)
    if y is not None:
        return y
    x, weight, bias, weight_value, bias_value = _arguments(given, activation, gate_first)
    chosen = backends.choose(x, "glu")
    if get(chosen).is_reference:
        values: dict[str, Any] = {"weight_value": weight_value, "bias_value": bias_value}
        return reference.glu(x, weight, bias, **values, activation=activation, gate_first=bool(gate_first))
    lead = x.shape[:-1]
    tensors = flatten_rows(x, lead), None, weight, weight_value, bias, bias_value
    if activation == "softmax":
        gate, value = rules.products(chosen, *tensors)
        gate, value = (gate, value) if gate_first else (value, gate)
        y = elementwise.modulate(chosen, value, gate, None, activation, 0.0)
    else:
        names = (activation, "identity") if gate_first else ("identity", activation)
        y = rules.dual_linear(chosen, *names, 1, *tensors)
    return y if len(lead) == 1 else y.view(*lead, y.shape[-1])


_NAMES = ("x", "weight", "bias", "weight_value", "bias_value")


def _arguments(given: Sequence[Any], activation: object, gate_first: object) -> tuple[Any, ...]:
    """The arguments under autocast, with biases expanded, checked."""
    x, weight, bias, weight_value, bias_value = autocast(tuple(given))
    bias, bias_value = expand_bias(bias, weight), expand_bias(bias_value, weight_value)
    tensors = x, weight, bias, weight_value, bias_value
    _check(tensors, activation, gate_first)
    return tensors


def _check(tensors: Sequence[Any], activation: object, gate_first: object) -> None:
    op = "glu"
    check_activation(op, activation, activations.NAMES)
    check_flag(op, "gate_first", gate_first)
    check_tensors(op, _NAMES, tensors, 2, FLOATING)
    x, weight, bias, weight_value, bias_value = tensors
    check_rank(op, "x", x, 1)
    width = x.shape[-1]
    if weight_value is None:
        check_shape(op, "weight", weight, {"2H": None, "X": width})
        if weight.shape[0] % 2 != 0:
            raise ValueError(
                f"{op}: weight: expected an even number of rows, [2H, X={width}] (or weight_value beside it),"
                f" got {list(weight.shape)}"
            )
        check_shape(op, "bias", bias, {"2H": weight.shape[0]})
        if bias_value is not None:
            raise ValueError(f"{op}: bias_value: expected None without weight_value, got a tensor")
        return
    check_shape(op, "weight", weight, {"H": None, "X": width})
    features = weight.shape[0]
    check_shape(op, "bias", bias, {"H": features})
    check_shape(op, "weight_value", weight_value, {"H": features, "X": width})
    check_shape(op, "bias_value", bias_value, {"H": features})
    if not gate_first:
        raise ValueError(f"{op}: gate_first: expected True with weight_value (weight is the gate), got False")


def _plan(activation: str, gate_first: bool, **arguments: Any) -> Plan:
    tensors = _arguments([arguments[name] for name in _NAMES], activation, gate_first)
    return plans.glu(backends.choose(tensors[0], "glu"), activation, *tensors)


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {"glu": (glu, _plan)}
