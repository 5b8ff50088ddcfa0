"""The public functions of the adaptive-norm block: checks, views as the kernels take them, backend, call."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mi_kernels import backends
from mi_kernels.functional._arguments import promoted_dtype, same_rank
from mi_kernels.functional.gates import PLANNED as MODULATION
from mi_kernels.functional.gates import modulate
from mi_kernels.ops import activations
from mi_kernels.ops.activations import ActivationName
from mi_kernels.ops.autocast import dtype_in_force
from mi_kernels.ops.backend import get
from mi_kernels.ops.checks import (
    all_fit,
    broadcast,
    check_activation,
    check_number,
    check_rank,
    check_shape,
    check_tensors,
    is_coefficient,
)
from mi_kernels.ops.dtypes import FLOATING
from mi_kernels.ops.modulate import autograd as elementwise
from mi_kernels.ops.modulate import plan as modulate_plan
from mi_kernels.ops.modulate import reference as modulate_reference
from mi_kernels.ops.norm import autograd as rules
from mi_kernels.ops.norm import plan as plans
from mi_kernels.ops.norm import reference
from mi_kernels.ops.plan import Plan

__all__ = ["NormName", "gated_residual", "gated_residual_norm_modulate", "norm_modulate"]

NormName = Literal["layer", "rms", "group"]
NORMS: tuple[NormName, ...] = get_args(NormName)


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
    rule = _Rule(norm, groups, eps, activation, scale_offset)
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
        y of the shape of ``x`` and the dtype of the arguments.

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
    if backends.eager_cpu(x, "modulate") is None or not _residual_fits(x, h, gate):
        _check_residual("gated_residual", x, h, gate)
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
    rule = _Rule(norm, groups, eps, activation, scale_offset)
    y, x_new = _block("gated_residual_norm_modulate", (x, h, gate, scale, shift, weight, bias), rule)
    return x_new, y


Maybe = Tensor | None
_NAMES = ("x", "h", "gate", "scale", "shift", "weight", "bias")


class _Rule(NamedTuple):
    """All arguments but the tensors."""

    norm: str
    groups: int | None
    eps: float
    activation: str
    scale_offset: float


def _block(op: str, tensors: tuple[Any, ...], rule: _Rule) -> tuple[Tensor, Tensor]:
    """y and x_new, which without h has no meaning."""
    backend = backends.eager_cpu(tensors[0], "norm")
    if backend is not None and _fits(op, tensors, rule):
        return _called(backend, tensors, rule)
    tensors, rule = _prepared(op, tensors, rule)
    chosen = backends.choose(tensors[0], "norm")
    if _is_one_operation(chosen):
        return _called(chosen, tensors, rule)
    return _formula(tensors, rule)


def _is_one_operation(backend: str) -> bool:
    """Whether a backend is called, or the formula evaluated.

    Where nothing compiles, any backend is. Inductor fuses the formula too, but on the CPU its code for
    reductions over rows takes 2 to 4 times as long as our kernels, and has no fused backward pass over them.
    Operations without kernels would only keep it from fusing.
    """
    record = get(backend)
    return not record.is_reference and (record.fused or not torch.compiler.is_compiling())


def _formula(tensors: Sequence[Any], rule: _Rule) -> tuple[Tensor, Tensor]:
    x, h, gate, scale, shift, weight, bias = tensors
    device = x.device.type
    if dtype_in_force(device) is not None:  # the arguments have their dtypes; autocast would widen y
        with torch.autocast(device, enabled=False):
            return _formula(tensors, rule)
    x_new = x if h is None else reference.gated_residual(x, h, gate)
    options = {"weight": weight, "bias": bias} | rule._asdict()
    return reference.norm_modulate(x_new, scale, shift, **options), x_new


def _called(backend: str, tensors: Sequence[Any], rule: _Rule) -> tuple[Tensor, Tensor]:
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
    return [t if t is None or t.shape == common else t.expand(common) for t in contexts]


def _residual_fits(x: Any, h: Any, gate: Any) -> bool:
    try:
        shape = x.shape
        of_gate = shape if gate is None else gate.shape
        known = broadcast(shape, of_gate) == shape
    except (AttributeError, RuntimeError):
        return False
    return h is not None and known and all_fit(x.dtype, (x, h, gate), (shape, shape, of_gate))


def _fits(op: str, tensors: Sequence[Any], rule: _Rule) -> bool:
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


def _prepared(op: str, tensors: tuple[Any, ...], rule: _Rule) -> tuple[tuple[Any, ...], _Rule]:
    """The checked arguments, of one dtype."""
    required = 1 if op == "norm_modulate" else 2
    dtype = promoted_dtype(op, _NAMES, tensors, required)
    if dtype is not None:
        tensors, rule = _cast(op, dtype, tensors, rule)
    _check(op, tensors, rule, required)
    return tensors, rule


def _cast(op: str, dtype: torch.dtype, tensors: Sequence[Any], rule: _Rule) -> tuple[tuple[Any, ...], _Rule]:
    """Tensors of one dtype. A scale that is a number and loses digits is activated before the cast."""
    scale, tensors = tensors[3], list(tensors)
    if scale is not None and torch.promote_types(scale.dtype, dtype) != dtype:
        _check_rule(op, rule)
        tensors[3] = modulate_reference.gate(scale, rule.activation, rule.scale_offset)
        rule = rule._replace(activation="identity", scale_offset=0.0)
    return tuple(None if t is None else t.to(dtype) for t in tensors), rule


def _check_rule(op: str, rule: _Rule) -> None:
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


def _check(op: str, tensors: Sequence[Any], rule: _Rule, required: int) -> None:
    _check_rule(op, rule)
    check_tensors(op, _NAMES, tensors, required, FLOATING)
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


def _check_residual(op: str, x: Any, h: Any, gate: Any) -> torch.dtype | None:
    """The dtype that differing ones are promoted to."""
    names, tensors = _NAMES[:3], (x, h, gate)
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


def _plan(op: str, tensors: tuple[Any, ...], rule: _Rule) -> Plan:
    given = tensors
    tensors, rule = _prepared(op, tensors, rule)
    x = tensors[0]
    dim = 1 if rule.norm == "group" else x.dim() - 1
    gate, *modulation = (_varies(None if t is None else same_rank(t, x.dim()), dim) for t in tensors[2:5])
    chosen = backends.choose(x, "norm")
    plan = plans.norm_modulate(chosen, op, rule.norm != "rms", gate + any(modulation), *tensors)
    differ = any(t is not None and t.dtype != x.dtype for t in given)
    return modulate_plan.with_casts(plan, _NAMES, given, x.dtype) if differ else plan


def _plan_norm(x: Any, scale: Any, shift: Any, weight: Any, bias: Any, **rule: Any) -> Plan:
    return _plan("norm_modulate", (x, None, None, scale, shift, weight, bias), _Rule(**rule))


def _plan_block(
    x: Any, h: Any, gate: Any, scale: Any, shift: Any, weight: Any, bias: Any, **rule: Any
) -> Plan:
    return _plan("gated_residual_norm_modulate", (x, h, gate, scale, shift, weight, bias), _Rule(**rule))


def _plan_residual(x: Any, h: Any, gate: Any) -> Plan:
    dtype = _check_residual("gated_residual", x, h, gate)
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
