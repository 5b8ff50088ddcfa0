"""Direct calls of the registered operations: valid ones, and calls with each argument made invalid.

Operations are read from the dispatcher and their arguments from the schema, so that a new operation is found
automatically; it only needs a valid call in `GOOD`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.interaction import segments
from ..ops.namespace import NAMESPACE, OPS
from ._package import mi
from .biaffine_samples import ARC, LABEL
from .dual_samples import GLU, LOW_RANK
from .mix_samples import Mixing
from .norm_samples import Normalization
from .recurrent_samples import recurrent_calls
from .samples import GATE_ODD, ODD, WEIGHT_ONLY, GateSample, Modulation, Sample, Shape
from .shared_samples import TINY_RAGGED
from .third_order_samples import Triple

DTYPE = torch.float64  # correct results agree in nearly all digits
Arguments = tuple[Any, ...]


class Broken(NamedTuple):
    """A call with one argument changed.

    ``blamed``: if the changed call is certainly invalid and must raise, the arguments that the message may
    name. Else None: the call may also succeed.
    """

    what: str
    argument: str
    arguments: Arguments
    blamed: tuple[str, ...] | None


def operations() -> list[str]:
    """All operations of the namespace, including their variants for other backends."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.split("::")[1].split(".")[0] for name in names if name.startswith(f"{NAMESPACE}::")})


def schema(name: str) -> torch._C.FunctionSchema:
    """The schema of an operation, as the dispatcher has it."""
    return getattr(OPS, name).default._schema


def _grouped(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else torch.stack([t, t]) for t in tensors)


def _forward() -> Iterator[Arguments]:
    arguments = Sample(ODD).arguments(DTYPE)
    yield arguments
    yield _grouped(*arguments)
    for terms in ((False, True, True, True), (False, False, False, True), (True, False, False, False)):
        yield Sample(ODD, terms).arguments(DTYPE)


def _packed() -> Iterator[Arguments]:
    x, z, weight, *others = Sample(Shape("long-context", (24,), 30, 5, 7)).arguments(DTYPE)
    assert weight is not None
    packed_weight = mi.pack(weight).packed()
    yield x, z, weight, weight if packed_weight is None else packed_weight, *others


def _input_grads() -> Iterator[Arguments]:
    tensors = Sample(ODD).cotangent(DTYPE), *Sample(ODD).arguments(DTYPE)[:5]
    yield *tensors, True, True
    yield *_grouped(*tensors), True, False
    yield *tensors[:3], None, *tensors[4:], True, True


def _weight_grads() -> Iterator[Arguments]:
    tensors = Sample(ODD).cotangent(DTYPE), *Sample(ODD).arguments(DTYPE)[:2]
    yield *tensors, True, True, True, True
    yield *_grouped(*tensors), True, False, True, False


def _linear() -> Iterator[Arguments]:
    x, _, _, _, weight, bias = Sample(ODD).arguments(DTYPE)
    assert x is not None and weight is not None
    yield x, weight, bias
    yield x[0], weight, None
    yield _grouped(x, weight, bias)
    yield _grouped(x[0], weight, None)


def _linear_add() -> Iterator[Arguments]:
    grad, (x, _, _, _, weight, _) = Sample(ODD).cotangent(DTYPE), Sample(ODD).arguments(DTYPE)
    assert x is not None and weight is not None
    yield x, weight, grad
    yield _grouped(x, weight, grad)


def _linear_grads() -> Iterator[Arguments]:
    grad, (x, _, _, _, weight, _) = Sample(ODD).cotangent(DTYPE), Sample(ODD).arguments(DTYPE)
    assert x is not None
    yield grad, x, weight, True, True, True, False
    yield grad[0], x[0], None, False, True, True, False
    yield *_grouped(grad, x, weight), True, False, True, False
    yield *_grouped(grad[0], x[0], weight), True, True, False, True


def _diagonal() -> Iterator[Arguments]:
    for terms in ("AaCcG", "A"):
        yield *GateSample("diagonal", GATE_ODD, terms).arguments(DTYPE), "sigmoid", 0.5, True


