"""The public function of gated mixtures: broadcasting, checks, choice of a backend, call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops import activations
from ..ops.activations import ActivationName
from ..ops.backend import get
from ..ops.checks import broadcast_like, check_activation, check_rank, check_tensors
from ..ops.dtypes import FLOATING
from ..ops.modulate import autograd as elementwise
from ..ops.modulate import plan as modulate_plan
from ..ops.modulate import reference, small
from ..ops.plan import Plan
from ..parallel import calls as distributed
from ._arguments import promoted_dtype, same_rank

__all__ = ["mix"]


def mix(
    a: Tensor,  # [...]
    b: Tensor,  # broadcasts with a
    gate: Tensor,  # broadcasts with a
    *,
    activation: ActivationName = "sigmoid",
) -> Tensor:
    r"""Mixture of two tensors by a gate, in one pass over them.

    .. math:: y = b + \mathrm{act}(gate) \cdot (a - b)

    Highway layers (b the input, a its transformation), updates as of a GRU (b the state), AlphaStar's
    VectorMerge, and all that chooses softly between two tensors, as mixing networks in the manner of QMIX do.

    Args:
        a: what an open gate lets through, of any shape.
        b: what a closed one does; broadcasts with ``a``.
        gate: before the activation; broadcasts with ``a``: ``[B, 1, C]`` for tokens ``[B, T, C]``,
            ``[B, C, 1, 1]`` for feature maps in either memory format, ``[B, 1]`` for rows. It is not expanded
            in memory.
        activation: as in :func:`mi_kernels.modulate`; softmax is over the last dimension of ``gate``.

    Returns:
        y of the broadcast shape, in the memory format of ``a`` and the dtype of the arguments.

    Where a and b are equal, y is the same. An activation of exactly 1 gives b + (a - b), a up to rounding.
    Inf and NaN come out as of the formula; ``torch.lerp`` has another one for weights from 1/2 on.

    Dtypes and their promotion, devices and derivatives of any order as :func:`mi_kernels.modulate`. The three
    gradients, that of ``gate`` summed over its broadcast dimensions, are computed in one pass, from the
    arguments, which are saved for backward; those of an ``a`` or ``b`` that broadcasts are summed by PyTorch.
    Under ``torch.compile``, and for few elements, it is plain PyTorch code.

    Raises:
        TypeError: an argument is no dense tensor, or its dtype is unsupported.
        ValueError: shapes do not broadcast, devices differ, the activation is unknown, or the backend asked
            for by name cannot take these tensors.

    Source: Srivastava, Greff and Schmidhuber, "Highway Networks", 2015; Cho et al., "Learning Phrase
    Representations using RNN Encoder-Decoder", EMNLP 2014 (GRU); Vinyals et al., "Grandmaster level in
    StarCraft II", Nature 2019 (VectorMerge); Rashid et al., "QMIX", ICML 2018.

    Example:
        >>> new, old, gate = torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.randn(2, 1, 5)
        >>> mi.mix(new, old, gate).shape
        torch.Size([2, 7, 5])
    """
    if backends.is_open() and b is not None and small.takes(a, gate, b, activation, 0.0):
        return small.mix(a, b, gate, activation)
    backend = backends.eager_cpu(a, "modulate")
    if backend is not None and b is not None and small.fits(a, gate, b, activation, 0.0):
        return _mixed(backend, a, b, gate, activation)
    dtype = promoted_dtype("mix", _NAMES, (a, b, gate), 3)
    if dtype is not None:
        *tensors, activation = _cast(dtype, a, b, gate, activation)
        return mix(*tensors, activation=activation)
    shape = _check(a, b, gate, activation)
    chosen = backends.choose(a, "modulate")
    if get(chosen).is_reference or torch.compiler.is_compiling():
        return reference.mix(a, b, gate, activation=activation)
    return _mixed(chosen, a if a.shape == shape else distributed.expanded(a, shape), b, gate, activation)


_NAMES = ("a", "b", "gate")


def _mixed(backend: str, a: Tensor, b: Tensor, gate: Tensor, activation: str) -> Tensor:
    """y of checked arguments, which broadcast to the shape of a."""
    b = b if b.shape == a.shape else distributed.expanded(b, a.shape)
    return elementwise.mix(backend, a, b, same_rank(gate, a.dim()), activation)


def _cast(dtype: torch.dtype, a: Any, b: Any, gate: Any, activation: Any) -> Any:
    """The arguments with tensors of one dtype. A number that loses digits is activated before the cast."""
    if torch.promote_types(gate.dtype, dtype) != dtype:
        check_activation("mix", activation, activations.NAMES)
        gate, activation = activations.value(activation, gate), "identity"
    return a.to(dtype), b.to(dtype), gate.to(dtype), activation


def _check(a: Tensor, b: Tensor, gate: Tensor, activation: str) -> torch.Size:
    check_activation("mix", activation, activations.NAMES)
    check_tensors("mix", _NAMES, (a, b, gate), 3, FLOATING)
    check_rank("mix", "a", a, 1)
    shape = broadcast_like("mix", ("a", "b"), a.shape, b)
    return broadcast_like("mix", ("a and b", "gate"), shape, gate)


def _plan(a: Any, b: Any, gate: Any, activation: str) -> Plan:
    given = (a, b, gate)
    dtype = promoted_dtype("mix", _NAMES, given, 3)
    if dtype is not None:
        a, b, gate, activation = _cast(dtype, *given, activation)
    own = (
        small.ALGORITHM
        if backends.is_open() and b is not None and small.takes(a, gate, b, activation, 0.0)
        else None
    )
    shape = _check(a, b, gate, activation)
    plan = modulate_plan.mix(backends.choose(a, "modulate"), shape, a, b, gate, own)
    return plan if dtype is None else modulate_plan.with_casts(plan, _NAMES, given, dtype)


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {"mix": (mix, _plan)}
