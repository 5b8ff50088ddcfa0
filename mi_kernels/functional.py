"""The public functions: validation, autocast, broadcasting, choice of a backend, call."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mi_kernels import backends, calls, records
from mi_kernels.ops.autocast import dtype_in_force, lower
from mi_kernels.ops.interaction import plan_shared, planned, ragged, reference
from mi_kernels.ops.interaction.arguments import BILINEAR, INTERACTION, Spelling, check
from mi_kernels.ops.interaction.packed import PackedWeight
from mi_kernels.ops.interaction.plan import Plan
from mi_kernels.ops.rules import differentiating
from mi_kernels.validation import spread_bias


def interaction(
    x: Tensor,  # [..., X]
    z: Tensor,  # [..., Z]
    weight: Tensor | PackedWeight | None,  # [O, Z, X]
    weight_z: Tensor | None = None,  # [O, Z]
    weight_x: Tensor | None = None,  # [O, X]
    bias: Tensor | None = None,  # [O]
    *,
    segment_ids: Tensor | None = None,  # [N]
) -> Tensor:
    r"""Dense multiplicative interaction of an input and a context, in one pass.

    .. math:: y_o = \sum_{ij} z_i W_{oij} x_j + \sum_i U_{oi} z_i + \sum_j V_{oj} x_j + c_o

    Args:
        x: input of shape ``[..., X]``.
        z: context of shape ``[..., Z]``. The leading dimensions of ``x`` and ``z`` broadcast.
        weight: W of shape ``[O, Z, X]``, also as :func:`mi_kernels.pack` returns it, or None to leave the
            product out.
        weight_z: U of shape ``[O, Z]``, optional.
        weight_x: V of shape ``[O, X]``, optional.
        bias: c of shape ``[O]``, optional; ``[1, O]`` and scalars stand for it.
        segment_ids: for inputs in groups of unequal length, one context for each group: ``x [N, X]``,
            ``z [G, Z]``, and row n has context ``segment_ids[n]``. int64 of shape ``[N]`` with numbers from
            0 to G - 1, sorted or not; a group may be empty. ``torch.repeat_interleave(lengths)`` makes such
            numbers of the lengths of packed sequences.

    Returns:
        y of shape ``[..., O]`` in the dtype of the inputs (the autocast dtype under autocast).

    Where rows share a context (or contexts an input), ``W' = z W + V`` is generated once for each context
    and applied to its rows, if that is estimated to be faster and W' is small enough
    (ops/interaction/costs.py); ``explain`` says which. Groups of about one length are one product. Nothing
    is padded to the longest group: rows of zeros fill groups up only where they cost less than one more
    product, and are never more than the rows that there are. Under ``torch.compile`` (and other tracers),
    and under ``torch.vmap`` over ``segment_ids``, the numbers are not looked at: each row gets its own copy
    of its context (N Z elements), and numbers out of range are found by PyTorch's indexing. Nested tensors
    are refused: pass ``x.values()`` and ``torch.repeat_interleave(x.offsets().diff())``.

    All tensors have one dtype, of float64, float32, bfloat16, float16 (16 bits accumulate in float32)
    or an integer dtype, and lie on one device. Differentiable in all arguments, to any order, in
    reverse and in forward mode; works under ``torch.func``, ``torch.vmap`` and ``torch.compile``.

    Raises:
        TypeError: an argument is no dense tensor, or its dtype is unsupported or not that of ``x``.
        ValueError: a rank, size or device does not fit, all four weights are None, or the backend
            asked for by name cannot take these tensors.

    Source: Jayakumar et al., "Multiplicative Interactions and Where to Find Them", ICLR 2020.
    """
    weights = weight, weight_z, weight_x, bias
    return _interaction(INTERACTION, x, z, *weights, segment_ids=segment_ids)


def bilinear(
    input1: Tensor,  # [..., in1]
    input2: Tensor,  # [..., in2]
    weight: Tensor | PackedWeight,  # [out, in1, in2]
    bias: Tensor | None = None,  # [out]
) -> Tensor:
    r"""Drop-in for :func:`torch.nn.functional.bilinear`: :math:`y = x_1^T A x_2 + b`.

    Args:
        input1: shape ``[..., in1]``.
        input2: shape ``[..., in2]``. Unlike in PyTorch, leading dimensions broadcast.
        weight: A of shape ``[out, in1, in2]``, also as :func:`mi_kernels.pack` returns it.
        bias: b of shape ``[out]``, optional; ``[1, out]`` and scalars stand for it.

    Returns:
        y of shape ``[..., out]``. dtypes, differentiability and errors are those of :func:`interaction`.

    Source: ``torch.nn.functional.bilinear``; Jayakumar et al., ICLR 2020, equation 1 without U and V.
    """
    return _interaction(BILINEAR, input2, input1, weight, None, None, bias)


def explain(op: Callable[..., Any] | str, *arguments: Any, **keywords: Any) -> Plan:
    """What ``op(*arguments)`` would do, without doing it.

    Args:
        op: a public function of this package that computes, or its name; or a module, of ``mi.nn`` or with
            such modules in it.
        arguments, keywords: what ``op`` is called with; arguments and parameters that require grad ask for
            gradients.

    Returns:
        A printable :class:`~mi_kernels.ops.interaction.plan.Plan`: backend, algorithm, operations, bytes,
        scratch memory and the reason, for the forward pass and for each gradient primitive wanted.
        Of a module that calls several functions of this package, such as ``mi.nn.HyperMLP``, the sums, and
        the plan of each call in ``calls``.

    A module is run but for those calls, which return zeros: what else is in its forward is done, such as a
    context network, activations between layers, or hooks. Buffers and random numbers are put back after it.

    Raises:
        ValueError: ``op`` is unknown or a module without such calls, or as the function itself.
        TypeError: as the function itself.
    """
    if isinstance(op, torch.nn.Module):
        return calls.plan_of(op, arguments, keywords, explain)
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    function, planner = EXPLAINED.get(name, (explain, _explained(INTERACTION)))
    if name not in EXPLAINED or not (isinstance(op, str) or op is function):
        known = f"one of {', '.join(f'mi.{one}' for one in EXPLAINED)}, or a module"
        raise ValueError(f"explain: op: expected {known}, got {_foreign(op, name)}")
    try:
        bound = inspect.signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        raise TypeError(f"explain: {name}: {error}") from None
    bound.apply_defaults()
    found = planner(**bound.arguments)
    tensor = next(t for t in bound.arguments.values() if isinstance(t, Tensor))
    if found.backend != "portable" or tensor.device.type != "cuda":
        return found
    (tensor,) = autocast((tensor,))
    remark = backends.remark(tensor, name if name in records.FAMILIES else "interaction")
    return found if remark is None else replace(found, why=f"{found.why}; {remark}")


def _foreign(op: object, name: str) -> str:
    """What is no function of this package, in words that tell it from one that is."""
    if isinstance(op, str):
        return repr(op)
    if not callable(op):
        return type(op).__name__
    if isinstance(op, type):
        return f"the class {name}; pass an instance"
    torchs = getattr(torch.nn.functional, name, None) is op
    place = "torch.nn.functional" if torchs else getattr(op, "__module__", None)
    return f"{place}.{name}" + (f", which is another function; pass mi.{name}" if name in EXPLAINED else "")


def _explained(spelling: Spelling) -> Callable[..., Plan]:
    def planner(**bound: Any) -> Plan:
        x, z, weight, *others = (bound.get(argument) for argument in spelling.arguments)
        x, z, *weights = autocast((x, z, _unpacked(weight), *others))
        weights = [*weights[:-1], spread_bias(weights[-1], *weights[:-1])]
        segment_ids = bound.get("segment_ids")
        lead = check(spelling, x, z, *weights, segment_ids=segment_ids)
        if segment_ids is not None:
            return plan_shared.ragged_plan(backends.choose(x), segment_ids, x, z, weights)
        return plan_shared.plan(backends.choose(x), lead, x, z, weights)

    return planner


# For each name that `explain` knows, the function and what plans it from its arguments by name.
EXPLAINED: dict[str, tuple[Callable, Callable[..., Plan]]] = {
    "interaction": (interaction, _explained(INTERACTION)),
    "bilinear": (bilinear, _explained(BILINEAR)),
}


def _interaction(
    spelling: Spelling,
    x: Any,
    z: Any,
    weight: Any,
    *others: Tensor | None,
    segment_ids: Tensor | None = None,
    force: str | None = None,
) -> Tensor:
    """``force``: a plan of costs.py by name, for tests and benchmarks; else the cheapest one."""
    words = None
    if isinstance(weight, PackedWeight):
        weight, words = _laid_out(weight, (x, z, *others))
    x, z, *weights = autocast((x, z, weight, *others))
    weights = [*weights[:-1], spread_bias(weights[-1], *weights[:-1])]
    check(spelling, x, z, *weights, segment_ids=segment_ids)
    chosen = backends.choose(x)
    if chosen == "reference":
        z = z if segment_ids is None else ragged.of_rows(z, segment_ids)
        return reference.interaction(x, z, *weights)
    if chosen != "cpu":
        words = None
    weight, weight_z, weight_x, bias = weights
    return planned.interaction(chosen, x, z, weight, weight_z, weight_x, bias, segment_ids, words, force)


def _laid_out(packed: PackedWeight, others: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """The weight as it is, or where nothing is differentiated as autocast wants it, and as it was packed."""
    tensors = (packed.weight, *(tensor for tensor in others if isinstance(tensor, Tensor)))
    if torch.compiler.is_compiling() or differentiating(tensors):
        return packed.weight, None
    device = packed.weight.device.type
    return packed.laid_out(_autocast_dtype(packed.weight, device, dtype_in_force(device)))


def interaction_by(
    plan: str,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    weight_z: Tensor | None = None,
    weight_x: Tensor | None = None,
    bias: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """:func:`interaction` by one plan of ops/interaction/costs.py, for tests and benchmarks. Not public."""
    weights = weight, weight_z, weight_x, bias
    return _interaction(INTERACTION, x, z, *weights, segment_ids=segment_ids, force=plan)


def _unpacked(weight: Any) -> Any:
    return weight.weight if isinstance(weight, PackedWeight) else weight


def autocast(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as autocast wants those of a matrix product."""
    device = next((tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)), None)
    if device is None or (dtype := dtype_in_force(device)) is None:
        return tensors
    return tuple(
        lower(tensor, _autocast_dtype(tensor, device, dtype)) if isinstance(tensor, Tensor) else tensor
        for tensor in tensors
    )


def _autocast_dtype(tensor: Tensor, device: str, dtype: torch.dtype | None) -> torch.dtype:
    # The rule of autocast's own lower-precision list: floating point on its device, but not float64.
    if dtype is None or tensor.device.type != device or not tensor.is_floating_point():
        return tensor.dtype
    return tensor.dtype if tensor.dtype == torch.float64 else dtype