def _gated() -> Iterator[Arguments]:
    for terms in ("WUVc", "c"):
        yield *GateSample("gated_interaction", GATE_ODD, terms).arguments(DTYPE), "softmax", True


def _dual_linear() -> Iterator[Arguments]:
    x, z, a, c, *_ = LOW_RANK.arguments(DTYPE)
    assert a is not None and c is not None
    yield x, z, a, c, a[:, 0], c[:, 0], "tanh", "sigmoid", 2, True
    yield x, None, a, a.flip(0), None, None, "tanh", "identity", 1, False


def _dual_linear_grads() -> Iterator[Arguments]:
    p, q = torch.randn(2, 5, 6, dtype=DTYPE)
    yield torch.randn(5, 3, dtype=DTYPE), p, q, "tanh", "sigmoid", 2
    yield q, p, q, "tanh", "identity", 1


def _differentiable_dual_linear() -> Iterator[Arguments]:
    x, weight, bias, *_ = GLU.arguments(DTYPE)
    yield "portable", "tanh", "identity", 1, x, None, weight, None, bias, None
    x, z, a, c, *_ = LOW_RANK.arguments(DTYPE)
    yield "portable", "tanh", "sigmoid", 2, x, z, a, c, None, None


_MODULATION = Modulation("direct", (3, 4, 5), (3, 1, 5), (3, 1, 1))
_MIXING = Mixing("direct", (3, 4, 5), (3, 4, 5), (3, 1, 5))


def _modulate() -> Iterator[Arguments]:
    yield *_MODULATION.arguments(DTYPE), "sigmoid", 0.5, 2.0


def _modulate_grads() -> Iterator[Arguments]:
    x, scale, _ = _MODULATION.arguments(DTYPE)
    yield _MODULATION.cotangent(DTYPE), x, scale, [3, 1, 1], "tanh", 0.5, True, True, True, 2.0


def _mix() -> Iterator[Arguments]:
    yield *_MIXING.arguments(DTYPE), "sigmoid"


def _mix_grads() -> Iterator[Arguments]:
    yield _MIXING.cotangent(DTYPE), *_MIXING.arguments(DTYPE), "tanh", True, True, True


def _normalizations() -> Iterator[tuple[Normalization, Arguments, Arguments]]:
    """A sample, its tensors as the operations take them, and dim, groups and center."""
    context = (3, 1, 5)
    rows = Normalization("direct", (3, 4, 5), context, context, context, True, "wb")
    x, h, gate, scale, shift, *affine = rows.arguments(DTYPE)
    weight, bias = (t if t is None else t[None, None] for t in affine)
    yield rows, (x, h, gate, scale, shift, weight, bias), (2, 1, True)
    maps = Normalization("direct", (3, 4, 5), None, (3, 4, 1), None, norm="group", groups=2)
    yield maps, tuple(maps.arguments(DTYPE)), (1, 2, True)
    rms = Normalization("direct", (3, 4, 5), None, None, context, norm="rms")
    yield rms, tuple(rms.arguments(DTYPE)), (2, 1, False)


def _norm_modulate() -> Iterator[Arguments]:
    for _, tensors, form in _normalizations():
        yield *tensors, *form, 1e-5, "tanh", 0.5


def _norm_modulate_grads() -> Iterator[Arguments]:
    for sample, tensors, (dim, groups, center) in _normalizations():
        x, h, *others = tensors
        call = OPS.norm_modulate_portable
        *_, mean, rstd = call(x, None, None, *(None,) * 4, dim, groups, center, 1e-5, "identity", 0.0)
        grad = sample.cotangent(DTYPE)
        grad, grad_x = (grad[1], grad[0]) if sample.residual else (grad, None)
        there = [t is not None for t in (x, others[0], *others)]  # without a gate dh is dx
        statistics = mean if center else None, rstd
        yield grad, x, grad_x, h, *others, *statistics, dim, groups, center, "tanh", 0.5, *there


def _differentiable_norm_modulate() -> Iterator[Arguments]:
    for arguments in _norm_modulate():
        yield "portable", *arguments


