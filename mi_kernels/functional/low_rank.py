"""Interactions with a factorised weight: broadcasting, checks, autocast, choice of a backend, call."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops import activations
from ..ops.activations import ElementwiseName
from ..ops.backend import get
from ..ops.checks import broadcast_leading, check_activation, check_rank, check_shape, check_tensors
from ..ops.dtypes import FLOATING
from ..ops.dual_linear import eager, plan, reference
from ..ops.dual_linear import low_rank as forms
from ..ops.library import Axes
from ..ops.plan import Plan
from ..parallel import calls as distributed
from ._arguments import autocast, expand_bias_to

__all__ = ["low_rank"]


def low_rank(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    factor_x: Tensor,  # [R, X] or [S, R, X]
    factor_z: Tensor,  # [R, Z] or [S, R, Z]
    factor_out: Tensor | None = None,  # [O, R]
    weight_z: Tensor | None = None,  # [O, Z]
    weight_x: Tensor | None = None,  # [O, X]
    bias: Tensor | None = None,  # [O]
    *,
    activation_x: ElementwiseName = "identity",
    activation_z: ElementwiseName = "identity",
) -> Tensor:
    r"""Interaction of x with a context z whose weight is factorised.

    .. math:: y = P (f(A x) \cdot g(C z)) + U z + V x + c

    Without activations that is :func:`mi_kernels.interaction` with
    :math:`W_{oij} = \sum_r P_{or} C_{ri} A_{rj}`. Factors of three dimensions are summed over the first one,
    :math:`P \sum_s f(A_s x) \cdot g(C_s z)`.

    Args:
        x: input of shape ``[..., X]``.
        z: context of shape ``[..., Z]``. The leading dimensions of ``x`` and ``z`` broadcast; a product of an
            operand that is shared along some of them is computed once.
        factor_x: A of shape ``[R, X]``, or ``[S, R, X]`` for a sum over S terms.
        factor_z: C of shape ``[R, Z]``, or ``[S, R, Z]``.
        factor_out: P of shape ``[O, R]``, or None: then O = R.
        weight_z: U of shape ``[O, Z]``, optional.
        weight_x: V of shape ``[O, X]``, optional.
        bias: c of shape ``[O]``, optional; ``[1, O]`` and scalars are accepted.
        activation_x: f, elementwise, as in :func:`mi_kernels.modulate` but for softmax.
        activation_z: g, likewise.

    Returns:
        y of shape ``[..., O]`` in the dtype of the inputs (the autocast dtype under autocast).

    With a context for each row A x and C z are not stored, unless something is differentiated: then both are
    saved for backward.

    It is the fusion of MLB (``tanh`` twice), MUTAN and MFB (sums over S), LMF (a one appended to each input),
    DistMult (no P), DCN-Mix, and a gated linear unit without activation.

    Dtypes, devices and derivatives (of any order) as :func:`mi_kernels.modulate`.

    Raises:
        TypeError: an argument is no dense tensor, or its dtype is unsupported or not that of ``x``.
        ValueError: a rank or size does not fit, or an activation is unknown or not elementwise.

    Source: Kim et al., "Hadamard Product for Low-rank Bilinear Pooling", ICLR 2017; Ben-younes et al.,
    "MUTAN", ICCV 2017; Yu et al., "Multi-modal Factorized Bilinear Pooling", ICCV 2017; Liu et al.,
    "Efficient Low-rank Multimodal Fusion", ACL 2018.

    Example:
        >>> x, z = torch.randn(8, 5), torch.randn(8, 3)
        >>> mi.low_rank(x, z, torch.randn(16, 5), torch.randn(16, 3), torch.randn(4, 16)).shape
        torch.Size([8, 4])
    """
    tensors = x, z, factor_x, factor_z, factor_out, weight_z, weight_x, bias
    backend = backends.eager_cpu(x, "low_rank")
    y = eager.low_rank(backend, activation_x, activation_z, *tensors)
    if y is not None:
        return y
    tensors, lead = _prepared(autocast(tensors), activation_x, activation_z)
    if distributed.given(*tensors):
        return _on_parts(tensors, activation_x, activation_z)
    chosen = backends.choose(tensors[0], "low_rank")
    if get(chosen).is_reference:
        return reference.low_rank(*tensors, activation_x=activation_x, activation_z=activation_z)
    return forms.low_rank(chosen, activation_x, activation_z, lead, *tensors)


_NAMES = ("x", "z", "factor_x", "factor_z", "factor_out", "weight_z", "weight_x", "bias")


def _on_parts(tensors: Sequence[Any], activation_x: Any, activation_z: Any) -> Any:
    """y of DTensors. A sum over X or Z is one of y only before an activation that is the identity."""
    named = dict(zip(_NAMES, tensors, strict=True))
    terms = "S" if named["factor_x"].dim() == 3 else ""
    out = "R" if named["factor_out"] is None else "O"  # without P each rank is an output
    axes = {"x": "*X", "z": "*Z", "factor_x": terms + "RX", "factor_z": terms + "RZ", "factor_out": "OR"}
    axes |= {"weight_z": out + "Z", "weight_x": out + "X", "bias": out}
    factors = "x", "z", "factor_x", "factor_z"
    product = factors if named["factor_out"] is None else (*factors, "factor_out")
    result = Axes("*" + out, (product, ("z", "weight_z"), ("x", "weight_x"), ("bias",)))
    cuts = f"*{out}R{terms}" + "X" * (activation_x == "identity") + "Z" * (activation_z == "identity")
    function = functools.partial(low_rank, activation_x=activation_x, activation_z=activation_z)
    return distributed.run("low_rank", function, named, axes, (result,), cuts)


def _prepared(tensors: Sequence[Any], activation_x: Any, activation_z: Any) -> tuple[Any, torch.Size]:
    """The checked arguments, with the bias [O], and the leading dimensions of y."""
    op = "low_rank"
    check_activation(op, activation_x, activations.ELEMENTWISE, "activation_x")
    check_activation(op, activation_z, activations.ELEMENTWISE, "activation_z")
    check_tensors(op, _NAMES, tensors, 4, FLOATING)
    x, z, factor_x, factor_z, factor_out, weight_z, weight_x, bias = tensors
    check_rank(op, "x", x, 1)
    check_rank(op, "z", z, 1)
    lead = broadcast_leading(op, ("x", "z"), x, z)
    names = ("S", "R") if factor_x.dim() == 3 else ("R",)
    check_shape(op, "factor_x", factor_x, {**dict.fromkeys(names), "X": x.shape[-1]})
    if names == ("S", "R") and factor_x.shape[0] == 0:
        raise ValueError(f"{op}: factor_x: expected a sum of at least one term, got {list(factor_x.shape)}")
    terms = dict(zip(names, factor_x.shape, strict=False))
    check_shape(op, "factor_z", factor_z, {**terms, "Z": z.shape[-1]})
    rank = out = factor_x.shape[-2]
    if factor_out is not None:
        check_shape(op, "factor_out", factor_out, {"O": None, "R": rank})
        out = factor_out.shape[0]
    bias = expand_bias_to(out, bias)
    check_shape(op, "weight_z", weight_z, {"O": out, "Z": z.shape[-1]})
    check_shape(op, "weight_x", weight_x, {"O": out, "X": x.shape[-1]})
    check_shape(op, "bias", bias, {"O": out})
    return (x, z, factor_x, factor_z, factor_out, weight_z, weight_x, bias), lead


def _plan(activation_x: Any, activation_z: Any, **arguments: Any) -> Plan:
    tensors, lead = _prepared(autocast(tuple(arguments.values())), activation_x, activation_z)
    return plan.low_rank(backends.choose(tensors[0], "low_rank"), lead, *tensors)


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {"low_rank": (low_rank, _plan)}
