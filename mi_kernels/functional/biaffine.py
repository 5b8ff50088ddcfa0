"""The biaffine form, all pairs of two sequences: checks, autocast, choice of a backend, call."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops.backend import get
from ..ops.checks import check_flag
from ..ops.interaction import biaffine as pairs
from ..ops.interaction import plan_biaffine, reference
from ..ops.library import Axes
from ..ops.plan import Plan
from ..parallel import calls as distributed
from ._arguments import autocast

__all__ = ["biaffine"]


def biaffine(
    input1: Tensor,  # [..., L1, I1]
    input2: Tensor,  # [..., L2, I2]
    weight: Tensor,  # [O, I1 (+ 1), I2 (+ 1)]
    bias: Tensor | None = None,  # [O]
    *,
    ones: tuple[bool, bool] = (False, False),
    channels_first: bool = False,
) -> Tensor:
    r"""Scores of all pairs of two sequences, as in biaffine parsers and bilinear attention.

    .. math:: y_{lmo} = [x_l; 1]^T W_o [x'_m; 1] + c_o, \quad \text{either 1 being optional}

    Args:
        input1: the first sequence, x of shape ``[..., L1, I1]``.
        input2: the second one, x' of shape ``[..., L2, I2]``. Their leading dimensions broadcast.
        weight: W of shape ``[O, I1, I2]``, where a sequence with a one has one more row or column, the last.
        bias: c of shape ``[O]``, ``[1]`` or ``[]``, optional.
        ones: whether each of the two inputs has a constant feature 1 appended. No input is copied for it.
        channels_first: the order of the result.

    Returns:
        y of shape ``[..., L1, L2, O]``, or ``[..., O, L1, L2]`` with ``channels_first``, contiguous, in the
        dtype of the inputs (the autocast dtype under autocast).

    A layer ``W' = W [x'; 1]`` is generated for each position of the second sequence and applied to the first
    one, in 2 L2 O I1 (I2 + L1) operations a sample; or the other way round, for one output where that is no
    dearer, and with ``channels_first`` outside of the CPU's kernels. On the CPU, without gradients, only the
    layers of a few samples are in memory at a time; with gradients they are saved for backward.

    Dtypes, devices and derivatives (of any order) as :func:`mi_kernels.interaction`.

    Raises:
        TypeError: an argument is no dense tensor, its dtype is unsupported or not that of ``input1``, or
            ``ones`` is no pair of bools.
        ValueError: a rank, size or device does not fit, or the backend asked for by name cannot take these
            tensors.

    Source: Dozat and Manning, "Deep Biaffine Attention for Neural Dependency Parsing", ICLR 2017. With
    ``channels_first`` the values are those of ``Biaffine`` in supar (``weight [O, I1 + 1, I2 + 1]``) and of
    ``BilinearMatrixAttention`` in AllenNLP (``bias [1]``); ``weight.permute(2, 0, 1)`` takes that of
    ``BiaffineScorer`` in stanza.

    Example:
        >>> heads, dependents = torch.randn(2, 7, 5), torch.randn(2, 7, 3)
        >>> mi.biaffine(heads, dependents, torch.randn(4, 6, 4), ones=(True, True)).shape
        torch.Size([2, 7, 7, 4])
    """
    backend = backends.eager_cpu(input1)
    if (
        backend is not None
        and type(channels_first) is bool
        and pairs.fits(input1, input2, weight, bias, ones)
    ):
        return pairs.biaffine(backend, input1, input2, weight, bias, *ones, channels_first)
    input1, input2, weight, bias = autocast((input1, input2, weight, bias))
    lead = _check(input1, input2, weight, bias, ones, channels_first)
    one1, one2 = map(bool, ones)
    bias = _expanded(bias, weight.shape[0])
    if distributed.given(input1, input2, weight, bias):
        return _on_parts(input1, input2, weight, bias, one1, one2, bool(channels_first))
    chosen = backends.choose(input1)
    if get(chosen).is_reference:
        return reference.biaffine(input1, input2, weight, bias, (one1, one2), bool(channels_first))
    first, second = _flattened(input1, lead), _flattened(input2, lead)
    y = pairs.biaffine(chosen, first, second, weight, bias, one1, one2, bool(channels_first))
    return y if len(lead) == 1 else y.view(*lead, *y.shape[1:])


def _on_parts(
    input1: Any, input2: Any, weight: Any, bias: Any, one1: bool, one2: bool, channels_first: bool
) -> Any:
    """y of DTensors. An axis of W that has a one more than the input is not cut."""
    first, second = "i" if one1 else "I", "j" if one2 else "J"
    axes = {"input1": "*LI", "input2": "*MJ", "weight": f"O{first}{second}", "bias": "O"}
    result = Axes("*OLM" if channels_first else "*LMO", (("input1", "input2", "weight"), ("bias",)))
    tensors = dict(zip(axes, (input1, input2, weight, bias), strict=True))
    function = functools.partial(biaffine, ones=(one1, one2), channels_first=channels_first)
    cuts = "*LMO" + ("" if one1 else "I") + ("" if one2 else "J")
    return distributed.run("biaffine", function, tensors, axes, (result,), cuts)


def _flattened(tensor: Tensor, lead: torch.Size) -> Tensor:
    """[..., L, I] as [B, L, I]."""
    if len(lead) == 1 and tensor.dim() == 3 and tensor.shape[:1] == lead:
        return tensor
    sizes = tensor.shape[-2:]
    return tensor.expand(*lead, *sizes).reshape(math.prod(lead), *sizes)


def _expanded(bias: Tensor | None, out: int) -> Tensor | None:
    if bias is None or (bias.dim() == 1 and bias.shape[0] == out):
        return bias
    return bias.reshape(1).expand(out)


def _check(input1: Any, input2: Any, weight: Any, bias: Any, ones: Any, channels_first: Any) -> torch.Size:
    op = "biaffine"
    if not isinstance(ones, tuple | list) or len(ones) != 2:
        raise TypeError(f"{op}: ones: expected a pair of bools, got {ones!r}")
    for flag in ones:
        check_flag(op, "ones", flag)
    check_flag(op, "channels_first", channels_first)
    return pairs.check_arguments(input1, input2, weight, bias, ones[0], ones[1])


def _plan(input1: Any, input2: Any, weight: Any, bias: Any, ones: Any, channels_first: Any) -> Plan:
    input1, input2, weight, bias = autocast((input1, input2, weight, bias))
    lead = _check(input1, input2, weight, bias, ones, channels_first)
    first, second = (_flattened(tensor, lead) for tensor in (input1, input2))
    return plan_biaffine.plan(
        backends.choose(input1),
        first,
        second,
        weight,
        _expanded(bias, weight.shape[0]),
        bool(ones[1]),
        bool(channels_first),
    )


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {"biaffine": (biaffine, _plan)}