def _recurrent() -> Iterator[Arguments]:
    for forward, _, _ in recurrent_calls(DTYPE):
        yield forward


def _recurrent_grads() -> Iterator[Arguments]:
    for _, grads, _ in recurrent_calls(DTYPE):
        yield grads


def _recurrent_tangents() -> Iterator[Arguments]:
    for _, _, tangents in recurrent_calls(DTYPE):
        yield tangents


def _differentiable_recurrent() -> Iterator[Arguments]:
    for *tensors, kind, activation, reverse, _ in _recurrent():
        yield "portable", kind, activation, reverse, *tensors


def _plans(*more: Any) -> Callable[[], Iterator[Arguments]]:
    def calls() -> Iterator[Arguments]:
        for primitive in ("forward", "input_grads", "weight_grads"):
            yield primitive, [2, 37, 40, 130, 70], torch.float32, 63, *more
            yield primitive, [1, 5, 3, 7, 11], DTYPE, 62, *more

    return calls


def _gate_plans(*more: Any) -> Callable[[], Iterator[Arguments]]:
    def calls() -> Iterator[Arguments]:
        for terms in (1, 30):
            yield [37, 40, 70], torch.float32, terms, bool(terms == 1), *more

    return calls


def _dual_linear_plans() -> Iterator[Arguments]:
    for keep in (False, True):
        yield [37, 40, 130, 70, 1], torch.float32, True, keep


def _planned() -> Iterator[Arguments]:
    yield "portable", *Sample(ODD).arguments(DTYPE), None, None, None, None
    tokens = Shape("tokens", (3, 4), 5, 6, 6, context_batch=(3, 1))
    yield "portable", *Sample(tokens, WEIGHT_ONLY).arguments(DTYPE), None, None, None, "per_z"
    yield "portable", *TINY_RAGGED.arguments(DTYPE), TINY_RAGGED.segment_ids(), None, None, None
    x, z, *weights = Sample(ODD).arguments(DTYPE)
    assert x is not None
    yield "portable", x, z, *_grouped(*weights), None, _ids(x), None, None


def _ids(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0]) % 2


def _by_segment(
    calls: Callable[[], Iterator[Arguments]], weights: slice, before: tuple[str, ...] = ()
) -> Callable[[], Iterator[Arguments]]:
    """Calls of a primitive, its weights in two groups; ``before``: what the arguments begin with."""

    def grouped() -> Iterator[Arguments]:
        for arguments in calls():
            if arguments[0].dim() == 2:
                order = segments.grouping(_ids(arguments[0]), 2)
                rows, others = list(arguments), arguments[weights]
                rows[weights] = _grouped(*others)
                yield (*before, *order, *rows) if before else (*rows, *order)

    return grouped


def _rows() -> Iterator[Arguments]:
    for arguments in _forward():
        yield "portable", *arguments, None


def _biaffine() -> Iterator[Arguments]:
    for sample in (replace(ARC, ones=(True, True)), LABEL, replace(LABEL, ones=(False, False), bias=(5,))):
        x, z, w, c = sample.arguments(DTYPE)
        assert z is not None and w is not None
        weight, offset = (w[..., :-1], w[..., -1]) if sample.ones[1] else (w, None)
        for keep in (False, True):
            yield x, z, weight, offset, None if c is None else c.repeat(z.shape[1]), not keep, False, keep
    x, z, w, c = replace(ARC, ones=(False, False), bias=(1,)).arguments(DTYPE)
    yield x, z, w, None, None if c is None or x is None else c.repeat(x.shape[1]), False, True, True


def _differentiable_biaffine() -> Iterator[Arguments]:
    for sample in (ARC, LABEL, replace(LABEL, bias=(5,), channels_first=True)):
        yield "portable", *sample.arguments(DTYPE), *sample.ones, sample.channels_first


def _differentiable_third_order() -> Iterator[Arguments]:
    tensors = Triple("tiny", ((4, 3), (4, 2), (1, 5)), 3).arguments(DTYPE)
    for order in ("z1", "product"):
        yield "portable", *tensors, order


