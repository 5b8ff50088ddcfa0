"""The public functions of the adaptive-norm block: views as the kernels take them, backend, call."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops.activations import ActivationName
from ..ops.autocast import dtype_in_force
from ..ops.backend import get
from ..ops.modulate import autograd as elementwise
from ..ops.modulate import plan as modulate_plan
from ..ops.norm import autograd as rules
from ..ops.norm import plan as plans
from ..ops.norm import reference
from ..ops.plan import Plan
from ..parallel import calls as distributed
from ._arguments import same_rank
from ._norm_arguments import (
    NAMES,
    Maybe,
    NormName,
    Rule,
    check_residual,
    fits,
    prepared,
    residual_fits,
)
from .gates import PLANNED as MODULATION
from .gates import modulate

__all__ = ["NormName", "gated_residual", "gated_residual_norm_modulate", "norm_modulate"]


def norm_modulate(
    x: Tensor,  # [..., C], or [B, C, ...] for group
    scale: Tensor | None,  # broadcasts to x
    shift: Tensor | None = None,  # broadcasts to x
    *,
    norm: NormName = "layer",
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    groups: int | None = None,
    eps: float = 1e-5,
    scale_offset: float = 1.0,
    activation: ActivationName = "identity",
) -> Tensor:
    r"""Normalisation with modulation (adaptive layer norm, RMS norm, group norm) in one pass over x.

    .. math:: y = (\mathrm{norm}(x) \cdot weight + bias) \cdot (\mathrm{act}(scale) + s) + shift

    ``norm`` says what is normalised by itself, with mean m and mean of squares, v around m:

    * ``"layer"``: each row of the last dimension, :math:`(x - m) / \sqrt{v + eps}`;
    * ``"rms"``: the same without the mean, :math:`x / \sqrt{\mathrm{mean}(x^2) + eps}`;
    * ``"group"``: of each sample ``x[b]`` each of ``groups`` equal parts of the channels, as layer norm.

    Args:
        x: input of shape ``[..., C]``; for group norm ``[B, C, ...]``, in either memory format.
        scale: broadcasts to ``x``: ``[B, 1, C]`` for tokens ``[B, T, C]``, ``[B, C, 1, 1]`` for feature maps
            ``[B, C, H, W]``. Strided views, as chunks of one linear layer's output, are taken as they are.
            None: the factor is 1, whatever ``scale_offset`` is.
        shift: broadcasts to ``x``, optional.
        norm: ``"layer"``, ``"rms"`` or ``"group"``.
        weight: of shape ``[C]``, optional.
        bias: of shape ``[C]``, optional.
        groups: number of groups, for group norm only; it divides C.
        eps: what is added to the variance, not negative.
        scale_offset: s.
        activation: as in :func:`mi_kernels.modulate`; softmax is over the last dimension of ``scale``.

    Returns:
        y of the shape of ``x`` and the dtype of the arguments, contiguous, or with the channels last if those
        of ``x`` are.

    Statistics are computed in float32 (of float64 in float64) around the mean. Dtypes are float64, float32,
    bfloat16 and float16; where they differ, y has the dtype that PyTorch promotes all arguments to, as in
    :func:`mi_kernels.modulate`.

    All tensors have one device. Differentiable in all tensors to any order, in reverse and in forward mode.
    The backward pass is one pass over x and the gradient of y, which computes all other gradients too. It
    saves x, the small arguments and the statistics.

    Scale and shift that differ from pixel to pixel within a group are a second pass, that of
    :func:`mi_kernels.modulate`. Under ``torch.compile`` it is one operation on backends that have kernels for
    it, else plain PyTorch code, which Inductor fuses.

    Raises:
        TypeError: an argument is no dense tensor, its dtype is unsupported, ``groups`` is no int, or ``eps``
            or ``scale_offset`` is no number.
        ValueError: a shape does not fit or would widen ``x``, devices differ, ``norm`` or ``activation`` is
            unknown, ``groups`` is missing, given for another norm or does not divide C, ``eps`` is negative,
            or the backend asked for by name cannot take these tensors.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
    Normalization", NeurIPS 2019; Wu and He, "Group Normalization", ECCV 2018; Perez et al., "FiLM",
    AAAI 2018; Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (adaLN).

    Example:
        >>> tokens, scale, shift = torch.randn(2, 7, 5), torch.randn(2, 1, 5), torch.randn(2, 1, 5)
        >>> mi.norm_modulate(tokens, scale, shift).shape
        torch.Size([2, 7, 5])
    """
    rule = Rule(norm, groups, eps, activation, scale_offset)
    return _block("norm_modulate", (x, None, None, scale, shift, weight, bias), rule)[0]


def gated_residual(
    x: Tensor,  # [...]
    h: Tensor,  # of the shape of x
    gate: Tensor | None = None,  # broadcasts to x
) -> Tensor:
    r"""A residual connection with a gate, in one pass.

    .. math:: y = x + gate \cdot h

    Args:
        x: the residual stream, of any shape.
        h: what a block adds to it, of the same shape.
        gate: broadcasts to ``x``, optional: ``[B, 1, C]`` for tokens ``[B, T, C]``. None: y = x + h.

    Returns:
        y of the shape of ``x`` and the dtype of the arguments; with a gate in the memory format of ``h``.

    Dtypes and their promotion, devices and derivatives of any order as :func:`mi_kernels.modulate`, which it
    is, of h by the gate with x as the shift. Under ``torch.compile`` it is plain PyTorch code.

    Raises:
        TypeError: an argument is no dense tensor, or its dtype is unsupported.
        ValueError: ``h`` has another shape than ``x``, the gate does not broadcast to it, or devices differ.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (adaLN-Zero).

    Example:
        >>> x, h, gate = torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.randn(2, 1, 5)
        >>> mi.gated_residual(x, h, gate).shape
        torch.Size([2, 7, 5])
    """
    if backends.eager_cpu(x, "modulate") is None or not residual_fits(x, h, gate):
        check_residual("gated_residual", x, h, gate)
    return x + h if gate is None else modulate(h, gate, x)


def gated_residual_norm_modulate(
    x: Tensor,  # [..., C], or [B, C, ...] for group
    h: Tensor,  # of the shape of x
    gate: Tensor | None,  # broadcasts to x
    scale: Tensor | None,  # broadcasts to x
    shift: Tensor | None,  # broadcasts to x
    *,
    norm: NormName = "layer",
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    groups: int | None = None,
    eps: float = 1e-5,
    scale_offset: float = 1.0,
    activation: ActivationName = "identity",
) -> tuple[Tensor, Tensor]:
    r"""A gated residual connection and the normalisation with modulation after it, in one pass over x and h.

    .. math:: x_{new} = x + gate \cdot h, \quad
        y = (\mathrm{norm}(x_{new}) \cdot weight + bias) \cdot (\mathrm{act}(scale) + s) + shift

    Args:
        x: the residual stream, as in :func:`norm_modulate`.
        h: what a block adds to it, of the same shape.
        gate: broadcasts to ``x``, or None: then x_new = x + h.
        scale, shift, norm, weight, bias, groups, eps, scale_offset, activation: as in :func:`norm_modulate`.

    Returns:
        x_new and y, of the shape of ``x`` and the dtype of the arguments.

    Dtypes, devices and derivatives as :func:`norm_modulate`. The backward pass is one pass over x_new, h and
    both gradients. Instead of x it saves x_new, and h only for the gradient of the gate. y is normalised from
    x_new as it is returned, rounded to its dtype.

    Raises:
        TypeError, ValueError: as :func:`norm_modulate`; ``h`` has another shape than ``x``.

    Source: as :func:`norm_modulate`; the block of Peebles and Xie, ICCV 2023.

    Example:
        >>> x, h, context = torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.randn(2, 1, 15)
        >>> x_new, y = mi.gated_residual_norm_modulate(x, h, *context.chunk(3, -1))
    """
    rule = Rule(norm, groups, eps, activation, scale_offset)
    y, x_new = _block("gated_residual_norm_modulate", (x, h, gate, scale, shift, weight, bias), rule)
    return x_new, y


def _block(op: str, tensors: tuple[Any, ...], rule: Rule) -> tuple[Tensor, Tensor]:
    """y and x_new, which without h has no meaning."""
    backend = backends.eager_cpu(tensors[0], "norm")
    if backend is not None and fits(op, tensors, rule):
        return _called(backend, tensors, rule)
    tensors, rule = prepared(op, tensors, rule)
    chosen = backends.choose(tensors[0], "norm")
    if _is_one_operation(chosen):
        return _called(chosen, tensors, rule)
    return _formula(tensors, rule)


def _is_one_operation(backend: str) -> bool:
    """Whether a backend is called, or the formula evaluated.

    Where nothing compiles, any backend is. Inductor fuses the formula too, but on the CPU its code for layer
    and group norm takes 1.5 to 1.9 times as long as our kernels in the mean of the shapes measured, though
    less at a few (docs/performance.md). Operations without kernels would only keep it from fusing.
    """
    record = get(backend)
    return not record.is_reference and (record.fused or not torch.compiler.is_compiling())


def _formula(tensors: Sequence[Any], rule: Rule) -> tuple[Tensor, Tensor]:
    x, h, gate, scale, shift, weight, bias = tensors
    device = x.device.type
    if dtype_in_force(device) is not None:  # the arguments have their dtypes; autocast would widen y
        with torch.autocast(device, enabled=False):
            return _formula(tensors, rule)
    x_new = x if h is None else reference.gated_residual(x, h, gate)
    options = {"weight": weight, "bias": bias} | rule._asdict()
    return reference.norm_modulate(x_new, scale, shift, **options), x_new


def _called(backend: str, tensors: Sequence[Any], rule: Rule) -> tuple[Tensor, Tensor]:
    """y and x_new of checked arguments, as the operations of a backend."""
    x, h, gate, scale, shift, weight, bias = tensors
    norm, groups, eps, activation, scale_offset = rule
    rank, shape = x.dim(), x.shape
    if scale is not None and activation == "softmax":  # before its last dimension is expanded
        activation, scale = "identity", torch.softmax(scale, -1)
    dim = 1 if norm == "group" else rank - 1
    contexts = [None if t is None else same_rank(t, rank) for t in (gate, scale, shift)]
    if weight is not None or bias is not None:
        behind = (None,) * (rank - 1 - dim)
        weight, bias = (
            None if t is None else t[(None,) * dim + (slice(None),) + behind] for t in (weight, bias)
        )
    numbers = dim, groups or 1, norm != "rms", float(eps), activation, float(scale_offset)
    if dim == rank - 1 or not any(_varies(t, dim) for t in contexts):
        gate, scale, shift = _of_one_size(shape, dim, contexts)
        return rules.norm_modulate(backend, x, h, gate, scale, shift, weight, bias, *numbers)
    gate, scale, shift = contexts
    x_new, outside = x, _varies(scale, dim) or _varies(shift, dim)
    if gate is not None and _varies(gate, dim):
        x_new, h, gate = elementwise.modulate(backend, h, gate, x, "identity", 0.0), None, None
    inside = _of_one_size(shape, dim, (gate, None, None) if outside else (gate, scale, shift))
    y, added = rules.norm_modulate(backend, x_new, h, inside[0], inside[1], inside[2], weight, bias, *numbers)
    if outside and scale is not None:
        y = elementwise.modulate(backend, y, scale, shift, activation, float(scale_offset))
    elif outside and shift is not None:
        y = y + shift
    return y, x_new if h is None else added


def _varies(context: Maybe, dim: int) -> bool:
    """Whether a context differs from pixel to pixel."""
    return context is not None and any(size != 1 for size in context.shape[dim + 1 :])


def _of_one_size(shape: torch.Size, dim: int, contexts: Sequence[Maybe]) -> list[Maybe]:
    """The contexts as views of the least size that all of them, and the channels, broadcast to."""
    size = [1] * len(shape)
    size[dim] = shape[dim]
    given = [t.shape for t in contexts if t is not None]
    for d in range(dim):
        if any(own[d] != 1 for own in given):
            size[d] = shape[d]
    common = torch.Size(size)
    return [t if t is None or t.shape == common else distributed.expanded(t, common) for t in contexts]


def _plan(op: str, tensors: tuple[Any, ...], rule: Rule) -> Plan:
    given = tensors
    tensors, rule = prepared(op, tensors, rule)
    x = tensors[0]
    dim = 1 if rule.norm == "group" else x.dim() - 1
    gate, *modulation = (_varies(None if t is None else same_rank(t, x.dim()), dim) for t in tensors[2:5])
    chosen = backends.choose(x, "norm")
    plan = plans.norm_modulate(chosen, op, rule.norm != "rms", gate + any(modulation), dim, *tensors)
    differ = any(t is not None and t.dtype != x.dtype for t in given)
    return modulate_plan.with_casts(plan, NAMES, given, x.dtype) if differ else plan


def _plan_norm(x: Any, scale: Any, shift: Any, weight: Any, bias: Any, **rule: Any) -> Plan:
    return _plan("norm_modulate", (x, None, None, scale, shift, weight, bias), Rule(**rule))


def _plan_block(
    x: Any, h: Any, gate: Any, scale: Any, shift: Any, weight: Any, bias: Any, **rule: Any
) -> Plan:
    return _plan("gated_residual_norm_modulate", (x, h, gate, scale, shift, weight, bias), Rule(**rule))


def _plan_residual(x: Any, h: Any, gate: Any) -> Plan:
    dtype = check_residual("gated_residual", x, h, gate)
    if gate is None:
        return plans.residual(backends.choose(x, "modulate"), x if dtype is None else x.to(dtype), h)
    plan = MODULATION["modulate"][1]
    found = plan(x=h, scale=gate, shift=x, activation="identity", scale_offset=0.0, scale_factor=1.0)
    return replace(found, op="gated_residual")


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {
    "gated_residual": (gated_residual, _plan_residual),
    "gated_residual_norm_modulate": (gated_residual_norm_modulate, _plan_block),
    "norm_modulate": (norm_modulate, _plan_norm),
}
