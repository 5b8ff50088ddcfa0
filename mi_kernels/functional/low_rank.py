"""Low-rank interactions: checks, autocast, choice of a backend, call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mi_kernels import backends
from mi_kernels.functional._arguments import autocast, expand_bias_to
from mi_kernels.ops import activations
from mi_kernels.ops.activations import ElementwiseName
from mi_kernels.ops.backend import get
from mi_kernels.ops.checks import broadcast_leading, check_activation, check_rank, check_shape, check_tensors
from mi_kernels.ops.dtypes import FLOATING
from mi_kernels.ops.dual_linear import autograd as rules
from mi_kernels.ops.dual_linear import eager, reference
from mi_kernels.ops.dual_linear import plan as plans
from mi_kernels.ops.interaction import autograd as dense
from mi_kernels.ops.interaction import dispatch
from mi_kernels.ops.interaction.linear import linear
from mi_kernels.ops.interaction.shared import flatten_rows
from mi_kernels.ops.plan import Plan

__all__ = ["low_rank"]


def low_rank(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    factor_x: Tensor,  # [R, X] or [R, O, X]
    factor_z: Tensor,  # [R, Z] or [R, O, Z]
    factor_out: Tensor | None = None,  # [O, R], or [O', O] after a sum over R
    weight_z: Tensor | None = None,  # [O, Z]
    weight_x: Tensor | None = None,  # [O, X]
    bias: Tensor | None = None,  # [O]
    *,
    activation_x: ElementwiseName = "identity",
    activation_z: ElementwiseName = "identity",
) -> Tensor:
    r"""The multiplicative interaction with W in factors, ``W[o,i,j] = sum_r P[o,r] C[r,i] A[r,j]``.

    .. math:: y = P (f(A x) \cdot h(C z)) + U z + V x + c

    Args:
        x: input of shape ``[..., X]``.
        z: context of shape ``[..., Z]``. The leading dimensions of ``x`` and ``z`` broadcast.
        factor_x: A of shape ``[R, X]``; or ``[R, O, X]``, and the products are summed over R.
        factor_z: C of shape ``[R, Z]``, or ``[R, O, Z]`` in the same way.
        factor_out: P of shape ``[O, R]``, or ``[O', O]`` after a sum over R; None is the identity.
        weight_z: U of shape ``[O, Z]``, optional (here and below ``O'`` where there is a P after a sum).
        weight_x: V of shape ``[O, X]``, optional.
        bias: c of shape ``[O]``, optional; ``[1, O]`` and scalars are accepted.
        activation_x: f, elementwise: as in :func:`mi_kernels.modulate`, without softmax.
        activation_z: h, likewise.

    Returns:
        y of shape ``[..., O]`` in the dtype of the inputs (the autocast dtype under autocast).

    Where each row has its context, A x and C z are not stored without derivatives; with them they are saved
    for backward. Where x or z broadcasts, each of its rows is multiplied once, and the products are stored.
    P, U and V are products of their own. Dtypes and derivatives as :func:`mi_kernels.glu`.

    Raises:
        TypeError: an argument is no dense tensor, or its dtype is unsupported or not that of ``x``.
        ValueError: a rank, size or device does not fit, an activation is unknown or not elementwise, or the
            backend asked for by name cannot take these tensors.

    Source: Kim et al., "Hadamard Product for Low-rank Bilinear Pooling", ICLR 2017 (MLB); Ben-younes et al.,
    "MUTAN", ICCV 2017 (sum over ranks); Liu et al., "Efficient Low-rank Multimodal Fusion with
    Modality-Specific Factors", ACL 2018 (LMF).

    Example:
        >>> x, z, factor_x, factor_z = (torch.randn(size) for size in ((8, 5), (8, 3), (4, 5), (4, 3)))
        >>> mi.low_rank(x, z, factor_x, factor_z, torch.randn(6, 4)).shape
        torch.Size([8, 6])
    """
    if factor_out is None and weight_z is None and weight_x is None and bias is None:
        backend = backends.eager_cpu(x, "low_rank")
        y = eager.low_rank(backend, activation_x, activation_z, x, z, factor_x, factor_z)
        if y is not None:
            return y
    given = x, z, factor_x, factor_z, factor_out, weight_z, weight_x, bias
    tensors, lead = _arguments(given, activation_x, activation_z)
    chosen = backends.choose(tensors[0], "low_rank")
    if get(chosen).is_reference:
        names: dict[str, Any] = {"activation_x": activation_x, "activation_z": activation_z}
        return reference.low_rank(*tensors, **names)
    x, z, factor_x, factor_z, *others = tensors
    ranks = 1 if factor_x.dim() == 2 else factor_x.shape[0]
    rule = chosen, activation_x, activation_z, ranks
    if factor_x.dim() == 3:  # a view, unless the strides of R and O do not make one dimension
        factor_x, factor_z = factor_x.flatten(0, 1), factor_z.flatten(0, 1)
    if x.shape[:-1] != z.shape[:-1]:
        return _broadcast(rule, lead, x, z, factor_x, factor_z, *others)
    y = _by_rows(rule, flatten_rows(x, lead), flatten_rows(z, lead), factor_x, factor_z, *others)
    return y if len(lead) == 1 else y.view(*lead, y.shape[-1])


Rule = tuple[str, str, str, int]
Maybe = Tensor | None


def _by_rows(
    rule: Rule,
    x: Tensor,  # [B, X]
    z: Tensor,  # [B, Z]
    factor_x: Tensor,
    factor_z: Tensor,
    factor_out: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> Tensor:
    backend = rule[0]
    h = rules.dual_linear(*rule, x, z, factor_x, factor_z, None, None)
    if factor_out is None:
        if weight_z is None and weight_x is None and bias is None:
            return h
        return h + dense.forward(backend, x, z, None, weight_z, weight_x, bias)
    if weight_z is None:  # P h and one more term are one product
        other = x if weight_x is not None else z[:, :0]
        return dense.forward(backend, h, other, None, weight_x, factor_out, bias)
    y = dense.forward(backend, h, z, None, weight_z, factor_out, bias)
    return y if weight_x is None else y + linear(backend, x, weight_x, None)


def _broadcast(
    rule: Rule,
    lead: torch.Size,
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    factor_x: Tensor,
    factor_z: Tensor,
    factor_out: Maybe,
    weight_z: Maybe,
    weight_x: Maybe,
    bias: Maybe,
) -> Tensor:
    """Each row of x and of z is multiplied once, and their products are multiplied by leading dimensions."""
    backend, rank = rule[0], len(lead) + 1

    def product(rows: Tensor, factor: Tensor) -> Tensor:
        own = rows.shape[:-1]
        found = linear(backend, flatten_rows(rows, own), factor, None)
        return found.view(*(1,) * (rank - rows.dim()), *own, factor.shape[0])

    h = rules.multiply(*rule, product(x, factor_x), product(z, factor_z))
    if factor_out is not None:
        rows = linear(backend, flatten_rows(h, lead), factor_out, None)
        h = rows.view(*lead, factor_out.shape[0])
    if weight_z is None and weight_x is None and bias is None:
        return h
    terms = dispatch.interaction(backend, x, z, None, weight_z, weight_x, bias, None, None, None, None)
    return h + terms


_NAMES = ("x", "z", "factor_x", "factor_z", "factor_out", "weight_z", "weight_x", "bias")


def _arguments(
    given: Sequence[Any], activation_x: object, activation_z: object
) -> tuple[tuple[Any, ...], torch.Size]:
    """The arguments under autocast, with the bias expanded, checked; and the leading dimensions of y."""
    op = "low_rank"
    check_activation(op, activation_x, activations.ELEMENTWISE, "activation_x")
    check_activation(op, activation_z, activations.ELEMENTWISE, "activation_z")
    *tensors, bias = autocast(tuple(given))
    check_tensors(op, _NAMES, (*tensors, bias), 4, FLOATING)
    x, z, factor_x, factor_z, factor_out, weight_z, weight_x = tensors
    check_rank(op, "x", x, 1)
    check_rank(op, "z", z, 1)
    lead = broadcast_leading(op, ("x", "z"), x, z)
    width, context = x.shape[-1], z.shape[-1]
    if factor_x.dim() == 3:
        check_shape(op, "factor_x", factor_x, {"R": None, "O": None, "X": width})
        ranks, features = factor_x.shape[:2]
        if ranks == 0:
            raise ValueError(f"{op}: factor_x: expected at least one rank R, got {list(factor_x.shape)}")
        check_shape(op, "factor_z", factor_z, {"R": ranks, "O": features, "Z": context})
    else:
        check_shape(op, "factor_x", factor_x, {"R": None, "X": width})
        features = factor_x.shape[0]
        check_shape(op, "factor_z", factor_z, {"R": features, "Z": context})
    if factor_out is not None:
        axes = ("O", "R") if factor_x.dim() == 2 else ("O'", "O")
        check_shape(op, "factor_out", factor_out, {axes[0]: None, axes[1]: features})
        features = factor_out.shape[0]
    check_shape(op, "weight_z", weight_z, {"O": features, "Z": context})
    check_shape(op, "weight_x", weight_x, {"O": features, "X": width})
    bias = expand_bias_to(features, bias)
    check_shape(op, "bias", bias, {"O": features})
    return (*tensors, bias), lead


def _plan(activation_x: str, activation_z: str, **arguments: Any) -> Plan:
    tensors, lead = _arguments([arguments[name] for name in _NAMES], activation_x, activation_z)
    return plans.low_rank(backends.choose(tensors[0], "low_rank"), lead, *tensors)


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {"low_rank": (low_rank, _plan)}