def _differentiable_gate() -> Iterator[Arguments]:
    x, z, weight, *others = GateSample("gated_interaction", GATE_ODD, "WUVc").arguments(DTYPE)
    yield "portable", "tanh", 0.0, x, z, weight, *others, None, None
    x, z, a, bias, c, shift, _ = GateSample("diagonal", GATE_ODD, "AaCc").arguments(DTYPE)
    yield "portable", "softmax", 0.5, x, z, None, a, None, bias, c, shift


def _differentiable_modulate() -> Iterator[Arguments]:
    yield "portable", *_MODULATION.arguments(DTYPE), "sigmoid", 0.5, 2.0


def _differentiable_mix() -> Iterator[Arguments]:
    yield "portable", *_MIXING.arguments(DTYPE), "sigmoid"


def _nothing() -> Iterator[Arguments]:
    yield ()


# Valid calls of each operation, by its name without the suffix of a backend.
GOOD: dict[str, Callable[[], Iterator[Arguments]]] = {
    "interaction": _forward,
    "interaction_packed": _packed,
    "interaction_input_grads": _input_grads,
    "interaction_weight_grads": _weight_grads,
    "cpu_linear": _linear,
    "cpu_linear_add": _linear_add,
    "cpu_linear_grads": _linear_grads,
    "cpu_biaffine": _biaffine,
    "interaction_by_segment": _by_segment(_forward, slice(2, 6)),
    "interaction_by_segment_input_grads": _by_segment(_input_grads, slice(3, 6)),
    "interaction_by_segment_weight_grads": _by_segment(_weight_grads, slice(3, 3)),
    "diagonal": _diagonal,
    "gated_interaction": _gated,
    "dual_linear": _dual_linear,
    "dual_linear_grads": _dual_linear_grads,
    "modulate": _modulate,
    "modulate_grads": _modulate_grads,
    "mix": _mix,
    "mix_grads": _mix_grads,
    "norm_modulate": _norm_modulate,
    "norm_modulate_grads": _norm_modulate_grads,
    "recurrent": _recurrent,
    "recurrent_grads": _recurrent_grads,
    "recurrent_tangents": _recurrent_tangents,
    "differentiable_interaction": _planned,
    "differentiable_interaction_rows": _rows,
    "differentiable_interaction_by_segment": _by_segment(_forward, slice(2, 6), ("portable",)),
    "differentiable_biaffine": _differentiable_biaffine,
    "differentiable_third_order": _differentiable_third_order,
    "differentiable_dual_linear": _differentiable_dual_linear,
    "differentiable_gate": _differentiable_gate,
    "differentiable_modulate": _differentiable_modulate,
    "differentiable_mix": _differentiable_mix,
    "differentiable_norm_modulate": _differentiable_norm_modulate,
    "differentiable_recurrent": _differentiable_recurrent,
    "cpu_interaction_plan": _plans(),
    "cuda_interaction_plan": _plans(90, 132),
    "cpu_dual_linear_plan": _dual_linear_plans,
    "cpu_gate_plan": _gate_plans(),
    "cuda_gate_plan": _gate_plans(80, 40),
    "cuda_aligned": lambda: iter([(torch.zeros(5, 24, dtype=DTYPE),)]),
    "segment_order": lambda: iter([(torch.tensor([2, 0, 1, 2]), 3)]),
    "cpu_isa": _nothing,
    "cuda_architectures": _nothing,
    "tf32_allowed": _nothing,
}


_MANY_RANKS = "differentiable_interaction", "differentiable_third_order", "cpu_linear", "cpu_linear_grads"


