"""The dense interaction and the bilinear form: broadcasting, checks, autocast, choice of a backend, call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops.autocast import dtype_in_force
from ..ops.backend import get
from ..ops.interaction import (
    all_pairs,
    batched,
    dispatch,
    eager,
    eager_batched,
    plan_batched,
    plan_shared,
    plan_third_order,
    reference,
    segments,
    third_order,
)
from ..ops.interaction.arguments import BILINEAR, INTERACTION, Spelling, check_arguments
from ..ops.interaction.packed_weight import PackedWeight
from ..ops.library import Axes
from ..ops.plan import Plan
from ..ops.rules import differentiating, is_distributed
from ..parallel import calls as distributed
from ._arguments import autocast, autocast_dtype, expand_bias_to

__all__ = ["bilinear", "interaction", "pack"]


def interaction(
    x: Tensor,  # [..., X]
    z: Tensor | tuple[Tensor, Tensor],  # [..., Z]
    weight: Tensor | PackedWeight | None,  # [..., O, Z, X]
    weight_z: Tensor | tuple[Tensor | None, Tensor | None] | None = None,  # [..., O, Z]
    weight_x: Tensor | None = None,  # [..., O, X]
    bias: Tensor | None = None,  # [..., O]
    *,
    segment_ids: Tensor | None = None,  # [N]
    weight_ids: Tensor | None = None,  # [...]
) -> Tensor:
    r"""Dense multiplicative interaction of an input and a context, in one pass.

    .. math:: y_o = \sum_{ij} z_i W_{oij} x_j + \sum_i U_{oi} z_i + \sum_j V_{oj} x_j + c_o

    Args:
        x: input of shape ``[..., X]``.
        z: context of shape ``[..., Z]``. The leading dimensions of ``x`` and ``z`` broadcast. A pair of
            contexts makes it an interaction of third order, see below.
        weight: W of shape ``[..., O, Z, X]``, also as :func:`mi_kernels.pack` returns it, or None to leave
            the product out. Leading dimensions are those of samples that have weights of their own; they
            broadcast with those of ``x`` and ``z``.
        weight_z: U of shape ``[..., O, Z]``, optional.
        weight_x: V of shape ``[..., O, X]``, optional.
        bias: c of shape ``[..., O]``, optional; ``[1, O]`` and scalars are accepted.
        segment_ids: for inputs in groups of unequal length, one context for each group: ``x [N, X]``,
            ``z [G, Z]``, and row n has context ``segment_ids[n]``. int64 of shape ``[N]`` with values from
            0 to G - 1, sorted or not; a group may be empty. ``torch.repeat_interleave(lengths)`` gives them
            for packed sequences.
        weight_ids: for samples that choose their weights: int64, of a shape that broadcasts with the leading
            dimensions of ``x`` and ``z``, with values from 0 to G - 1. Each of the weights then has a leading
            dimension of G (W is ``[G, O, Z, X]``), or is that of all samples.

    Returns:
        y of shape ``[..., O]`` in the dtype of the inputs (the autocast dtype under autocast).

    Where rows share a context (or contexts an input), ``W' = z W + V`` is generated once for each context
    and applied to its rows, if that is estimated to be faster and W' is small enough; ``explain`` says which.
    Nothing that is kept or made is larger than the largest of inputs, outputs and weights. Where W x is not,
    and few outputs are trained on the CPU, it is kept for the gradient of z.
    Weights of samples are read where they lie, and so are weights chosen by ``weight_ids``: the rows of one
    weight (with ``segment_ids``, of one W') are one product, wherever they are. ``torch.vmap`` over
    ``segment_ids`` or ``weight_ids`` copies: a context, or the weights, for each row. Under ``torch.compile``
    (and other tracers) values out of range are detected when the graph runs. Nested tensors are rejected:
    pass ``x.values()`` and ``torch.repeat_interleave(x.offsets().diff())``.

    With ``z = (z1, z2)``, contexts of shapes ``[..., Z1]`` and ``[..., Z2]``, it is

    .. math:: y_o = \sum_{ijk} W_{oijk} z_{1i} z_{2j} x_k + \sum_i U_{1oi} z_{1i} + \sum_j U_{2oj} z_{2j}
        + \sum_k V_{ok} x_k + c_o

    with ``weight [O, Z1, Z2, X]`` and ``weight_z`` None or a pair of U1 ``[O, Z1]`` and U2 ``[O, Z2]``,
    either of which may be None (products of two of the operands are calls of their own, to be added). W is
    multiplied by one operand first, once for each of its rows, or by the products of both contexts:
    whichever is estimated to be fastest; ``explain`` says which. What this generates is never larger than
    the largest of the arguments and y (with gradients, all parts of it are saved for backward). A W that is
    not contiguous may be copied for it. ``segment_ids``, ``weight_ids`` and weights of samples are not for
    pairs.

    All tensors have one dtype, of float64, float32, bfloat16, float16 (16 bits accumulate in float32)
    or an integer dtype, and one device. Differentiable in all arguments, to any order, in reverse and in
    forward mode; works under ``torch.func``, ``torch.vmap`` and ``torch.compile``.

    Raises:
        TypeError: an argument is no dense tensor, or its dtype is unsupported or not that of ``x``.
        ValueError: a rank, size or device does not fit, all four weights are None, or the backend
            asked for by name cannot take these tensors.

    Source: Jayakumar et al., "Multiplicative Interactions and Where to Find Them", ICLR 2020; of pairs:
    Liang et al., "MultiBench", NeurIPS 2021 (three modalities); Wang et al., "Second-Order Semantic
    Dependency Parsing with End-to-End Neural Networks", ACL 2019 (triaffine).

    Example:
        >>> x, z, weight = torch.randn(8, 5), torch.randn(8, 3), torch.randn(4, 3, 5)
        >>> mi.interaction(x, z, weight).shape
        torch.Size([8, 4])
        >>> mi.interaction(x, (z, torch.randn(8, 2)), torch.randn(4, 3, 2, 5)).shape
        torch.Size([8, 4])
    """
    if isinstance(z, tuple):
        return _third_order(x, z, weight, weight_z, weight_x, bias, segment_ids, weight_ids)
    weights: tuple[Any, ...] = weight, weight_z, weight_x, bias
    return _interaction(INTERACTION, x, z, *weights, segment_ids=segment_ids, weight_ids=weight_ids)


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
        bias: b of shape ``[out]``, optional; ``[1, out]`` and scalars are accepted.

    Returns:
        y of shape ``[..., out]``. Dtypes and derivatives are those of :func:`interaction`.

    Raises:
        TypeError, ValueError: as :func:`interaction`.

    Source: ``torch.nn.functional.bilinear``; Jayakumar et al., ICLR 2020, equation 1 without U and V.

    Example:
        >>> input1, input2, weight = torch.randn(8, 3), torch.randn(8, 5), torch.randn(4, 3, 5)
        >>> mi.bilinear(input1, input2, weight, torch.randn(4)).shape
        torch.Size([8, 4])
    """
    return _interaction(BILINEAR, input2, input1, weight, None, None, bias)


def pack(weight: Tensor) -> PackedWeight:
    """Packs a weight once for many calls without gradients.

    Args:
        weight: W of shape ``[O, Z, X]``, of a dtype that :func:`mi_kernels.interaction` takes.

    Returns:
        An object to pass as ``weight`` to :func:`mi_kernels.interaction` and :func:`mi_kernels.bilinear`. The
        result is the same, bit for bit. Calls that are differentiated, transformed or compiled, other
        backends, and calls of a few rows use ``weight`` itself.

    The copy has the size of W in the dtype in which W is multiplied (float32 for float16, and for bfloat16
    on CPUs without its instructions). There is none where the kernels read W in place: float32 and float64
    with X no smaller than Z; nor of a W that is contiguous along O, whose vectors of outputs need no other
    order. An in-place change of W, an optimiser step, ``load_state_dict`` or a move is detected by version
    counter, address, dtype, device and strides, and W is packed again; until then the memory of the packed
    tensor stays alive. Writes that PyTorch does not count are not detected: through ``weight.data``, NumPy,
    DLPack, or by another process. ``load_state_dict(..., assign=True)`` replaces the parameter: pack the new
    one.

    Raises:
        TypeError: ``weight`` is no dense tensor.
        ValueError: ``weight`` does not have three dimensions, or is an inference tensor (it has no version).

    Example:
        >>> weight = mi.pack(torch.randn(4, 3, 5))
        >>> mi.interaction(torch.randn(8, 5), torch.randn(8, 3), weight).shape
        torch.Size([8, 4])
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"pack: weight: expected a torch.Tensor, got {type(weight).__name__}")
    if weight.layout is not torch.strided or weight.is_nested:
        raise TypeError(f"pack: weight: expected a dense (strided) tensor, got {weight.layout}")
    if weight.dim() != 3:
        raise ValueError(f"pack: weight: expected shape [O, Z, X], got {list(weight.shape)}")
    if weight.is_inference():
        raise ValueError("pack: weight: expected a tensor with a version counter, got an inference tensor")
    return PackedWeight(weight)


def _interaction(
    spelling: Spelling,
    x: Any,
    z: Any,
    weight: Any,
    *others: Tensor | None,
    segment_ids: Tensor | None = None,
    weight_ids: Tensor | None = None,
    force: str | None = None,
) -> Tensor:
    """``force``: name of a plan of cost_model.py, for tests and benchmarks; default is the cheapest."""
    packed_weight = None
    if isinstance(weight, PackedWeight):
        weight, packed_weight = _cast_and_packed(weight, (x, z, *others))
    if (
        segment_ids is None
        and weight_ids is None
        and force is None
        and (weight is not None or spelling.required == 2)
    ):
        backend = backends.eager_cpu(x)
        y = eager.interaction(backend, packed_weight, x, z, weight, *others)
        if y is None:
            y = all_pairs.eager(backend, x, z, weight, *others)
        if y is None and spelling is INTERACTION:
            y = eager_batched.interaction(backend, x, z, weight, *others)
        if y is not None:
            return y
    x, z, *weights = autocast((x, z, weight, *others))
    weights = [*weights[:-1], _expand_bias(weight_ids is not None, *weights)]
    segment_ids, weight_ids = map(distributed.whole_index, (segment_ids, weight_ids))
    check_arguments(spelling, x, z, *weights, segment_ids=segment_ids, weight_ids=weight_ids)
    if distributed.given(x, z, *weights):
        return _on_parts(spelling, x, z, weights, segment_ids, weight_ids)
    chosen = backends.choose(x)
    if get(chosen).is_reference:
        z = z if segment_ids is None else segments.gather_rows(z, segment_ids)
        if weight_ids is not None:
            weights = batched.gathered(weights, weight_ids)
        return reference.interaction(x, z, *weights)
    if not get(chosen).packs:
        packed_weight = None
    weight, weight_z, weight_x, bias = weights
    return dispatch.interaction(
        chosen, x, z, weight, weight_z, weight_x, bias, segment_ids, weight_ids, packed_weight, force
    )


_TERMS = ("x", "z", "weight"), ("z", "weight_z"), ("x", "weight_x"), ("bias",)
_Y = (Axes("*O", _TERMS),)
_AXES = {"weight": "OZX", "weight_z": "OZ", "weight_x": "OX", "bias": "O"}


def _on_parts(
    spelling: Spelling,
    x: Any,
    z: Any,
    weights: Sequence[Any],
    segment_ids: Any,
    weight_ids: Any,
) -> Any:
    """y of DTensors."""
    tensors = {"x": x, "z": z, **dict(zip(_AXES, weights, strict=True))}
    axes = {"x": "*X", "z": "*Z" if segment_ids is None else "GZ", "segment_ids": "*", "weight_ids": "*"}
    for name, letters in _AXES.items():
        own = tensors[name] is not None and tensors[name].dim() > len(letters)
        chosen = weight_ids is not None or segment_ids is not None
        axes[name] = (("G" if own else "") if chosen else "*") + letters
    tensors |= {"segment_ids": segment_ids, "weight_ids": weight_ids}
    return distributed.run(spelling.op, interaction, tensors, axes, _Y, "*OZX")


def _third_order(
    x: Any,
    z: Any,
    weight: Any,
    weight_z: Any,
    weight_x: Any,
    bias: Any,
    segment_ids: Any = None,
    weight_ids: Any = None,
    force: str | None = None,
) -> Tensor:
    """``force``: one of third_order.ORDERS, for tests; default is the cheapest."""
    x, *contexts_and_weights = _of_pairs(x, z, weight, weight_z, weight_x, bias, segment_ids, weight_ids)
    z1, z2, weight, weight_z1, weight_z2, weight_x, bias = contexts_and_weights
    weights = weight, weight_z1, weight_z2, weight_x, bias
    third_order.check_arguments(x, z1, z2, *weights)
    if distributed.given(x, z1, z2, *weights):
        return _third_order_on_parts(x, z1, z2, *weights)
    chosen = backends.choose(x)
    if get(chosen).is_reference:
        return reference.third_order(x, z1, z2, *weights)
    return third_order.interaction(chosen, x, z1, z2, weight, weight_z1, weight_z2, weight_x, bias, force)


def _third_order_on_parts(x: Any, z1: Any, z2: Any, *weights: Any) -> Any:
    """y of DTensors."""

    def function(
        x: Any, z1: Any, z2: Any, weight: Any, weight_z1: Any, weight_z2: Any, weight_x: Any, bias: Any
    ) -> Any:
        return interaction(x, (z1, z2), weight, (weight_z1, weight_z2), weight_x, bias)

    axes = {"x": "*X", "z1": "*Y", "z2": "*Z", "weight": "OYZX"}
    axes |= {"weight_z1": "OY", "weight_z2": "OZ", "weight_x": "OX", "bias": "O"}
    products = ("x", "z1", "z2", "weight"), ("z1", "weight_z1"), ("z2", "weight_z2"), ("x", "weight_x")
    terms = *products, ("bias",)
    tensors = dict(zip(axes, (x, z1, z2, *weights), strict=True))
    return distributed.run("interaction", function, tensors, axes, (Axes("*O", terms),), "*OXYZ")


def _of_pairs(
    x: Any, z: Any, weight: Any, weight_z: Any, weight_x: Any, bias: Any, segment_ids: Any, weight_ids: Any
) -> tuple[Any, ...]:
    """x, z1, z2, W, U1, U2, V and c of a call with a pair of contexts."""
    if len(z) != 2:
        raise ValueError(f"interaction: z: expected a tensor or a pair of tensors, got {len(z)} of them")
    if isinstance(weight, PackedWeight):
        raise TypeError(
            "interaction: weight: expected a torch.Tensor for a pair of contexts, got PackedWeight"
        )
    if weight_z is not None and not (isinstance(weight_z, tuple | list) and len(weight_z) == 2):
        kind = type(weight_z).__name__
        raise TypeError(f"interaction: weight_z: expected a pair for a pair of contexts, got {kind}")
    for name, index in (("segment_ids", segment_ids), ("weight_ids", weight_ids)):
        if index is not None:
            raise ValueError(f"interaction: {name}: expected None for a pair of contexts, got a value")
    tensors = autocast((x, *z, weight, *(weight_z or (None, None)), weight_x))
    (bias,) = autocast((bias,))
    out = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 4 else None
    return (*tensors, bias if out is None else expand_bias_to(out, bias))


def _expand_bias(chosen: bool, *weights: Any) -> Any:
    """A scalar bias, or one of shape [1, O], as [O]; one of each sample is returned unchanged, and so is
    [G, O] where weights are ``chosen`` by index."""
    *matrices, bias = weights
    if bias is None or (chosen and isinstance(bias, Tensor) and bias.dim() > 1):
        return bias
    out = None
    for matrix, rank in zip(matrices, batched.RANKS, strict=False):
        if isinstance(matrix, Tensor) and not matrix.is_nested and matrix.dim() >= rank:
            out = matrix.shape[-rank]
            break
    return expand_bias_to(out, bias)


def _cast_and_packed(packed: PackedWeight, others: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """(weight, None) where something is differentiated, else the weight in autocast's dtype, and packed."""
    tensors = (packed.weight, *(tensor for tensor in others if isinstance(tensor, Tensor)))
    if torch.compiler.is_compiling() or is_distributed(packed.weight) or differentiating(tensors):
        return packed.weight, None
    device = packed.weight.device.type
    return packed.cast_and_packed(autocast_dtype(packed.weight, device, dtype_in_force(device)))


def interaction_by(
    plan: str,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    weight_z: Tensor | None = None,
    weight_x: Tensor | None = None,
    bias: Tensor | None = None,
    segment_ids: Tensor | None = None,
    weight_ids: Tensor | None = None,
) -> Tensor:
    """:func:`interaction` with a given plan of cost_model.py, for tests and benchmarks. Not public."""
    weights, ids = (weight, weight_z, weight_x, bias), {"segment_ids": segment_ids, "weight_ids": weight_ids}
    return _interaction(INTERACTION, x, z, *weights, **ids, force=plan)


def _unpacked(weight: Any) -> Any:
    return weight.weight if isinstance(weight, PackedWeight) else weight


def _planner(spelling: Spelling) -> Callable[..., Plan]:
    def planner(**bound: Any) -> Plan:
        if isinstance(bound.get("z"), tuple):
            tensors = _of_pairs(**bound)
            lead = third_order.check_arguments(*tensors)
            return plan_third_order.plan(backends.choose(tensors[0]), lead, *tensors)
        x, z, weight, *others = (bound.get(argument) for argument in spelling.arguments)
        x, z, *weights = autocast((x, z, _unpacked(weight), *others))
        segment_ids, weight_ids = bound.get("segment_ids"), bound.get("weight_ids")
        weights = [*weights[:-1], _expand_bias(weight_ids is not None, *weights)]
        lead = check_arguments(spelling, x, z, *weights, segment_ids=segment_ids, weight_ids=weight_ids)
        if weight_ids is not None or batched.has_leading_dimensions(weights):
            return plan_batched.plan(backends.choose(x), lead, x, z, weights, segment_ids, weight_ids)
        if segment_ids is not None:
            return plan_shared.ragged_plan(backends.choose(x), segment_ids, x, z, weights)
        return plan_shared.plan(backends.choose(x), lead, x, z, weights)

    return planner


# For `explain`: by name, the function and its planner, which takes the bound arguments as keywords.
PLANNED: dict[str, tuple[Callable[..., Any], Callable[..., Plan]]] = {
    "interaction": (interaction, _planner(INTERACTION)),
    "bilinear": (bilinear, _planner(BILINEAR)),
}