def broken(name: str, arguments: Arguments) -> Iterator[Broken]:
    """The call with each argument in turn replaced by each kind of invalid value for its type."""
    parameters = schema(name).arguments
    tensors = [p.name for p in parameters if "Tensor" in str(p.type)]
    for index, (parameter, value) in enumerate(zip(parameters, arguments, strict=True)):
        # The first two tensors define the sizes of the others, so the message may name any tensor.
        # So does gates_x, which stands behind cotangents and tangents.
        first = parameter.name in (*tensors[:2], "gates_x")
        to_blame = tuple(tensors) if first else (parameter.name,)
        if name == "differentiable_gate":
            to_blame += ("weight",)  # the diagonal form's name for U
        for what, wrong, sure in _wrong(parameter.name, str(parameter.type), value):
            if name in _MANY_RANKS and "dimensions" in what:
                sure = "no dimensions" in what  # other ranks broadcast, or are those of all samples
            blamed = to_blame if sure and tensors != [parameter.name] else None
            changed = (*arguments[:index], wrong, *arguments[index + 1 :])
            yield Broken(f"{parameter.name}: {what}", parameter.name, changed, blamed)


_FAR = 2**56  # an expanded size; materialised, it would exceed what any allocator can reserve
_HUGE = (2**31, 2**40, 2**62, -1, -(2**63))


def _wrong(name: str, kind: str, value: Any) -> Iterator[tuple[str, Any, bool]]:
    """(description, value, whether it is certainly invalid). Only CPU kernels read ``packed_weight``."""
    if "Tensor" in kind:
        yield from _wrong_tensors(value, kind.startswith("Optional"), name == "packed_weight")
    elif kind in ("str", "Optional[str]"):
        wrong = (*([None] if kind == "str" else []), 5, "", "nope", "sigmoid ", "sigmoid\0", "s" * 100_000)
        yield from ((f"{text!r:.20}", text, True) for text in wrong)
        yield "softmax", "softmax", False
    elif kind.startswith("List"):
        yield from _wrong_lists(value)
    elif kind == "int" and isinstance(value, torch.dtype):
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, None):
            yield str(dtype), dtype, True
        yield from ((f"number {number}", number, False) for number in (99, -1, 2**40))
    elif kind == "int":
        yield from ((str(number), number, False) for number in (0, 1, *_HUGE))
        yield "None", None, True
    elif kind == "float":
        yield from ((str(number), number, False) for number in (float("nan"), float("inf"), 0.0))
        yield "None", None, True
    elif kind == "bool":
        yield "turned", not value, False
        yield "None", None, False  # PyTorch converts it to False
    else:
        raise TypeError(f"broken: {kind}: expected a type of arguments whose wrong values are known")


def _wrong_lists(value: list[int]) -> Iterator[tuple[str, Any, bool]]:
    yield "None", None, True
    for wrong in ([], value[1:], [*value, 1]):
        yield str(wrong), wrong, True
    for index in range(len(value)):
        for size in (0, 1, 7, *_HUGE):
            wrong = [*value[:index], size, *value[index + 1 :]]
            yield str(wrong), wrong, size < 0
    for size in (0, *_HUGE):
        yield f"all {size}", [size] * len(value), size < 0


def _wrong_tensors(
    tensor: Tensor | None, optional: bool, read_by_one: bool
) -> Iterator[tuple[str, Any, bool]]:
    yield "a str", "x", True
    if tensor is None:
        return
    yield "None", None, not optional
    yield "fewer dimensions", tensor[0], True
    yield "more dimensions", tensor.unsqueeze(0), True
    yield "no dimensions", tensor.sum(), True
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.bool,
        torch.complex128,
    ):
        if dtype != tensor.dtype:
            yield str(dtype), tensor.to(dtype), not read_by_one
    yield "meta", tensor.to("meta"), True
    yield "sparse", tensor.to_sparse(), True
    if tensor.dim() == 2:
        yield "sparse rows", tensor.to_sparse_csr(), True
        if torch.backends.mkldnn.is_available():
            yield "mkldnn", tensor.float().to_mkldnn(), True
    for axis, size in enumerate(tensor.shape):
        for wrong in sorted({0, size - 1, size + 1, _FAR} - {size}):
            sizes = [wrong if a == axis else own for a, own in enumerate(tensor.shape)]
            if math.prod(sizes) >= 2**63:
                continue
            resized = tensor.narrow(axis, 0, 1).expand(sizes)
            # Not certainly invalid: size 1 may broadcast, and some axes belong to one tensor only.
            yield f"{list(resized.shape)}", resized if wrong == _FAR else resized.contiguous(), False
